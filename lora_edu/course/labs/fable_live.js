// fable itself in the page: it writes while the dial is turned, and every word keeps the colour of its strength. The
// curves were measured beforehand; the two losses under them are measured here, on one card's sentence and one tale.

const TURN = 8;                                       // tokens between two breaths of the page

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
  let live = null, run = 0, pieces = [], speed = 0, losses = null, trouble = "", measuring = null;
  const text = h("p", { class: "big", tabindex: 0, "aria-label": "what is written", style: "height: 10.5em; overflow-y: auto" });
  const field = h("input", { type: "text", "aria-label": "a beginning or a card of your own", placeholder: data.placeholder,
    onkeydown: (event) => { if (event.key === "Enter") begin(field.value); } });
  const begin = (prompt) => { if (prompt.trim()) { page.set({ prompt: prompt.trim() }); write(); } };
  const asked = (prompt) => (/\w+: .*\|/.test(prompt) ? `${prompt}\n=>` : prompt);    // a card ends in an arrow, as it was trained
  page.add(h("div", { class: "control", role: "group", "aria-label": "prompt" }, h("span", { "aria-hidden": "true" }, "begin with"),
    ...data.prompts.map(([prompt, name]) => h("button", { type: "button", "data-prompt": prompt, onclick: () => begin(prompt) }, name))),
  field, action("write it", () => begin(field.value)), action("again", () => write(), { "data-act": "again" }),
  action("stop", () => { run += 1; page.redraw(); }, { "data-act": "stop" }));
  page.add(slider(page, "strength", { label: "strength", values: data.strengths, text: (value) => `strength ${value.toFixed(1)}`, wide: true }));
  page.block(text);
  page.panels(lossesByStrength(page, data, 230));

  const show = () => { text.replaceChildren(h("span", { style: "color: var(--soft)" }, asked(page.state.prompt)),
    ...pieces.map(([words, strength]) => h("span", { title: `strength ${strength.toFixed(1)}`, style: `color:${voice(page, strength)}` }, words)));
    text.scrollTop = text.scrollHeight; };
  async function write() {
    const mine = ++run, ids = live && live.tokenizer.encode(asked(page.state.prompt)), random = randomFrom(1);
    if (!live) return;
    live.model.clear();
    pieces = [];
    let logits, began = performance.now(), made = 0;
    const tokens = [];
    try {
      for (const [i, id] of ids.entries()) {
        live.model.strengths[0] = page.state.strength;
        logits = live.model.step(id);
        if (i % TURN === TURN - 1) await breath();
        if (mine !== run) return;
      }
      began = performance.now();
      while (tokens.length < data.most && live.model.length < data.config.max_position_embeddings) {
        const id = sample(logits, { random });
        if (id === 0) break;
        const before = live.tokenizer.decode(tokens);
        tokens.push(id);
        pieces.push([live.tokenizer.decode(tokens).slice(before.length), page.state.strength]);
        live.model.strengths[0] = page.state.strength;             // of this moment: the dial may have moved
        logits = live.model.step(id);
        made += 1;
        if (made % 2 === 0) { speed = 1000 * made / (performance.now() - began); page.redraw(); await breath(); }
        if (mine !== run) return;
      }
    } catch (error) { trouble = error.message; }
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
  const said = (state) => (trouble ? `fable could not be opened here: ${trouble}. The curves were measured beforehand.`
    : !live ? `loading fable (${data.megabytes} MB) …` : `strength ${state.strength.toFixed(1)}` + (speed ? `; ${speed.toFixed(0)} tokens a second` : "")
      + (losses ? `; measured in this page: ${data.measured.map(({ name }, i) => `${name} ${losses[i].toFixed(2)}`).join(", ")} nats per token` : ""));
  let drawn = null;
  page.draw = (state) => {
    show();
    if (live && drawn !== state.strength) {
      drawn = state.strength;
      losses = null;
      clearTimeout(measuring);
      measuring = setTimeout(() => { if (live.model.length === 0 || pieces.length === 0) measure(); }, 300);
    }
    return said(state);
  };
  el.ready = open(data).then((opened) => { live = opened; el.live = opened; page.redraw(); write(); },
    (error) => { trouble = error.message; page.redraw(); });
  const end = page.start();
  return () => { run += 1; clearTimeout(measuring); end(); };
} };
