// Tables and lists of what is known about a tokenizer. Text is only ever set as text.

const $ = (id) => document.getElementById(id);
const number = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function list(target, pairs) {
  target.replaceChildren(
    ...pairs
      .filter(([, value]) => value !== undefined && value !== null && value !== "")
      .flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]),
  );
}

const COUNTERS = ["received", "encoded", "replaced", "unmatched", "undecodable", "pending"];

/** A column for each camera, a row for each counter: many cameras scroll, and names of counters stay readable. */
function showCameras(cameras) {
  const row = (name, cells) => {
    const made = document.createElement("tr");
    const head = element("th", name);
    head.scope = "row";
    made.append(head, ...cells);
    return made;
  };
  const rows = [
    row("", cameras.map((camera) => Object.assign(element("th", camera.camera), { scope: "col" }))),
    row("rate, Hz", cameras.map((camera) => element("td", number(camera.rate_hz)))),
    ...COUNTERS.map((name) => row(name, cameras.map((camera) => element("td", String(camera[name] ?? "–"))))),
  ];
  $("cameras").replaceChildren(...rows);
}

function showProblems(details) {
  const problems = details.cameras.filter((camera) => camera.problem).map((camera) => `${camera.camera}: ${camera.problem}`);
  if (details.problem) problems.unshift(details.problem);
  $("problems").replaceChildren(...problems.map((problem) => element("li", problem)));
}

export function showDetails(details, paintedMs) {
  const { facts, reception } = details;
  showCameras(details.cameras);
  showProblems(details);
  list($("reception"), [
    ["transport", reception.transport || "not subscribed"],
    ["received", reception.received],
    ["lost", `${reception.lost} in ${reception.gaps} gaps`],
    ["restarts", reception.restarts],
    ["rejected", reception.rejected],
    ["age of tokens", details.age_ms === null ? null : `${number(details.age_ms, 0)} ms`],
    ["camera → this page", paintedMs === null ? null : `${number(paintedMs, 0)} ms (median)`],
  ]);
  list($("facts"), [
    ["node", details.node],
    ["topic", details.topic],
    ["state", details.gone ? `gone, ${details.silent_sec ?? "?"} s without a sign` : details.state],
    ["model", facts.model],
    ["weights", facts.weights],
    ["fingerprint", facts.fingerprint],
    ["computed in", [facts.compute_dtype, facts.runtime, facts.device].filter(Boolean).join(", ")],
    ["device memory", facts.device_memory_mb && `${facts.device_memory_mb} MB`],
    ["messages", facts.token_messages && `${facts.token_messages}, ${facts.on_topic} on the topic, ${facts.in_shared_memory} in shared memory`],
    ["readers", facts.shared_memory_readers && `${facts.shared_memory_readers} in shared memory`],
    ["failures", ["encode_errors", "non_finite", "publish_errors"].filter((key) => facts[key] > 0).map((key) => `${key} ${facts[key]}`).join(", ")],
  ]);
  $("events").replaceChildren(
    ...details.events.toReversed().map((event) => {
      const item = element("li", event.text);
      item.append(" ", element("small", `${event.ago_sec.toFixed(0)} s ago`));
      return item;
    }),
  );
}

/** Adds lines of the log on top; at most 200 stay. */
export function addLog(lines) {
  const target = $("log");
  for (const line of lines) {
    const item = document.createElement("li");
    item.className = line.level;
    const time = new Date(line.stamp_sec * 1000).toLocaleTimeString();
    item.append(element("b", line.level), ` ${line.text} `, element("small", `${line.node}, ${time}`));
    target.prepend(item);
  }
  while (target.childElementCount > 200) target.lastChild.remove();
}
