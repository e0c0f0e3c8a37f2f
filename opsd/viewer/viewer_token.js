"use strict";
// Everything that a model or a data set wrote reaches the page through textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);

const KINDS = { left_out: { name: "Not trained on", what: "the largest divergence that was not trained on", colour: "var(--kept)" } };
// Label columns: names and colours of their values come with the record's telemetry.
const LABEL_MODES = data.labels.map(({ column, values, splits }) => {
  const labels = new Map(values.map((label) => [label.value, label]));
  labels.forEach((label, value) => { KINDS[`${column} ${value}`] = label; });
  return { key: `label ${column}`, name: column[0].toUpperCase() + column.slice(1), what: "", colour: "", labels, splits };
});
const MODES = [
  { key: "h", name: "Entropy", what: "student entropy h", colour: "var(--entropy)" },
  { key: "r", name: "Divergence", what: "reverse KL δ = KL(student‖teacher)", colour: "var(--divergence)" },
  { key: "f", name: "Forward KL", what: "KL(teacher‖student)", colour: "var(--forward)" },
  ...LABEL_MODES,
  { key: "k", name: "Kept", what: "", colour: "var(--kept)" }].filter((mode) => data.rollouts.some((r) => mode.key in r));
const UNNAMED = { name: "?", what: "", colour: "var(--soft)" };
const labelOf = (mode, value) => mode.labels.get(value) || UNNAMED;

const state = { mode: LABEL_MODES[0] || MODES[0], here: null, held: false, blocks: [] };
const byId = (id) => document.getElementById(id);

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function nats(value) {
  if (value === null || value === undefined) return "-";
  return value >= 0.095 ? value.toFixed(2) : value >= 0.001 ? value.toPrecision(2) : value > 0 ? value.toExponential(0) : "0";
}
const percent = (fraction) => `${(100 * fraction).toFixed(1)} %`;
function chance(logProb) {
  if (logProb === null || logProb === undefined) return "0";
  const p = Math.exp(logProb);
  return p >= 0.0995 ? p.toFixed(2) : p >= 0.001 ? p.toFixed(3) : p >= 1e-99 ? p.toExponential(0) : "0";
}
const mean = (values) => (values && values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "·".repeat(s.length));
const SPECIAL = /^<[^<>\s]{1,40}>$/;

// rowAt: from a token's place in the response to its row of statistics (tool tokens have none).
for (const rollout of data.rollouts) {
  rollout.rowAt = new Map((rollout.at || rollout.ids.map((_, i) => i)).map((place, row) => [place, row]));
  rollout.ends = new Set(rollout.end || []);
  rollout.text = rollout.ids.map((i) => data.texts[i]).join("");
}
const placeOf = (rollout, row) => (rollout.at ? rollout.at[row] : row);

// ---- the chosen token -------------------------------------------------------------------------------------------
function topLists(rollout, row) {
  const box = make("div", "tops"), chosen = rollout.ids[placeOf(rollout, row)];
  for (const [key, name] of [["s", "student"], ["t", "teacher"]]) {
    const side = make("div", name), list = make("ol");
    side.append(make("h3", "", name), list);
    rollout[key][row].forEach((number, rank) => {
      const logProb = rollout[`${key}p`][row][rank], item = make("li", number === chosen ? "chosen" : ""), bar = make("i");
      bar.style.width = `${100 * Math.exp(logProb ?? -Infinity)}%`;
      item.append(bar, make("span", "", visible(data.texts[number])), make("em", "", chance(logProb)));
      list.append(item);
    });
    box.append(side);
  }
  return box;
}

function describe(block, place) {
  const { rollout } = block, row = rollout.rowAt.get(place), box = byId("detail"), text = data.texts[rollout.ids[place]];
  box.classList.remove("idle");
  box.replaceChildren(make("div", "big", visible(text) || "(no text)"));
  const where = `token ${place + 1} of ${rollout.ids.length} in rollout ${rollout.id}`;
  if (row === undefined) { box.append(make("p", "", `${where}: written by a tool, not by the student`)); return; }
  const chip = (label, colour) => { const c = make("span", "chip", label); c.style.setProperty("--kind", colour); box.append(c); };
  for (const mode of LABEL_MODES) {
    const { name, what, colour } = labelOf(mode, rollout[mode.key][row]);
    chip(`${name} ${what}`, colour);
  }
  chip(rollout.k[row] ? "trained on" : "not trained on", rollout.k[row] ? "var(--kept)" : "var(--soft)");
  if (rollout.ends.has(place)) chip("■ ends the turn", "var(--accent)");
  const list = make("dl"), line = (name, value) => list.append(make("dt", "", name), make("dd", "", value));
  line("entropy h", `${nats(rollout.h[row])} nats`);
  if (rollout.r) line("reverse KL δ, student‖teacher", `${nats(rollout.r[row])} nats`);
  if (rollout.f) line("forward KL, teacher‖student", `${nats(rollout.f[row])} nats`);
  if (rollout.e) line("teacher's entropy", `${nats(rollout.e[row])} nats`);
  if (rollout.p) line("probability: student, teacher", `${chance(rollout.p[row])}, ${chance(rollout.o[row])}`);
  if (rollout.a) line("same first choice", rollout.a[row] ? "yes" : "no");
  box.append(list);
  if (rollout.s) box.append(topLists(rollout, row));
  box.append(make("p", "", where));
  keysHelp(box);
}

function keysHelp(box) {
  const help = make("p", "keys");
  [["←→", "token"], ["↑↓", "rollout"], ["Enter", "pin"], [`1–${MODES.length}`, "colour"], ["/", "search"]].forEach(([key, what]) => {
    help.append(make("kbd", "", key), ` ${what}  `);
  });
  box.append(help);
}
