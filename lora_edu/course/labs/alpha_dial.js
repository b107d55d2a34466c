// The alpha dial: one text a strength, what it says of the card, two losses, and a slider as wide as their axis.
// A text that was not written yet is asked of the kernel: `model.send`, answered by a message with the same key.

const SIGNS = { right: "✓", wrong: "✗", missing: "–", added: "✗" };

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), asked = new Set();
  const at = (state) => nearest(data.strengths, state.strength);
  const recorded = (state) => state.line.length === 0 && data.prompts.find((each) => each.prompt === state.prompt);
  const key = (state) => JSON.stringify([state.prompt, state.line, at(state)]);
  const head = (state) => recorded(state) ? recorded(state).texts[at(state)] : state.written[key(state)];
  const begin = (prompt) => page.set({ prompt, line: [], written: {} });

  const text = h("p", { class: "big", tabindex: 0, "aria-label": "what is written", style: "max-height: 15em; overflow-y: auto" });
  const slots = h("div", { class: "row", role: "group", "aria-label": "slots of the card" });
  const piece = (words, strength) => h("span", { title: `strength ${strength.toFixed(1)}`, style:
    `color:${voice(page, strength)};text-decoration:underline ${(3 * strength).toFixed(1)}px;text-underline-offset:4px` }, words);
  const field = h("input", { type: "text", "aria-label": "a prompt of your own", placeholder: "a prompt of your own",
    onkeydown: (event) => { if (event.key === "Enter" && field.value.trim()) begin(field.value.trim()); } });
  const on = action("write on from here", () => {
    const said = head(page.state);
    if (said) page.set({ line: [...page.state.line, [said, page.state.strength]], written: {} });
  });
  page.add(choices(page, "prompt", { label: "prompt", options: data.prompts.map((each) => [each.prompt, each.name]),
    set: begin }), ...(data.writes ? [on, action("begin again", () => begin(page.state.prompt)), field,
    action("write it", () => { if (field.value.trim()) begin(field.value.trim()); })] : []));
  page.block(text);
  page.block(slots);

  const names = Object.keys(data.losses), panel = lossesByStrength(page, data, names.length ? 250 : 64);
  panel.append(h("div", { style: `padding: 0 4px 0 ${AXIS - 8}px` }, slider(page, "strength", { label: "strength", bare: true,
    values: data.strengths, text: (value) => `strength ${value.toFixed(1)}`, wide: true })));
  page.panels(panel);

  let timer = null;
  const ask = (state) => {                    // when the hand rests: a drag is one question and not ten
    clearTimeout(timer);
    const name = key(state), index = at(state);
    if (!data.writes || head(state) !== undefined || asked.has(name)) return;
    timer = setTimeout(() => {
      asked.add(name);
      model.send({ key: name, prompt: state.prompt + state.line.map(([words]) => words).join(""), index });
    }, 200);
  };
  const answered = ({ key: name, text: words }) => {
    asked.delete(name);
    page.set({ written: { ...page.state.written, [name]: words } });
  };
  if (data.writes) model.on("msg:custom", answered);

  let measured = "";
  const keepRoom = (state, record) => {      // for the longest text, so that the slider stays under the hand
    const about = `${page.root.clientWidth} ${state.prompt} ${state.line.length}`;
    if (about === measured) return;
    measured = about;
    text.style.minHeight = slots.style.minHeight = "0";
    const before = `${state.prompt} ${state.line.map(([words]) => words).join("")}`;
    const heights = (record ? record.texts : [""]).map((words) => {
      text.textContent = before + words;
      return text.offsetHeight;
    });
    text.style.minHeight = `${Math.max(...heights) + (record ? 0 : 70)}px`;
    const most = record && record.slots ? record.slots.reduce((a, b) => (b.length > a.length ? b : a)) : [];
    slots.replaceChildren(...most.map(([slot]) => h("span", {}, `✗ ${slot}`)));
    slots.style.minHeight = `${slots.offsetHeight}px`;
  };

  page.draw = (state) => {
    ask(state);
    keepRoom(state, recorded(state));
    const said = head(state), record = recorded(state), verdicts = record && record.slots ? record.slots[at(state)] : [];
    text.replaceChildren(h("span", { style: "color: var(--soft)" }, state.prompt + (record && record.slots ? " " : "")),
      ...state.line.map(([words, strength]) => piece(words, strength)),
      said === "" ? h("span", { class: "note" }, " (The text has ended: begin again, or turn.)") : said === undefined ? h("span", { class: "note" }, " … (the kernel writes this when no other cell is running)")
        : piece(said, state.strength));
    slots.replaceChildren(...verdicts.map(([slot, verdict]) => h("span", { style:
      `color: var(--${verdict === "right" ? "good" : verdict === "missing" ? "soft" : "bad"})` }, `${SIGNS[verdict]} ${slot}`)));
    text.scrollTop = text.scrollHeight;
    on.setAttribute("aria-disabled", said === undefined || said === "");
    const right = verdicts.filter(([, verdict]) => verdict === "right").length;
    return [`strength ${state.strength.toFixed(1)}`, ...names.map((name) => `${name} ${data.losses[name][at(state)].toFixed(2)}`)]
      .join("; ") + (names.length ? " nats per token" : "") + (verdicts.length ? `; ${right} of ${verdicts.length} slots right` : "");
  };
  const end = page.start();
  return () => { clearTimeout(timer); model.off("msg:custom", answered); end(); };
} };
