// The memory calculator: `bill` of lora_edu/measure/memory.py, line for line, and what it fits on. A test compares the
// two on random settings, to the byte.

const UNITS = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "bytes"]];
export function units(bytes) {
  const [size, unit] = UNITS.find(([each]) => bytes >= each) ?? UNITS.at(-1);
  const value = bytes / size;
  return `${number(value, unit === "bytes" || value >= 100 ? 0 : value >= 10 ? 1 : 2)} ${unit}`;
}

// What one block keeps for the backward pass, in bytes; `adapted` is null where all of it trains.
export function kept(sizes, N, adapted, rank, act, factor, first) {
  const { hidden: C, wide: F, heads, head_dim: D, matrices } = sizes, gpt2 = sizes.kind === "gpt2", full = adapted === null;
  const [attention, out, inputs, down] = gpt2 ? [["attn.c_attn"], "attn.c_proj", ["mlp.c_fc"], "mlp.c_proj"]
    : [["q_proj", "k_proj", "v_proj"], "o_proj", ["gate_proj", "up_proj"], "down_proj"];
  let bytes = 0;
  const keep = (needed, numbers, each = act) => { if (needed) bytes += numbers * each; };
  const trains = (...names) => full || names.some((name) => adapted.includes(name));
  const read = (names, numbers, there = false) => {
    if (full || factor === act) return keep(trains(...names) && !there, numbers);
    const copies = names.filter((name) => adapted.includes(name)).length;
    keep(copies > 0, copies * numbers, factor);
  };
  const norm = (flows) => {
    keep(flows, gpt2 ? N * C : N * C + N, gpt2 ? act : 4);
    if (gpt2) keep(flows, 2 * N, 4); else keep(full, N * C);
  };
  let flows = full || !first;
  norm(flows);
  read(attention, N * C);
  const attends = flows || trains(...attention);
  keep(attends, 4 * N * heads * D);
  keep(attends, N * heads, 4);
  read([out], N * heads * D, attends);
  flows = attends || trains(out);
  norm(flows);
  read(inputs, N * C);
  if (gpt2) keep(flows || trains(...inputs), 4 * N * F);
  else {
    keep(flows || trains("gate_proj"), 2 * N * F);
    keep(flows || trains("up_proj"), N * F);
  }
  read([down], N * F);
  for (const name of adapted ?? []) keep(true, N * rank + rank * matrices[name][0], factor);
  return bytes;
}

function outside(sizes, batch, length, full, act) {
  const { hidden: C, head_dim: D, vocab: V } = sizes, N = batch * length, loss = N * V * 4 + N * 8 + 4;
  return sizes.kind === "gpt2" ? loss + N * C * act + 2 * N * 4 + (full ? N * 8 + length * 8 + N * C * act : 0)
    : loss + 2 * length * D * act + (N * C + N) * 4 + (full ? N * 8 + 2 * N * C * act : 0);
}

// Bytes by category. rules: { recipes: { name: [frozen, other, trained, ...] }, optimizers: { name: [states, bytes or null] } }.
export function bill(sizes, { method, rank, targets, recipe, optimizer, batch, length, checkpointing }, rules) {
  const [frozen, other, trained, gradient, master, state, adapterBytes, act] = rules.recipes[recipe];
  const full = method === "full", { parameters: P, linear } = sizes, N = batch * length, [states, each] = rules.optimizers[optimizer];
  const adapted = full ? null : sizes.targets[targets];
  const trainable = full ? P : sizes.layers * adapted.reduce((sum, name) =>
    sum + rank * (sizes.matrices[name][0] + sizes.matrices[name][1]), 0);
  const block = (first) => kept(sizes, N, adapted, rank, act, adapterBytes, first);
  const again = checkpointing ? block(false) : 0, one = N * sizes.hidden * act;
  const activations = outside(sizes, batch, length, full, act) + (checkpointing ? sizes.layers * one
    : block(!full) + (sizes.layers - 1) * block(false));
  const temporary = Math.max(8 * N * sizes.vocab, again);
  const parts = {
    "weights": full ? P * trained : linear * frozen + (P - linear) * other,
    "adapter": full ? 0 : trainable * adapterBytes,
    "gradients": trainable * (full ? gradient : adapterBytes),
    "optimizer states": trainable * (states * (each ?? (full ? state : adapterBytes)) + (full ? master : 0)),
    activations, temporary, "allocator (an allowance)": 0.05 * (activations + temporary) };
  return { parts, trainable, total: Object.values(parts).reduce((a, b) => a + b) };
}

