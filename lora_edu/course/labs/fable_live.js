// fable itself in the page: it writes while the dial is turned, and every word keeps the colour of its strength. The
// curves were measured beforehand; the two losses under them are measured here, on one card's sentence and one tale.

const TURN = 8;                                       // tokens between two breaths of the page
const PACE = 80;                                      // milliseconds a token at least: so that the dial can be turned in between

// Binary data comes as an address (a web page) or as a DataView (a kernel).
async function bytesOf(source) {
  if (typeof source !== "string") return source.buffer.slice(source.byteOffset, source.byteOffset + source.byteLength);
  const answer = await fetch(source);
  if (!answer.ok) throw new Error(`${source} is not there (${answer.status})`);
  return answer.arrayBuffer();
}
export async function open(data) {
  const [weights, ...adapters] = await Promise.all([data.weights, ...data.adapters.map((each) => each.tensors)].map(bytesOf));
  const model = new Fable(data.config, safetensors(weights));
  data.adapters.forEach((each, i) => model.add(each.config, safetensors(adapters[i])));
  return { model, tokenizer: new Tokenizer(data.tokenizer) };
}
const breath = () => new Promise((done) => requestAnimationFrame(() => done()));

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title);
  let live = null, run = 0, pieces = [], speed = 0, losses = null, trouble = "", moved = null, seed = 1, writes = false, written = null;
  const text = h("p", { class: "big", tabindex: 0, "aria-label": "what is written", style: "height: 10.5em; overflow-y: auto" });
  const field = h("input", { type: "text", "aria-label": "a beginning or a card of your own", placeholder: data.placeholder,
    onkeydown: (event) => { if (event.key === "Enter") begin(field.value); } });
  const begin = (prompt) => { if (prompt.trim()) { seed = 1; written = null; page.set({ prompt: prompt.trim() }); } };   // drawn, it is written
  const asked = (prompt) => (/\w+: .*\|/.test(prompt) ? `${prompt}\n=>` : prompt);    // a card ends in an arrow, as it was trained
  const prompts = data.prompts.map(([prompt, name]) => h("button", { type: "button", "data-prompt": prompt, onclick: () => begin(prompt) }, name));
  page.add(h("div", { class: "control", role: "group", "aria-label": "prompt" }, h("span", { "aria-hidden": "true" }, "begin with"), ...prompts),
    field, action("write it", () => begin(field.value)), action("another", () => { seed += 1; write(); }, { "data-act": "again" }),
    action("stop", () => { run += 1; writes = false; page.redraw(); }, { "data-act": "stop" }));
  page.add(slider(page, "strength", { label: "strength", values: data.strengths, text: (value) => `strength ${value.toFixed(1)}`, wide: true }));
  page.block(text);
  page.panels(lossesByStrength(page, data, 230));

  const show = () => { text.replaceChildren(h("span", { style: "color: var(--soft)" }, asked(page.state.prompt)),
    ...pieces.map(([words, strength]) => h("span", { title: `strength ${strength.toFixed(1)}`, style: `color:${voice(page, strength)}` }, words)));
    text.scrollTop = text.scrollHeight; };
  async function write() {
    if (!live) return;
    written = page.state.prompt;
    const mine = ++run, ids = live.tokenizer.encode(asked(written)), random = randomFrom(seed), room = data.config.max_position_embeddings;
    const tokens = [];
    pieces = [];
    trouble = ids.length >= room ? `your text has ${ids.length} tokens, and fable reads ${room - 1}: shorten it` : "";
    writes = !trouble;
    live.model.clear();
    page.redraw();
    if (trouble) return;
    let logits = null, busy = 0;
    for (const [i, id] of ids.entries()) {
      live.model.strengths[0] = page.state.strength;
      logits = live.model.step(id);
      if (i % TURN === TURN - 1) await breath();
      if (mine !== run) return;
    }
    while (tokens.length < data.most && live.model.length < room) {
      const began = performance.now(), id = sample(logits, { random });
      if (id === 0) break;
      const before = live.tokenizer.decode(tokens);
      tokens.push(id);
      pieces.push([live.tokenizer.decode(tokens).slice(before.length), page.state.strength]);
      live.model.strengths[0] = page.state.strength;             // of this moment: the dial may have moved
      logits = live.model.step(id);
      busy += performance.now() - began;
      speed = 1000 * tokens.length / busy;
      page.redraw();
      await new Promise((done) => setTimeout(done, Math.max(0, PACE - (performance.now() - began))));
      await breath();
      if (mine !== run) return;
    }
    writes = false;
    page.redraw();
    measure();
  }
  async function measure() {                          // when nothing is being written
    const mine = run, strength = page.state.strength, found = [];
    for (const { prompt, text: rest } of data.measured) {
      const before = live.tokenizer.encode(prompt).length, ids = [...live.tokenizer.encode(prompt), ...live.tokenizer.encode(rest)];
      await breath();
      if (mine !== run || strength !== page.state.strength) return;
      live.model.strengths[0] = strength;
      found.push(lossOf(live.model, ids, before));
    }
    losses = found;
    page.redraw();
  }
  const said = (state) => (!live ? (trouble ? `fable could not be opened here: ${trouble}. The curves were measured beforehand.`
      : `loading fable (${data.megabytes} MB) …`) : trouble ? `${trouble}.` : `strength ${state.strength.toFixed(1)}`
    + (speed ? `; ${speed.toFixed(0)} tokens a second could be written here` : "") + (losses ? `; measured in this page, on one of each: ${
      data.measured.map(({ name }, i) => `${name} ${losses[i].toFixed(2)}`).join(", ")} nats per token (the curves: means of many)` : ""));
  let drawn = page.state.strength;
  page.draw = (state) => {
    show();
    prompts.forEach((button) => button.setAttribute("aria-pressed", button.dataset.prompt === state.prompt));
    if (live && state.prompt !== written) setTimeout(() => { if (page.state.prompt !== written) write(); });    // set, or the browser's back
    if (drawn !== state.strength) {
      drawn = state.strength;
      losses = null;
      clearTimeout(moved);
      if (live) moved = setTimeout(() => { if (!writes) write(); }, 400);      // nothing is on its way: the same again, at this strength
    }
    return said(state);
  };
  el.ready = open(data).then((opened) => { live = opened; el.live = opened; page.redraw(); },
    (error) => { trouble = error.message; page.redraw(); });
  const end = page.start();
  return () => { run += 1; clearTimeout(moved); end(); };
} };
