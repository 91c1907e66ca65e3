// The page: what the server says goes to tiles, charts and tables; what the user does goes to the server.

import { Chart, Samples } from "./charts.js";
import { Connection } from "./connection.js";
import { addLog, showDetails } from "./health.js";
import { asPython } from "./python.js";
import { Tiles, corners, middle } from "./tiles.js";

const $ = (id) => document.getElementById(id);
const STAGES = ["decode", "preprocess", "encode", "publish"];

/** For tests and the console: what is shown, as numbers. */
const view = { frames: 0, frame: null, tiles: null, health: null, samples: new Samples(), paintedMs: [], firstMs: null };
window.view = view;
let hello = null;
let selected = "";

const tiles = new Tiles($("tiles"), $("legends"), {
  onTouch(camera, box, hold) {
    if (hold) setMode("similarity");
    connection.send({ type: "touch", camera, box, hold });
  },
  onPoint(of, space, patch) {
    tellPatch(of, space, patch);
    const pinned = tiles.shown.pin?.hold;
    if (tiles.shown.mode !== "similarity" || pinned) return;
    if (patch < 0) return connection.send({ type: "untouch" });
    const [x, y] = middle(of, tiles.frame.grid, patch);
    connection.send({ type: "touch", camera: of.camera, box: [x, y, x, y], hold: false });
  },
  onRelease: release,
});
view.tiles = tiles;
const charts = [
  new Chart($("rates"), (samples) => [
    ...[...new Set(samples.flatMap((sample) => Object.keys(sample.in_hz)))].slice(0, 6).map((name) => ({
      label: `in ${name.slice(0, 20)}`,
      values: samples.map((sample) => sample.in_hz[name] ?? null),
    })),
    { label: "out", values: samples.map((sample) => sample.out_hz) },
    { label: "received here", values: samples.map((sample) => sample.received_hz), dash: true },
  ]),
  new Chart($("latency"), (samples) =>
    ["p50", "p95"].flatMap((percent) =>
      STAGES.map((stage, index) => ({
        label: stage,
        hidden: percent === "p95",
        with: percent === "p50" ? STAGES.length : undefined,
        color: index,
        values: samples.map((sample) => sample[`${stage}_${percent}`]),
        dash: percent === "p95",
      })),
    ),
  ),
  new Chart(
    $("age"),
    (samples) => [
      { label: "when received", values: samples.map((sample) => sample.age_ms) },
      { label: "when published", values: samples.map((sample) => sample.published_age_ms), dash: true },
    ],
    0,
  ),
];

const handlers = {
  hello(message) {
    hello = message;
    $("title").textContent = message.title;
    $("hz").value = message.hz;
    $("control").hidden = !message.allow_control;
    $("save").href = `message?page=${encodeURIComponent(message.page)}`;
    $("save-pinned").href = `${$("save").href}&pinned`;
    setRecording(message.is_recording);
    connection.send({ type: "mode", mode: mode() });
    connection.send({ type: "hide", spaces: [...hidden] });
    connection.send({ type: "visible", visible: !document.hidden });
    connection.send({ type: "pause", paused: $("pause").getAttribute("aria-pressed") === "true" });
    if (selected) connection.send({ type: "select", topic: selected });
  },
  async frame(message) {
    await tiles.show(message);
    view.frame = message;
    showSpaces(message.spaces);
    painted(message);
    requestAnimationFrame(() => connection.send({ type: "painted" }));
  },
  layers(message) {
    tiles.layers(message);
    showSpaces(message.spaces);
    tellPin();
  },
  health(message) {
    view.health = message;
    if (message.times !== null) setTimes(message.times);
    view.samples.add(message.samples, message.from_start);
    addLog(message.log);
    showTokenizers(message);
    if (message.details) showDetails(message.details, median(view.paintedMs));
    for (const chart of charts) chart.draw(view.samples.list);
  },
  error: (message) => notice(message.text),
  control: (message) => notice(message.text),
};
// One after the other: a frame takes a while to be decoded, and what follows it may be about it.
let handled = Promise.resolve();
const connection = new Connection(
  (message) => {
    handled = handled.then(() => handlers[message.type]?.(message)).catch((error) => console.error(error));
  },
  (connected) => {
    document.body.classList.toggle("disconnected", !connected);
    notice(connected ? "" : "The server of this page does not answer; trying again.");
  },
);

