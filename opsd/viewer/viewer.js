// ---- header, examples -------------------------------------------------------------------------------------------
function header() {
  byId("run").textContent = `${data.run}, step ${data.step} of ${data.steps}`;
  const tokens = data.rollouts.reduce((sum, r) => sum + r.k.length, 0);
  const left = data.left_out ? `, ${data.left_out} more not shown` : "";
  byId("facts").textContent = `${data.student} learns from ${data.teacher} · ${data.selector} · `
    + `${data.rollouts.length} rollouts, ${tokens.toLocaleString("en")} tokens${left}`;
}

function context(rollout, place, kind) {
  const box = make("div", "context");
  const text = (from, to) => rollout.ids.slice(from, to).map((i) => data.texts[i]).join("").replace(/\n+/g, "⏎ ");
  const from = Math.max(0, place - 28);
  // Near its start a response alone says little: show the prompt's end before it.
  const before = from ? "…" : rollout.prompt ? `${rollout.prompt.length > 60 ? "…" : ""}${rollout.prompt.slice(-60).replace(/\n+/g, "⏎ ")} ▸ ` : "";
  box.append(before + text(from, place), make("mark", "", visible(data.texts[rollout.ids[place]])),
    text(place + 1, place + 9) + (place + 9 < rollout.ids.length ? "…" : ""));
  box.style.setProperty("--kind", kind.colour);
  return box;
}

function exampleCards() {
  byId("examples-section").hidden = !data.examples.length;
  for (const example of data.examples) {
    const rollout = data.rollouts[example.rollout], kind = KINDS[example.kind], place = placeOf(rollout, example.row);
    const card = make("button", "card");
    card.type = "button";
    card.style.setProperty("--kind", kind.colour);
    const title = make("div", "kind", `${kind.name} `);
    title.append(make("small", "", kind.what));
    const numbers = make("div", "numbers");
    numbers.append("h ", make("b", "", nats(rollout.h[example.row])), " · δ ", make("b", "", nats(rollout.r[example.row])),
      ` nats · ${rollout.k[example.row] ? "trained on" : "not trained on"}`);
    card.append(title, context(rollout, place, kind), numbers);
    if (rollout.s) card.append(topLists(rollout, example.row));
    card.addEventListener("click", () => goTo(example.rollout, place));
    byId("examples").append(card);
    const box = card.querySelector(".context"), mark = box.querySelector("mark");
    box.scrollTop += mark.getBoundingClientRect().top + mark.offsetHeight / 2 - box.getBoundingClientRect().top - box.clientHeight / 2;
  }
}

// ---- controls ---------------------------------------------------------------------------------------------------
function modeControls() {
  MODES.forEach((mode, number) => {
    const label = make("label"), input = make("input");
    Object.assign(input, { type: "radio", name: "mode", value: mode.key, checked: mode === state.mode });
    input.addEventListener("change", () => { state.mode = mode; legend(); state.blocks.forEach(paint); });
    label.append(input, mode.name);
    label.title = `${mode.what || mode.name} (key ${number + 1})`;
    byId("modes").append(label);
  });
}

function legend() {
  const box = byId("legend"), mode = state.mode;
  box.replaceChildren();
  const entry = (colour, weight, ...text) => {
    const item = make("span"), dot = make("i");
    dot.style.background = `color-mix(in srgb, ${colour} ${weight}%, transparent)`;
    item.append(dot, ...text);
    box.append(item);
  };
  if (mode.labels) {
    mode.labels.forEach(({ name, what, colour, faint, tokens, loss }) => {
      entry(colour, faint ? 25 : 60, name, make("span", "what", ` ${what}`), ` ${percent(tokens)}, ${percent(loss)} of Σδ`);
    });
    const splits = Object.entries(mode.splits).map(([axis, value]) => `${axis} ${nats(value)}`);
    if (splits.length) box.append(`split at ${splits.join(", ")} nats`);
  } else if (mode.key === "k") {
    const kept = mean(data.rollouts.flatMap((r) => r.k));
    entry("var(--kept)", 40, `trained on ${percent(kept)}`);
    box.append("the rest is dimmed");
  } else {
    const ramp = make("span", "ramp");
    ramp.style.background = `linear-gradient(90deg, transparent, color-mix(in srgb, ${mode.colour} 70%, transparent))`;
    const words = [mode.what, "0", `${nats(data.scale[mode.key])} nats and above`].map((text) => make("span", "", text));
    box.append(words[0], words[1], ramp, words[2]);
  }
}

