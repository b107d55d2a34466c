// What every lab is drawn with. `lab.py` puts this file before a lab's own, so that each module is whole: no import,
// no build step. A page has one state; whatever moves sets a part of it, and everything is drawn anew from it.
// Read `lab` first, then `slider`: the other controls are made in the same way.

const CSS = `
.lora-lab { --ink: var(--jp-content-font-color1, #1f1f1f); --soft: #5a5a5a; --rule: #767676; --faint: #d9d9d9;
  --face: #ffffff; --c0: #0072B2; --c1: #B34A00; --c2: #007a58; --c3: #8a5f00; --c4: #a3457f; --c5: #2a7fae;
  --c6: #000000; --good: #007a58; --bad: #B34A00; color: var(--ink); font: 14px/1.45 system-ui, sans-serif;
  box-sizing: border-box; width: 100%; max-width: 980px; padding: 4px 6px 8px; overflow: hidden; }
.lora-lab.dark { --ink: var(--jp-content-font-color1, #ececec); --soft: #b8b8b8; --rule: #8f8f8f; --faint: #4a4a4a;
  --face: #1e1e1e; --c0: #56B4E9; --c1: #FF9A52; --c2: #35cfa0; --c3: #E6B422; --c4: #E59AC4; --c5: #9CD3F2;
  --c6: #ffffff; --good: #35cfa0; --bad: #FF9A52; }
.lora-lab * { box-sizing: border-box; }
.lora-lab .row { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; margin: 4px 0; --bs-gutter-x: 0; --bs-gutter-y: 0; }
.lora-lab .row > * { width: auto; }
.lora-lab .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 10px 18px; }
.lora-lab .panel { min-width: 0; } .lora-lab .panel svg { display: block; width: 100%; overflow: visible; }
.lora-lab .title { font-weight: 600; margin: 4px 0 0; white-space: pre-line; } .lora-lab .note { color: var(--soft); font-size: 13px; }
.lora-lab .control { display: inline-flex; flex-wrap: wrap; gap: 4px 8px; align-items: center; min-width: 0; }
.lora-lab .control.wide { display: flex; flex-wrap: nowrap; flex: 1 1 100%; }
.lora-lab .control.line { flex-wrap: nowrap; flex: 0 1 310px; }
.lora-lab input[type=range] { flex: 1 1 150px; min-width: 110px; height: 24px; margin: 0; accent-color: var(--c0); }
.lora-lab .value { min-width: 4.5em; white-space: nowrap; font-variant-numeric: tabular-nums; }
.lora-lab button, .lora-lab select, .lora-lab input[type=text], .lora-lab input[type=number] { font: inherit;
  color: var(--ink); background: var(--face); border: 1px solid var(--rule); border-radius: 4px; padding: 3px 9px;
  min-height: 28px; max-width: 100%; cursor: pointer; }
.lora-lab input[type=text] { flex: 1 1 220px; cursor: text; } .lora-lab input[type=number] { width: 6em; }
.lora-lab button[aria-pressed=true] { background: var(--ink); color: var(--face); border-color: var(--ink); font-weight: 600; }
.lora-lab button[aria-disabled=true] { color: var(--soft); background: var(--face); border-style: dashed; cursor: not-allowed; }
.lora-lab :focus-visible { outline: 3px solid var(--c1); outline-offset: 2px; }
.lora-lab .say { white-space: pre-wrap; margin: 6px 0 0; }
.lora-lab .big { font-size: 1.45em; line-height: 1.5; max-width: 42em; white-space: pre-wrap; margin: 6px 0; }
.lora-lab .quiet { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.lora-lab text { fill: var(--ink); font: 12px system-ui, sans-serif; } .lora-lab .key svg { width: 26px; height: 12px; }
.lora-lab .key { display: inline-flex; gap: 5px; align-items: center; font-size: 13px; }`;