function painted(frame) {
  view.frames += 1;
  view.firstMs ??= performance.now();
  const stamps = frame.views.filter((one) => one.valid).map((one) => one.stamp_ms);
  const age = Date.now() - Math.min(...stamps);
  if (age > -1000 && age < 3.6e6) view.paintedMs = [...view.paintedMs.slice(-99), age];
  $("banner").hidden = frame.weights !== "random";
  $("banner").textContent = `Random weights: the tokens of ${frame.model} mean nothing to a policy, and neither do these colors.`;
  $("seek").value = frame.index;
  tellWhen(frame.index);
  tellPin();
  if (playing !== null) playNext(frame.index);
}

function showTokenizers(message) {
  const options = message.tokenizers.map((one) => {
    const option = document.createElement("option");
    option.value = one.topic;
    option.textContent = `${one.topic} ${one.model}${one.gone ? " (gone)" : ""}`;
    return option;
  });
  const menu = $("tokenizers");
  if (document.activeElement !== menu || menu.childElementCount !== options.length) menu.replaceChildren(...options);
  menu.value = message.topic;
  const shown = message.tokenizers.find((one) => one.topic === message.topic);
  const state = $("state");
  const gone = shown?.gone ?? true;
  state.textContent = shown === undefined ? "none found" : gone ? "gone" : shown.state.split(",")[0] || "publishing";
  state.className = `pill ${gone || shown.warns ? "bad" : "good"}`;
  document.body.classList.toggle("gone", gone && shown !== undefined);
  if (tiles.frame !== null && tiles.frame.topic !== message.topic) tiles.clear("Waiting for tokens …");
  if (tiles.frame === null) tiles.clear(waiting(message, shown));
}

function waiting(message, shown) {
  if (shown === undefined) return `No tokenizer in ${hello?.title ?? "this domain"} yet: it appears here when it runs.`;
  if (shown.gone) return "This tokenizer is gone.";
  if (!message.details?.reception.transport) return "Passive: looks on while another node subscribes to the tokens.";
  if (shown.state && !shown.state.startsWith("active")) return `The tokenizer is ${shown.state}.`;
  return "Waiting for tokens: do the cameras send, and do the warnings on this page say something?";
}

/** A box to tick for each space, where there are several; those that are not ticked are not computed. */
const hidden = new Set(["encoders joined"]);
function showSpaces(spaces) {
  const wanted = JSON.stringify(spaces);
  if ($("spaces").dataset.spaces === wanted) return;
  $("spaces").dataset.spaces = wanted;
  $("spaces").hidden = spaces.length < 2;
  const boxes = spaces.map((space) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = !hidden.has(space);
    box.addEventListener("change", () => {
      box.checked ? hidden.delete(space) : hidden.add(space);
      connection.send({ type: "hide", spaces: [...hidden] });
    });
    label.append(box, space);
    return label;
  });
  $("spaces").replaceChildren($("spaces").firstElementChild, ...boxes);
}

// The patch under the pointer, and the one that is pinned

function describe(of, patches) {
  const { grid, first } = tiles.frame;
  const points = patches.flatMap((patch) => corners(of, grid, patch));
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const span = (values) => `${Math.min(...values).toFixed(0)}–${Math.max(...values).toFixed(0)}`;
  const name =
    patches.length === 1
      ? `token ${patches[0] + first} (row ${Math.floor(patches[0] / grid[1])}, column ${patches[0] % grid[1]})`
      : `mean of ${patches.length} tokens`;
  const index = tiles.frame.views.indexOf(of);
  const norms = tiles.shown.spaces.map((space) => {
    const at = index * grid[0] * grid[1];
    const mean = patches.reduce((sum, patch) => sum + space.norms[at + patch], 0) / patches.length;
    return `${space.space} ${mean.toPrecision(4)}`;
  });
  return `${of.camera}: ${name}, pixels ${span(xs)} × ${span(ys)}, norm ${norms.join(", ")}`;
}

function tellPatch(of, space, patch) {
  if (patch < 0) return tellPin();
  const values = tiles.space(space)?.values;
  const at = tiles.frame.views.indexOf(of) * tiles.frame.grid[0] * tiles.frame.grid[1] + patch;
  const value = values ? `; ${tiles.shown.mode} ${values[at].toFixed(3)}` : "";
  $("patch").textContent = describe(of, [patch]) + value;
}