function listControls() {
  const graded = data.rollouts.some((r) => r.reward !== null && r.reward !== undefined);
  const options = (select, pairs) => pairs.forEach(([value, text]) => select.append(new Option(text, value)));
  options(byId("order"), [["id", "as sampled"], ["r", "most divergence first"], ["h", "most entropy first"], ["long", "longest first"]]);
  options(byId("show"), [["all", "all"], ...(graded ? [["right", "right answers"], ["wrong", "wrong answers"]] : []),
    ...(data.rollouts.some((r) => r.truncated) ? [["cut", "truncated"]] : [])]);
  for (const id of ["order", "show", "find"]) byId(id).addEventListener("input", arrange);
  byId("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
      || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
}

// ---- rollouts ---------------------------------------------------------------------------------------------------
function build(rollout, index) {
  const node = make("article", "rollout"), head = make("header");
  head.append(make("b", "", `rollout ${rollout.id}`));
  if (rollout.reward !== null && rollout.reward !== undefined) {
    head.append(make("span", rollout.reward > 0 ? "right" : "wrong", rollout.reward === 1 ? "✓ right" : rollout.reward === 0 ? "✗ wrong" : `reward ${rollout.reward}`));
  }
  if (rollout.answer) head.append(make("span", "", `gold answer ${rollout.answer}`));
  head.append(make("span", "", `${rollout.k.length} tokens, ${percent(mean(rollout.k))} kept`),
    make("span", "", `mean h ${nats(mean(rollout.h))}`), make("span", "", `mean δ ${nats(mean(rollout.r))} nats`));
  if (rollout.truncated) head.append(make("span", "wrong", "truncated"));
  node.append(head);
  if (rollout.prompt) node.append(make("div", "prompt", rollout.prompt));
  const text = make("div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `Tokens of rollout ${rollout.id}; arrow keys move`);
  node.append(text);
  const block = { rollout, index, node, text, tokens: null };
  text.addEventListener("focus", () => { if (!state.here || state.here.block !== block) stepTo(block, 0); });
  return block;
}

// Tokens become elements only when their rollout comes into view.
function fill(block) {
  if (block.tokens) return;
  // Scroll to the prompt's end, which is the question: a template's preamble can be long.
  const prompt = block.node.querySelector(".prompt");
  if (prompt) prompt.scrollTop = prompt.scrollHeight;
  block.tokens = block.rollout.ids.map((number, place) => {
    const text = data.texts[number], token = make("span", "token", text.includes("\n") ? text.replace(/\n/g, "⏎\n") : text);
    token.dataset.place = place;
    if (SPECIAL.test(text)) token.classList.add("special");
    if (!block.rollout.rowAt.has(place)) token.classList.add("tool");
    if (block.rollout.ends.has(place)) { token.classList.add("stop"); token.title = "the end-of-turn token"; }
    return token;
  });
  block.text.append(...block.tokens);
  paint(block);
}

function paint(block) {
  if (!block.tokens) return;
  const { rollout, tokens } = block, key = state.mode.key, values = rollout[key];
  rollout.rowAt.forEach((row, place) => {
    const style = tokens[place].style;
    let colour = state.mode.colour, weight = 0;
    if (state.mode.labels) { const label = labelOf(state.mode, values[row]); colour = label.colour; weight = label.faint ? 12 : 55; }
    else if (key === "k") weight = values[row] ? 38 : 0;
    // The square root raises small values: most are far below the scale's end.
    else if (values) weight = 70 * Math.sqrt(Math.min(1, (values[row] || 0) / data.scale[key]));
    style.setProperty("--hue", colour);
    style.setProperty("--weight", weight.toFixed(1));
    tokens[place].classList.toggle("dropped", key === "k" && !values[row]);
  });
}

function arrange() {
  const order = byId("order").value, show = byId("show").value, find = byId("find").value.toLowerCase();
  const fits = ({ rollout }) => (show === "all" || (show === "cut" ? rollout.truncated : show === "right" ? rollout.reward > 0 : rollout.reward === 0))
    && (!find || (rollout.lower ??= `${rollout.prompt || ""}${rollout.text}`.toLowerCase()).includes(find));
  const rank = { id: (r) => r.id, r: (r) => -mean(r.r), h: (r) => -mean(r.h), long: (r) => -r.ids.length }[order];
  state.blocks.sort((a, b) => rank(a.rollout) - rank(b.rollout) || a.index - b.index);
  for (const block of state.blocks) { block.node.hidden = !fits(block); byId("rollouts").append(block.node); }
  byId("empty").hidden = state.blocks.some((block) => !block.node.hidden);
}

// ---- pointing and keys --------------------------------------------------------------------------------------------
function show(block, place, held) {
  if (state.here) state.here.block.tokens[state.here.place].classList.remove("here", "held");
  fill(block);
  Object.assign(state, { here: { block, place }, held });
  block.tokens[place].classList.add(held ? "held" : "here");
  describe(block, place);
}

function stepTo(block, place) {
  show(block, place, state.held);
  block.tokens[place].scrollIntoView({ block: "nearest" });
}

function goTo(index, place) {
  const block = state.blocks.find((b) => b.index === index);
  if (block.node.hidden) { byId("show").value = "all"; byId("find").value = ""; arrange(); }
  fill(block);
  show(block, place, true);
  block.tokens[place].scrollIntoView({ block: "center" });
  block.text.focus({ preventScroll: true });
}

function neighbour(block, step) {
  const shown = state.blocks.filter((b) => !b.node.hidden);
  return shown[shown.indexOf(block) + step];
}

function keyboard(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], select");
  if (!typing && /^[1-9]$/.test(event.key) && MODES[event.key - 1]) {
    byId("modes").querySelectorAll("input")[event.key - 1].click();
  } else if (!typing && event.key === "/") {
    byId("find").focus();
  } else if (event.target.classList.contains("text") && state.here) {
    const { block, place } = state.here, move = { ArrowRight: 1, ArrowLeft: -1 }[event.key], jump = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (move && block.tokens[place + move]) stepTo(block, place + move);
    else if (jump && neighbour(block, jump)) { const next = neighbour(block, jump); fill(next); stepTo(next, 0); next.text.focus({ preventScroll: true }); }
    else if (event.key === "Enter") show(block, place, !state.held);
    else if (event.key === "Escape") show(block, place, false);
    else return;
  } else return;
  event.preventDefault();
}

function pointer() {
  const find = (event) => {
    const token = event.target.closest(".token");
    return token && [state.blocks.find((b) => b.node.contains(token)), Number(token.dataset.place)];
  };
  byId("rollouts").addEventListener("mouseover", (event) => { const at = find(event); if (at && !state.held) show(...at, false); });
  byId("rollouts").addEventListener("click", (event) => {
    const at = find(event);
    if (at) show(...at, !(state.held && state.here.block === at[0] && state.here.place === at[1]));
  });
}

header();
exampleCards();
modeControls();
legend();
listControls();
state.blocks = data.rollouts.map(build);
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) fill(state.blocks.find((b) => b.node === entry.target));
}, { rootMargin: "800px" });
arrange();
state.blocks.forEach((block) => watcher.observe(block.node));
pointer();
const bar = new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${byId("controls").offsetHeight}px`));
bar.observe(byId("controls"));
document.addEventListener("keydown", keyboard);
byId("detail").classList.add("idle");
byId("detail").append(make("p", "", "Hover over a token, or click to pin it here: entropy, both divergences, and what both models would have written."));
keysHelp(byId("detail"));
