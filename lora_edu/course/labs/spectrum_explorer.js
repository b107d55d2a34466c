// The spectrum explorer: two updates of one model side by side. A map of their matrices by the rank that holds 90 % of
// the energy; the spectra of the chosen matrix, on which the cut is dragged; what was measured of the model so cut.

export const energy = (sigma) => sigma.reduce((sum, value) => sum + value * value, 0);
export const kept = (sigma, rank) => (energy(sigma) ? energy(sigma.slice(0, rank)) / energy(sigma) : 1);
// The smallest rank that holds the share: 0 where there is no energy.
export function rankFor(sigma, share) {
  const whole = energy(sigma);
  let sum = 0;
  if (!whole) return 0;
  for (let i = 0; i < sigma.length; i++) if ((sum += sigma[i] ** 2) >= share * whole) return i + 1;
  return sigma.length;
}

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), { ranks, layers, matrices, updates } = data;
  const names = Object.keys(updates), most = Math.max(...matrices.map((name) => Math.min(...data.shapes[name])));
  const needs = Object.fromEntries(names.map((name) => [name, Object.fromEntries(Object.entries(updates[name].spectra)
    .map(([place, sigma]) => [place, rankFor(sigma, 0.9)]))]));
  const place = (state) => `${state.layer} ${state.matrix}`, sides = (state) => [state.left, state.right];
  const sigmaOf = (name, state) => updates[name].spectra[place(state)];
  const top = Math.max(...names.flatMap((name) => Object.values(updates[name].spectra).map((sigma) => sigma[0])));

  page.add(choices(page, "left", { label: "left", options: names.map((name) => [name, name]) }));
  page.add(choices(page, "right", { label: "right", options: names.map((name) => [name, name]) }));
  page.add(choices(page, "matrix", { label: "matrix", options: matrices.map((name) => [name, name]) }),
    slider(page, "layer", { label: "layer", values: layers, text: (layer) => `layer ${layer}` }),
    slider(page, "rank", { label: "rank kept", values: ranks, text: (rank) => `rank ${rank}` }));

  const map = (side) => chart(page, { height: 34 + 26 * matrices.length, title: (state) => `${state[side]}: rank for 90% of the energy`,
    describe: (state) => Object.entries(needs[state[side]]).map(([where, rank]) => `${where}: ${rank}`).join("; "),
    draw: (svg, width, height, state) => {
      const left = Math.max(78, 6.6 * Math.max(...matrices.map((name) => name.length)) + 10), wide = (width - left - 4) / layers.length;
      layers.forEach((layer, x) => svg.append(s("text", { x: left + (x + 0.5) * wide, y: height - 4, "text-anchor": "middle" }, layers.length > 6 ? layer : `layer ${layer}`)));
      if (layers.length > 6) svg.append(s("text", { x: left - 6, y: height - 4, "text-anchor": "end" }, "layer"));
      matrices.forEach((matrix, y) => {
        svg.append(s("text", { x: left - 6, y: 10 + 26 * y + 17, "text-anchor": "end" }, matrix));
        layers.forEach((layer, x) => {
          const rank = needs[state[side]][`${layer} ${matrix}`], [fill, ink] = shade(1 - rank / most);
          svg.append(s("g", { style: "cursor: pointer", "data-cell": `${side} ${layer} ${matrix}`, onclick: () => page.set({ layer, matrix }) },
            s("rect", { x: left + x * wide, y: 10 + 26 * y, width: wide, height: 26, fill, stroke: "var(--face)" }),
            s("text", { x: left + (x + 0.5) * wide, y: 27 + 26 * y, "text-anchor": "middle", style: `fill: ${ink}; font-size: ${wide < 24 ? 9 : 12}px` }, rank)));
        });
      });
      const [x, y] = [layers.indexOf(state.layer), matrices.indexOf(state.matrix)];
      for (const [stroke, w] of [["var(--face)", 5], ["var(--ink)", 2.5]]) svg.append(s("rect", { x: left + x * wide + 1.5, y: 11.5 + 26 * y,
        width: wide - 3, height: 23, fill: "none", stroke, "stroke-width": w, "pointer-events": "none" }));
    } });

  const spectrum = (side, i) => chart(page, { height: 250, title: (state) => `${state[side]}: the spectrum, kept up to rank ${state.rank}`,
    keys: () => [["kept", { ...LOOKS[i], dash: "", width: 0 }], ["white noise of the same median", { color: "var(--soft)", dash: "5 3" }]],
    describe: (state) => `largest ${short(sigmaOf(state[side], state)[0])}; ${percent(kept(sigmaOf(state[side], state), state.rank))} of the energy kept`,
    draw: (svg, width, height, state) => {
      const sigma = sigmaOf(state[side], state), noise = data.noise[data.shapes[state.matrix].join("×")];
      const plot = axes(svg, width, height, { x: [0.8, 1.3 * most], y: [1e-3 * top, 1.5 * top], logx: true, logy: true,
        xticks: [1, 4, 16, 64, 256].filter((tick) => tick <= most), xlabel: "index i of the singular value", ylabel: "singular value (log scale)" });
      const median = sigma.toSorted((a, b) => a - b)[Math.floor(sigma.length / 2)], shown = (value) => value >= 1e-3 * top;
      line(plot, noise.map((value, j) => [j + 1, value * median]).filter(([, y]) => shown(y)), { color: "var(--soft)", dash: "5 3", width: 1.5 });
      sigma.forEach((value, j) => { if (shown(value) && (j < 40 || j % 4 === 0)) svg.append(s("circle", { cx: plot.X(j + 1), cy: plot.Y(value), r: 3.2,
        fill: j < state.rank ? LOOKS[i].color : "var(--face)", stroke: LOOKS[i].color })); });
      const cut = plot.X(Math.max(state.rank, 0.8) + (state.rank ? 0.5 : 0));
      svg.append(s("line", { x1: cut, x2: cut, y1: plot.top, y2: plot.bottom, stroke: "var(--ink)", "stroke-width": 2 }),
        s("circle", { cx: cut, cy: plot.top, r: 6, fill: "var(--ink)" }));
      const hand = s("rect", { x: plot.left, y: 0, width: plot.right - plot.left, height: plot.bottom, fill: "transparent",
        style: "cursor: ew-resize; touch-action: none", "data-cut": side });
      svg.append(hand);
      svg.cut = (clientX) => {
        const rank = Math.exp(svg.value([Math.log(0.8), Math.log(1.3 * most)])(clientX));
        const next = rank < 0.95 ? 0 : ranks[nearest(ranks.map((each) => Math.log(each || 0.5)), Math.log(rank))];
        if (next !== page.state.rank) page.set({ rank: next });
      };
    } });
  const cuttable = (panel) => {
    const svg = panel.querySelector("svg[role=img]");
    draggable(svg, (event) => svg.cut(event.clientX));
    return panel;
  };

  const curve = (what, title, ylabel, format) => chart(page, { height: 230, title: () => title,
    keys: (state) => sides(state).map((name, i) => [`${name}${updates[name][what] ? "" : " (not measured)"}`, LOOKS[i]]),
    describe: (state) => sides(state).filter((name) => updates[name][what]).map((name) =>
      `${name}: ${ranks.map((rank, i) => `rank ${rank} ${format(updates[name][what][i])}`).join(", ")}`).join("; "),
    draw: (svg, width, height, state) => {
      const drawn = sides(state).map((name, i) => [updates[name][what], LOOKS[i]]).filter(([values]) => values);
      const all = drawn.flatMap(([values]) => values), place0 = (rank) => Math.max(rank, 0.5);
      const plot = axes(svg, width, height, { x: [0.45, 1.2 * ranks.at(-1)], y: what === "slots" ? [0, 1] : [0, 1.08 * Math.max(...all, 0.1)], logx: true,
        xticks: [1, 4, 16, 64, 256].filter((tick) => tick <= ranks.at(-1)), xlabel: "rank kept of every matrix (log scale; left end: 0)", ylabel });
      for (const [values, look] of drawn) line(plot, ranks.map((rank, i) => [place0(rank), values[i]]), look);
      const x = plot.X(place0(state.rank));
      svg.append(s("line", { x1: x, x2: x, y1: plot.top, y2: plot.bottom, stroke: "var(--ink)", "stroke-width": 2 }));
    } });
  page.panels(map("left"), map("right"));
  page.panels(cuttable(spectrum("left", 0)), cuttable(spectrum("right", 1)));
  const measured = (what) => names.some((name) => updates[name][what]), cut = "The model with all its matrices cut:";
  page.panels(...(measured("losses") ? [curve("losses", `${cut} loss`, "loss (nats per token)", (value) => value.toFixed(2))] : []),
    ...(measured("slots") ? [curve("slots", `${measured("losses") ? "… and" : cut} ${data.share}`, "share", (value) => percent(value))] : []));

  page.draw = (state) => sides(state).filter((name, i, all) => all.indexOf(name) === i).map((name) => {
    const sigma = sigmaOf(name, state), its = updates[name], at = ranks.indexOf(state.rank), losses = its.losses || ranks.map(() => 0);
    const [first, now, last] = [losses[0], losses[at], losses.at(-1)], share = now > first ? `${(now - first).toFixed(2)} worse than the base` : last >= first ? `${(first - now).toFixed(2)} better than the base, though the whole update is no better`
      : `${percent((first - now) / (first - last))} of the improvement`;
    return `${name}, layer ${state.layer}, ${state.matrix} (${data.shapes[state.matrix].join(" × ")}): rank ${state.rank} keeps ${percent(kept(sigma, state.rank), 1)} of its energy, ` +
      `${percent(its.energies[at], 1)} of all ${layers.length * matrices.length} matrices together; 90% needs rank ${needs[name][place(state)]}; ` +
      `${its.above[place(state)]} singular values above the edge of white noise\n  every matrix cut to rank ${state.rank}: ` + [its.losses && `loss on ${its.measured_on} ${now.toFixed(2)} nats per token ` +
      `(base ${first.toFixed(2)}, whole update ${last.toFixed(2)})${at ? `, ${share}` : ", the base itself"}`,
      its.slots && `${data.share} ${percent(its.slots[at])}`].filter(Boolean).join("; ");
  }).join("\n");
  return page.start();
} };