function tellPin() {
  const pin = tiles.shown?.pin;
  const of = tiles.frame?.views.find((one) => one.camera === pin?.camera);
  const pinned = Boolean(pin?.hold && of && pin.patches.length);
  $("unpin").hidden = !pin?.hold;
  $("copy").hidden = $("save-pinned").hidden = !pinned;
  if (pinned) $("patch").textContent = `Pinned ${describe(of, pin.patches)}, of message ${pin.sequence}`;
}

function release() {
  if ($("notice").textContent === view.copied) notice("");
  connection.send({ type: "untouch" });
}

// What the user does

const mode = () => document.querySelector("input[name=mode]:checked").value;

function setMode(value) {
  if (mode() === value) return;
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
  connection.send({ type: "mode", mode: value });
}

let silence = 0;
function notice(text, stays = false) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  clearTimeout(silence);
  if (text && !stays && !document.body.classList.contains("disconnected")) silence = setTimeout(() => notice(""), 8000);
}

function median(values) {
  return values.length ? values.toSorted((one, other) => one - other)[Math.floor(values.length / 2)] : null;
}

$("modes").addEventListener("change", () => connection.send({ type: "mode", mode: mode() }));
$("opacity").addEventListener("input", (event) => {
  tiles.opacity = Number(event.target.value);
  tiles.paint();
});
$("scale").addEventListener("change", (event) => {
  tiles.scale = event.target.value;
  tiles.paint();
});
$("refit").addEventListener("click", () => connection.send({ type: "refit" }));
$("unpin").addEventListener("click", release);
$("tokenizers").addEventListener("change", (event) => {
  selected = event.target.value;
  view.paintedMs = [];
  connection.send({ type: "select", topic: selected });
});
$("hz").addEventListener("change", (event) => connection.send({ type: "hz", hz: Number(event.target.value) || 5 }));
$("pause").addEventListener("click", (event) => {
  const paused = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", String(paused));
  event.target.textContent = paused ? "Go on" : "Pause";
  connection.send({ type: "pause", paused });
});
$("control").addEventListener("click", (event) => {
  const action = event.target.dataset.action;
  if (action) connection.send({ type: "control", action });
});
$("copy").addEventListener("click", async () => {
  const space = tiles.shown.spaces.at(-1)?.space;
  if (space === undefined) return;
  view.copied = asPython(tiles.frame, tiles.shown.pin, space);
  try {
    await navigator.clipboard.writeText(view.copied);
    notice("Copied. Save pinned message gives the file that it reads.");
  } catch {
    notice(view.copied, true); // no clipboard without https or localhost
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") release();
});
document.addEventListener("visibilitychange", () => connection.send({ type: "visible", visible: !document.hidden }));

// A recording's time line

let playing = null;
let times = [];

function setRecording(isRecording) {
  $("timeline").hidden = !isRecording;
  for (const id of ["pause", "hz"]) $(id).closest("label, button").hidden = isRecording;
  $("health").hidden = isRecording;
  $("told").hidden = isRecording;
  document.querySelector("main").classList.toggle("recording", isRecording);
}

function setTimes(values) {
  times = values;
  $("seek").max = Math.max(0, times.length - 1);
}

function tellWhen(index) {
  if (index < times.length) $("when").value = `${times[index].toFixed(2)} of ${times.at(-1).toFixed(2)} s`;
}

function playNext(index) {
  clearTimeout(playing);
  const next = (index + 1) % times.length;
  const wait = next ? (times[next] - times[index]) * 1000 : 500;
  playing = setTimeout(() => connection.send({ type: "seek", index: next }), Math.min(Math.max(wait, 0), 2000));
}

$("seek").addEventListener("input", (event) => {
  connection.send({ type: "seek", index: Number(event.target.value) });
  tellWhen(Number(event.target.value));
});
$("play").addEventListener("click", (event) => {
  const play = playing === null;
  event.target.setAttribute("aria-pressed", String(play));
  event.target.textContent = play ? "Stop" : "Play";
  clearTimeout(playing);
  playing = null;
  if (play && tiles.frame) playNext(tiles.frame.index);
});
