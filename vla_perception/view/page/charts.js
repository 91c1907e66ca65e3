// Curves over the last minutes, by uPlot.

const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f96", "#b8a000"]; // Okabe and Ito
const SECONDS = 600;
const HEIGHT = 120;

export class Chart {
  /**
   * `series(samples)` gives [{ label, values, dash, color, hidden, with }] of the samples, oldest first:
   * `hidden` from the legend, `with` the series that many places on, which the legend shows in the same entry.
   */
  constructor(element, series, digits = 1) {
    Object.assign(this, { element, series, digits });
    this.plot = null;
    this.labels = "";
    new ResizeObserver(() => this.resize()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (this.labels = ""));
  }

  draw(samples) {
    const series = this.series(samples);
    const labels = JSON.stringify(series.map((one) => one.label));
    const data = [samples.map((sample) => sample.time), ...series.map((one) => one.values)];
    if (labels !== this.labels) {
      this.labels = labels;
      this.plot?.destroy();
      this.plot = new uPlot(this.options(series), data, this.element);
    } else {
      this.plot.setData(data);
    }
  }

  options(series) {
    const style = getComputedStyle(document.documentElement);
    const axis = { stroke: style.getPropertyValue("--dim"), grid: { stroke: style.getPropertyValue("--line"), width: 1 } };
    const end = (self) => self.data[0].at(-1) ?? 0;
    const shown = (value) => (value === null || value === undefined ? "–" : value.toFixed(this.digits));
    return {
      width: this.element.clientWidth,
      height: HEIGHT,
      padding: [6, 6, 0, 0],
      scales: { x: { time: false }, y: { range: (_self, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [
        { ...axis, size: 24, gap: 2, ticks: { show: false }, font: "11px system-ui", values: (self, ticks) => ticks.map((tick) => `${Math.round(tick - end(self))} s`) },
        { ...axis, size: 42, gap: 4, ticks: { show: false }, font: "11px system-ui" },
      ],
      cursor: { y: false, points: { size: 5 } },
      legend: { live: true },
      series: [
        { label: "at", value: (self, value) => (value === null ? "now" : `${Math.round(value - end(self))} s`) },
        ...series.map((one, index) => ({
          label: one.label,
          class: one.hidden ? "unlisted" : null,
          stroke: COLORS[(one.color ?? index) % COLORS.length],
          width: 1.5,
          dash: one.dash ? [4, 3] : undefined,
          points: { show: false },
          spanGaps: false,
          value: (self, value, place, at) => {
            const of = (row) => shown(at === null || at === undefined ? self.data[row].at(-1) : self.data[row][at]);
            return one.with === undefined ? of(place) : `${of(place)} ┅ ${of(place + one.with)}`;
          },
        })),
      ],
    };
  }

  resize() {
    this.plot?.setSize({ width: this.element.clientWidth, height: HEIGHT });
  }
}

/** Samples of one tokenizer, those of the last minutes; what comes twice is taken once. */
export class Samples {
  constructor() {
    this.list = [];
  }

  add(samples, fromStart) {
    if (fromStart) this.list = [];
    const last = this.list.at(-1)?.time ?? -Infinity;
    this.list.push(...samples.filter((sample) => sample.time > last));
    this.list.splice(0, this.list.length - SECONDS);
  }
}