const LOOKS = ["c0", "c1", "c2", "c3", "c4", "c5", "c6"].map((c, i) => ({ color: `var(--${c})`,
  dash: ["", "7 3", "8 3 2 3", "2 3", "10 3 2 3 2 3", "4 4", "1 2"][i], mark: "osdtvpx"[i] }));

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const h = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const number = (value, digits = 0) => value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e9) return size >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M` : `${+(value / 1e3).toPrecision(3)}k`;
  return size === 0 ? "0" : size >= 1e9 || size < 1e-3 ? value.toExponential(1).replace(".0e", "e").replace("e+", "e")
    : String(+value.toPrecision(3));
};
const percent = (share, digits = 0) => `${number(100 * share, digits)}%`;

// One page: what is on it, its state, and how it is drawn. `draw` (set by the lab) returns the sentence of the state;
// `fit(next, changes)`, where a lab has one, gives what else must change with them.
function lab(model, el, name) {
  const root = h("div", { class: "lora-lab", role: "group", "aria-label": name, "data-lm-suppress-shortcuts": "true",
    onkeydown: (event) => event.stopPropagation() });        // an arrow key moves the control, and not the notebook
  const say = h("p", { class: "say" }), quiet = h("div", { class: "quiet", role: "status", "aria-live": "polite" });
  const page = { root, state: { ...model.get("state") }, shown: [], snap: {}, draw: () => "", fit: () => ({}) };
  let width = 0, timer = null, spoken = Date.now();
  page.add = (...nodes) => { root.insertBefore(h("div", { class: "row" }, ...nodes), say); };
  page.panels = (...nodes) => { root.insertBefore(h("div", { class: "panels" }, ...nodes), say); };
  page.block = (node) => root.insertBefore(node, say);
  page.set = (changes) => {
    Object.assign(page.state, changes, page.fit({ ...page.state, ...changes }, changes));
    page.redraw();
    model.set("state", { ...page.state });
    model.save_changes();
  };
  page.redraw = () => {
    const text = page.draw(page.state);
    for (const show of page.shown) show(page.state);
    if (say.textContent === text) return;
    say.textContent = text;
    timer ??= setTimeout(() => { timer = null; spoken = Date.now(); quiet.textContent = say.textContent; },
      Math.max(250, 500 - (Date.now() - spoken)));           // spoken at most twice a second
  };
  const tidy = () => {                                 // what an address asks for becomes what its control can say
    for (const name of model.get("asked") ?? []) if (page.snap[name]) page.state[name] = page.snap[name](page.state);
    if ((model.get("asked") ?? []).length) Object.assign(page.state, page.fit(page.state, page.state));
  };
  page.dark = () => root.classList.toggle("dark", isDark(root));
  page.start = () => {
    el.replaceChildren(root);
    page.dark();
    tidy();
    page.redraw();
    const resized = new ResizeObserver(() => { if (root.clientWidth !== width) { width = root.clientWidth; page.redraw(); } });
    const themed = new MutationObserver(() => { page.dark(); page.redraw(); });
    const follow = () => {
      if (JSON.stringify(model.get("state")) === JSON.stringify(page.state)) return;
      page.state = { ...model.get("state") };
      tidy();
      page.redraw();
    };
    resized.observe(root);
    for (const node of [document.documentElement, document.body]) themed.observe(node, { attributes: true,
      attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name", "data-theme", "theme"] });
    model.on("change:state", follow);
    return () => { resized.disconnect(); themed.disconnect(); model.off("change:state", follow); clearTimeout(timer); };
  };
  root.append(h("style", {}, CSS), say, quiet);
  return page;
}

function isDark(node) {
  for (; node; node = node.parentElement) {
    const [r, g, b, a = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) ?? []).map(Number);
    if (a > 0.5) return 0.299 * r + 0.587 * g + 0.114 * b < 128;
  }
  return false;
}

// -- controls: each sets one name of the state, and shows it again when something else has set it ---------------------

function slider(page, name, { label, values, text = String, wide = false, bare = false, locked = () => false }) {
  const offered = (state) => (typeof values === "function" ? values(state) : values);
  const input = h("input", { type: "range", min: 0, step: 1, "aria-label": label, "data-name": name,
    oninput: () => page.set({ [name]: offered(page.state)[+input.value] }) });
  const value = h("span", { class: "value", "aria-hidden": "true" });
  page.snap[name] = (state) => offered(state)[nearest(offered(state), state[name])];
  page.shown.push((state) => {
    input.max = offered(state).length - 1;
    input.value = nearest(offered(state), state[name]);
    input.disabled = locked(state);
    value.textContent = text(state[name]);
    input.setAttribute("aria-valuetext", text(state[name]));
  });
  return h("div", { class: wide ? "control wide" : "control line" }, ...(bare ? [input]
    : [h("span", { "aria-hidden": "true" }, label), input, value]));
}
const known = (name, options) => (state) => (options.some(([value]) => value === state[name]) ? state[name] : options[0][0]);
const nearest = (values, wanted) => values.reduce((best, value, i) =>
  Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best, 0);

// options: [[value, text], ...]; why(value, state): a sentence where the value cannot be, which is then shown.
function choices(page, name, { label, options, why = () => "", set = (value) => page.set({ [name]: value }) }) {
  const note = h("span", { class: "note" });
  page.snap[name] = known(name, options);
  const buttons = options.map(([value, text]) => h("button", { type: "button", "data-name": name, "data-value": value,
    onclick: () => { if (!why(value, page.state)) set(value); } }, text));
  page.shown.push((state) => {
    const reasons = options.map(([value]) => why(value, state));
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", state[name] === options[i][0]);
      button.setAttribute("aria-disabled", reasons[i] !== "");
    });
    note.textContent = [...new Set(reasons.filter((reason) => reason))].join(" ");
  });
  return h("div", { class: "control", role: "group", "aria-label": label },
    h("span", { "aria-hidden": "true" }, label), ...buttons, note);
}

function pick(page, name, { label, options }) {
  const select = h("select", { "aria-label": label, "data-name": name, onchange: () => page.set({ [name]: select.value }) },
    ...options.map(([value, text]) => h("option", { value }, text)));
  page.snap[name] = known(name, options);
  page.shown.push((state) => { select.value = state[name]; });
  return h("div", { class: "control" }, h("span", { "aria-hidden": "true" }, label), select);
}

function check(page, name, { label }) {
  const button = h("button", { type: "button", "data-name": name, onclick: () => page.set({ [name]: !page.state[name] }) }, label);
  page.shown.push((state) => button.setAttribute("aria-pressed", Boolean(state[name])));
  return button;
}

const action = (label, act, attributes = {}) => h("button", { type: "button", onclick: act, ...attributes }, label);

// -- pictures: an svg that is drawn for the room it has -----------------------------------------------------------------

// draw(svg, width, height, state) fills the empty svg; describe(state) says what it shows.
function chart(page, { height, title = () => "", keys = () => [], describe, draw }) {
  const name = h("div", { class: "title" }), legend = h("div", { class: "row" });
  const svg = s("svg", { role: "img" }), panel = h("div", { class: "panel" }, name, legend, svg);
  page.shown.push((state) => {
    const width = Math.max(240, panel.clientWidth || 320);
    name.textContent = title(state);
    legend.replaceChildren(...keys(state).map(([text, look]) => key(text, look)));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.replaceChildren();
    draw(svg, width, height, state);
    svg.setAttribute("aria-label", describe(state));
  });
  return panel;
}
const key = (text, look) => h("span", { class: "key" }, s("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" },
  look.fill ? s("rect", { width: 26, height: 12, fill: look.fill, stroke: look.stroke ?? "none" }) : null,
  look.color ? s("path", { d: "M1 6H25", stroke: look.color, "stroke-dasharray": look.dash ?? "", "stroke-width": look.width ?? 2 }) : null,
  look.mark ? mark(13, 6, look.mark, look.color) : null), text);

// The frame of a plot: places for x and y, ticks, grid and names. log: ticks at the powers that fit.
function axes(svg, width, height, { x, y, xlabel, ylabel, logx = false, logy = false, xticks, yticks, left = 46 }) {
  const place = ([low, high], log, from, to) => (value) => {
    const [a, b, v] = log ? [low, high, Math.max(value, 1e-300)].map(Math.log10) : [low, high, value];
    return from + (to - from) * (v - a) / (b - a);
  };
  const [right, top, bottom] = [width - 12, 20, height - 36];
  const X = place(x, logx, left, right), Y = place(y, logy, bottom, top);
  for (const tick of xticks ?? ticks(x, logx, width / 80)) svg.append(
    s("line", { x1: X(tick), x2: X(tick), y1: top, y2: bottom, stroke: "var(--faint)" }),
    s("text", { x: X(tick), y: bottom + 15, "text-anchor": "middle" }, short(tick)));
  for (const tick of yticks ?? ticks(y, logy, 5)) svg.append(
    s("line", { x1: left, x2: right, y1: Y(tick), y2: Y(tick), stroke: "var(--faint)" }),
    s("text", { x: left - 6, y: Y(tick) + 4, "text-anchor": "end" }, short(tick)));
  svg.value = ([low, high]) => (clientX) => {                // the x of a plot under the pointer, between its ends
    const share = (clientX - svg.getBoundingClientRect().left - left) / (right - left);
    return low + (high - low) * Math.min(Math.max(share, 0), 1);
  };
  svg.append(s("path", { d: `M${left} ${top}V${bottom}H${right}`, fill: "none", stroke: "var(--rule)" }),
    s("text", { x: (left + right) / 2, y: height - 3, "text-anchor": "middle" }, xlabel),
    s("text", { x: 2, y: 11 }, ylabel));
  return { svg, X, Y, left, right, top, bottom };
}

function ticks([low, high], log, about) {
  if (log) {
    const powers = [], step = Math.max(1, Math.ceil((Math.log10(high) - Math.log10(low)) / about));
    for (let p = Math.ceil(Math.log10(low) - 1e-9); p <= Math.log10(high) + 1e-9; p += step) powers.push(10 ** p);
    return powers;
  }
  const raw = (high - low) / about, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((each) => each >= raw - 1e-12);
  return Array.from({ length: Math.floor((high - low) / step + 2) }, (_, i) => (Math.ceil(low / step - 1e-9) + i) * step)
    .filter((tick) => tick <= high + 1e-9 * step).map((tick) => +tick.toPrecision(10));
}

function line({ svg, X, Y }, points, { color, dash = "", width = 2, mark: shape = "", every = 1, opacity = 1 }) {
  const known = points.filter(([, y]) => y !== null && Number.isFinite(y));
  const d = known.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
  svg.append(s("path", { d, fill: "none", stroke: color, "stroke-width": width, "stroke-dasharray": dash, opacity }));
  if (shape) known.forEach(([x, y], i) => { if (i % every === 0) svg.append(mark(X(x), Y(y), shape, color, 4, opacity)); });
}

// While the pointer is down on a picture, `move(event)` follows it.
function draggable(svg, move, begin = () => true) {
  let held = false;
  svg.addEventListener("pointerdown", (event) => { held = begin(event); if (held) { svg.setPointerCapture(event.pointerId); move(event); } });
  svg.addEventListener("pointermove", (event) => { if (held) move(event); });
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { held = false; });
}

function mark(x, y, shape, color, size = 4, opacity = 1) {
  const [a, b] = [size, size * 0.9], paths = { s: `M${-b} ${-b}h${2 * b}v${2 * b}h${-2 * b}z`, d: `M0 ${-a}L${a} 0L0 ${a}L${-a} 0z`,
    t: `M0 ${-a}L${a} ${a}H${-a}z`, v: `M0 ${a}L${a} ${-a}H${-a}z`, p: `M${-a} -1H-1V${-a}H1V-1H${a}V1H1V${a}H-1V1H${-a}z`,
    x: `M${-a} ${-a}L${a} ${a}M${a} ${-a}L${-a} ${a}` };
  return shape === "o" ? s("circle", { cx: x, cy: y, r: size, fill: color, opacity })
    : s("path", { d: paths[shape], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, fill: color, opacity,
      stroke: shape === "x" ? color : "none", "stroke-width": 2 });
}

// A map of cells in colours from dark blue to yellow (cividis), for which `shade(0 … 1)` gives [colour, ink on it].
const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
function shade(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), i = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const rgb = CIVIDIS[i].map((low, c) => Math.round(low + (at - i) * (CIVIDIS[i + 1][c] - low)));
  return [`rgb(${rgb})`, 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 120 ? "#000" : "#fff"];
}