// The largest batch whose bill is within so many bytes; 0 if a batch of one is not.
export function largestBatch(sizes, settings, rules, bytes) {
  const fits = (batch) => bill(sizes, { ...settings, batch }, rules).total <= bytes;
  let low = 0, high = 1;
  while (fits(high) && high < 2 ** 20) [low, high] = [high, 2 * high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (fits(middle)) low = middle; else high = middle;
  }
  return low;
}

const FILLS = ["var(--c5)", "var(--ink)", "var(--c1)", "var(--c3)", "var(--c2)", "var(--c4)", "var(--rule)"];

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), { rules, cards } = data;
  const sizesOf = (state) => data.models[state.model];
  const billOf = (state) => bill(sizesOf(state), state, rules);
  const nameOf = (state) => `${state.model}, ${state.method}${state.method === "lora" ? ` r ${state.rank} on ${state.targets}` : ""}, ` +
    `${state.recipe}, ${state.optimizer}, ${state.batch} × ${number(state.length)}${state.checkpointing ? ", checkpointing" : ""}`;
  const ranksOf = (state) => {                              // up to the smallest side of a target
    const { matrices, targets } = sizesOf(state);
    return data.ranks.filter((rank) => rank <= Math.min(...targets[state.targets].flatMap((name) => matrices[name])));
  };
  const four = (recipe) => recipe.startsWith("nf4");
  page.fit = (next) => {                                    // a model that cannot have the setting gets the nearest
    const targets = next.targets in sizesOf(next).targets ? next.targets : "attention";
    return { targets, length: Math.min(next.length, sizesOf(next).context),
      rank: ranksOf({ ...next, targets }).findLast((rank) => rank <= next.rank) };
  };
  page.add(pick(page, "model", { label: "model", options: Object.keys(data.models).map((name) => [name, name]) }),
    choices(page, "method", { label: "method", options: [["lora", "lora"], ["full", "full"]],
      why: (method, state) => method === "full" && four(state.recipe) ? "Four bits do not train in full: choose another recipe." : "" }),
    slider(page, "rank", { label: "rank r", values: ranksOf, text: (rank) => `rank ${rank}`, locked: (state) => state.method === "full" }));
  page.add(choices(page, "targets", { label: "targets", options: data.targets.map((name) => [name, name]),
    why: (name, state) => name in sizesOf(state).targets ? "" : "GPT-2 keeps queries, keys and values in one matrix." }));
  page.add(choices(page, "recipe", { label: "recipe", options: Object.keys(rules.recipes).map((name) => [name, name]),
    why: (recipe, state) => state.method === "full" && four(recipe) ? "Four bits do not train: LoRA only." : "" }),
    choices(page, "optimizer", { label: "optimizer", options: Object.keys(rules.optimizers).map((name) => [name, name]) }));
  page.add(slider(page, "batch", { label: "batch", values: data.batches, text: (batch) => `${batch} text${batch === 1 ? "" : "s"}` }),
    slider(page, "length", { label: "length", values: (state) => {
      const most = Math.min(sizesOf(state).context, data.lengths.at(-1));
      return data.lengths.filter((length) => length < most).concat(most);
    }, text: (length) => `${number(length)} tokens` }),
    check(page, "checkpointing", { label: "checkpointing" }));
  const card = h("input", { type: "number", min: 1, max: 10000, "aria-label": "my card has, in GB", "data-name": "card",
    oninput: () => { if (possible()) page.set({ card: +card.value }); else page.redraw(); }, onblur: () => page.redraw() });
  const possible = () => +card.value > 0 && +card.value <= 10000, wrong = h("span", { class: "note" });
  page.shown.push((state) => {
    if (document.activeElement !== card) card.value = state.card;
    wrong.textContent = possible() ? "" : `a number up to 10,000, please; counted is with ${state.card}`;
  });
  page.add(h("div", { class: "control" }, "my card has", card, "GB", wrong),
    action("pin this as A", () => page.set({ pinned: { ...page.state, pinned: null } })),
    action("unpin", () => page.set({ pinned: null })));

  const rows = (state) => [...(state.pinned ? [["A", state.pinned]] : []), [state.pinned ? "B" : "", state]];
  page.panels(chart(page, { height: 170, title: (state) => rows(state).map(([name, its]) =>
      `${name ? `${name}: ` : ""}${nameOf(its)}: ${units(billOf(its).total)}`).join("\n"),
    keys: () => data.parts.map((part, i) => [part, { fill: FILLS[i] }]),
    describe: (state) => rows(state).map(([name, its]) => `${name} ${nameOf(its)}: ${units(billOf(its).total)}`).join("; "),
    draw: (svg, width, height, state) => {
      const bills = rows(state).map(([name, its]) => [name, billOf(its)]), most = Math.max(...bills.map(([, its]) => its.total));
      const [unit, word] = UNITS.find(([each]) => most >= each), all = [...cards.map(([name, gb]) => [name, gb * 1e9]), ["my card", state.card * 1e9]];
      const next = Math.min(...all.map(([, bytes]) => bytes).filter((bytes) => bytes >= most)) ;
      const right = 1.06 * (next < 3 * most ? next : most) / unit;
      const plot = axes(svg, width, height, { x: [0, right], y: [0, 1], yticks: [], ylabel: "", xlabel: word, left: state.pinned ? 24 : 10 });
      const high = (plot.bottom - plot.top - 24) / bills.length;
      bills.forEach(([name, its], row) => {
        const y = plot.top + 20 + row * high;
        let from = 0;
        if (name) svg.append(s("text", { x: 2, y: y + high / 2, "font-weight": "600" }, name));
        data.parts.forEach((part, i) => {
          const to = from + its.parts[part] / unit;
          svg.append(s("rect", { x: plot.X(from), y, width: Math.max(plot.X(to) - plot.X(from) - 1, 0), height: high - 6, fill: FILLS[i] },
            s("title", {}, `${part}: ${units(its.parts[part])}`)));
          from = to;
        });
      });
      const free = [-Infinity, -Infinity, -Infinity];         // a name that would cover its neighbour's stands a line up, or two
      for (const [name, bytes] of all.filter(([, each]) => each / unit < right).sort((a, b) => a[1] - b[1])) {
        const x = plot.X(bytes / unit), text = `${name} ${bytes / 1e9}`, left = Math.min(x, width - 7 * text.length);
        const row = Math.max(0, free.findIndex((each) => left >= each)), up = 12 * row;
        svg.append(s("path", { d: `M${x} ${plot.bottom}V${plot.top - up}`, stroke: name === "my card" ? "var(--c1)" : "var(--ink)",
          "stroke-width": name === "my card" ? 3 : 1, "stroke-dasharray": name === "my card" ? "" : "3 3" }),
          s("text", { x: left, y: plot.top + 12 - up, dx: 3 }, text));
        free[row] = left + 7 * text.length;
      }
    } }));
  page.draw = (state) => {
    const said = billOf(state), room = cards.filter(([, gb]) => said.total <= gb * 1e9), most = largestBatch(sizesOf(state), state, rules, state.card * 1e9);
    return `${state.model}: ${number(sizesOf(state).parameters)} parameters; ${number(said.trainable)} numbers train.\n` +
      `${Object.entries(said.parts).filter(([, bytes]) => bytes).map(([part, bytes]) => `${part} ${units(bytes)}`).join(", ")}; ` +
      `total ${units(said.total)} = ${number(Math.round(said.total))} bytes\n` +
      (room.length ? `fits on: ${room.map(([name, gb]) => `${name} (${gb} GB)`).join(", ")}`
        : `fits on none of these cards: ${number(said.total / 80e9, 1)} times an 80 GB card`) +
      `; the largest batch that fits your ${state.card} GB: ${most ? number(most) : "none, not even one text"}`;
  };
  return page.start();
} };
