// The map of a recorded grid: rank by learning rate, one cell a training, one map an alpha rule; and the path of the
// cell that is chosen. A row's best rate is chosen on the validation split, whatever the map shows.

// The share p of sorted values, between two of them in proportion (as numpy.quantile).
export function quantile(values, p) {
  const sorted = values.toSorted((a, b) => a - b), at = p * (sorted.length - 1), i = Math.floor(at);
  return sorted[i] + (at - i) * ((sorted[i + 1] ?? sorted[i]) - sorted[i]);
}

// Where the colours begin and end: the same for all rules. Three tenths of the losses may lie beyond.
export function scale(runs, measure) {
  const known = runs.map((run) => run[measure]).filter((value) => value !== null && value !== undefined);
  return measure === "slots" || !known.length ? [0, 1] : [Math.min(...known), quantile(known, 0.7)];
}

export const best = (runs) => runs.filter((run) => run.valid !== null).reduce((a, b) => (a && a.valid <= b.valid ? a : b), null);

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), { ranks, rates, tasks, rules, before } = data;
  const runs = (state, rule = state.rule) => data.grid.filter((run) => run.task === state.task && run.rule === rule);
  const find = (state, its = {}) => data.grid.find((run) => Object.entries({ task: state.task, rule: state.rule, rank: state.rank,
    lr: state.lr, ...its }).every(([name, value]) => run[name] === value));
  const shown = (state) => state.measure === "slots" && !(before.slots && runs(state)[0].slots !== undefined) ? "test" : state.measure;
  const written = (value, measure) => value === null || value === undefined ? "diverged" : measure === "slots" ? percent(value) : value.toFixed(2);
  const row = (state, rule, rank) => runs(state, rule).filter((run) => run.rank === rank);

  page.add(choices(page, "task", { label: "task", options: Object.entries(tasks).map(([task, its]) => [task, its.words]) }),
    choices(page, "measure", { label: "measure", options: Object.entries(data.measures),
      why: (measure, state) => measure === "slots" && runs(state)[0].slots === undefined ? `${tasks[state.task].words} has no slots.` : "" }));
  page.add(choices(page, "rule", { label: "rule", options: Object.entries(rules) }),
    slider(page, "rank", { label: "rank r", values: ranks, text: (rank) => `rank ${rank}` }),
    slider(page, "lr", { label: "rate", values: rates, text: (rate) => `rate ${short(rate)}` }));

  const map = (rule) => chart(page, { height: 250, title: (state) => `${rules[rule]}: ${data.measures[shown(state)]} (brighter is better)`,
    describe: (state) => ranks.map((rank) => `rank ${rank}: ` + row(state, rule, rank).map((run) =>
      `${written(run[shown(state)], shown(state))} at ${short(run.lr)}`).join(", ")).join("; "),
    draw: (svg, width, height, state) => {
      const measure = shown(state), [low, high] = scale(data.grid.filter((run) => run.task === state.task), measure);
      const [left, top, bottom] = [30, 18, height - 36], wide = (width - left - 6) / rates.length, high1 = (bottom - top) / ranks.length;
      const frame = (run, dashed) => [["var(--face)", dashed ? 4 : 6], ["#000", dashed ? 2 : 3]].forEach(([stroke, w], i) => svg.append(
        s("rect", { x: x(run) + 2, y: y(run) + 2, width: wide - 4, height: high1 - 4, fill: "none", stroke: i ? "var(--ink)" : stroke,
          "stroke-width": w, "stroke-dasharray": dashed && i ? "5 3" : "", "pointer-events": "none" })));
      const x = (run) => left + rates.indexOf(run.lr) * wide, y = (run) => bottom - (ranks.indexOf(run.rank) + 1) * high1;
      svg.append(s("text", { x: 2, y: 11 }, "rank r"), s("text", { x: width / 2, y: height - 3, "text-anchor": "middle" }, "learning rate"));
      rates.forEach((rate, i) => { if (wide > 36 || i % 2 === 0) svg.append(s("text", { x: left + (i + 0.5) * wide, y: bottom + 15, "text-anchor": "middle", style: "font-size: 11px" }, short(rate))); });
      for (const run of runs(state, rule)) {
        const value = run[measure], gone = value === null || value === undefined, better = (value - low) / ((high - low) || 1);
        const [fill, ink] = gone ? ["none", "var(--ink)"] : shade(measure === "slots" ? better : 1 - better);
        svg.append(s("g", { style: "cursor: pointer", "data-cell": `${rule} ${run.rank} ${run.lr}`,
          onclick: () => page.set({ rule, rank: run.rank, lr: run.lr }) },
          s("rect", { x: x(run), y: y(run), width: wide, height: high1, fill, stroke: "var(--faint)", "pointer-events": "all" }),
          s("text", { x: x(run) + wide / 2, y: y(run) + high1 / 2 + 4, "text-anchor": "middle", style: `fill: ${ink}; font-size: 11px` },
            gone ? "✕" : measure === "slots" ? number(100 * value) : value.toFixed(2))));
      }
      for (const rank of ranks) {
        svg.append(s("text", { x: left - 5, y: bottom - (ranks.indexOf(rank) + 0.5) * high1 + 4, "text-anchor": "end" }, rank));
        const top1 = best(row(state, rule, rank));
        if (top1) frame(top1, true);
      }
      if (rule === state.rule) frame(find(state), false);
    } });

  const path = chart(page, { height: 250, title: (state) => `rank ${state.rank}, rate ${short(state.lr)}, ${rules[state.rule]}`,
    keys: () => [["train", { ...LOOKS[1] }], ["held-out (validation)", { ...LOOKS[0] }]],
    describe: (state) => find(state).path.map(([step, train, valid]) => `step ${step}: train ${written(train)}, held-out ${written(valid)}`).join("; "),
    draw: (svg, width, height, state) => {
      const start = before.task[state.task].valid, all = data.grid.filter((run) => run.task === state.task && run.valid !== null);
      const low = Math.min(start, ...all.map((run) => run.valid)), room = Math.max(start - low, 0.1), run = find(state);
      const plot = axes(svg, width, height, { x: [0, tasks[state.task].steps], y: [low - 0.1 * room, start + 0.4 * room],
        xlabel: "optimizer step", ylabel: "loss (nats per token)" });
      const kept = (i) => run.path.map((point) => [point[0], point[i]]).filter(([, y]) => y < start + 0.4 * room);
      svg.append(s("line", { x1: plot.left, x2: plot.right, y1: plot.Y(start), y2: plot.Y(start), stroke: "var(--ink)", "stroke-dasharray": "2 3" }),
        s("text", { x: plot.right, y: plot.top + 10, "text-anchor": "end" }, "dotted: before training"));
      line(plot, kept(1), LOOKS[1]);
      line(plot, kept(2), LOOKS[0]);
      if (run.diverged !== null) svg.append(s("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, `diverged at step ${run.diverged}`));
    } });
  page.panels(...Object.keys(rules).map(map), path);

  const note = h("span", { class: "note" });
  const told = ({ said }) => { note.textContent = said; };
  if (data.trains) {
    model.on("msg:custom", told);
    page.add(action("open this setting in the trainer", () => {
      note.textContent = "asked; the trainer follows when no other cell runs";
      model.send({ open: ["task", "rule", "rank", "alpha", "lr"].reduce((its, name) => ({ ...its, [name]: find(page.state)[name] }), {}) });
    }), note);
  }
  page.draw = (state) => {
    const run = find(state), { steps } = tasks[state.task], place = (its) => its ? `rank ${its.rank} at learning rate ${short(its.lr)}, test ${its.test.toFixed(3)}`
      : "none, every training diverged";
    const end = run.diverged !== null ? `diverged at step ${run.diverged} of ${steps}: there is no loss to show`
      : `after ${steps} steps, nats per token: test ${run.test.toFixed(3)} (before ${before.task[state.task].test.toFixed(2)}), validation ` +
        `${run.valid.toFixed(3)}, tales ${run.tales.toFixed(2)} (before ${before.tales["its own"].toFixed(2)})` +
        (run.slots === undefined ? "" : `; slots right: ${percent(run.slots)}`);
    return `${tasks[state.task].words}, ${rules[state.rule]}: rank ${run.rank}, alpha ${short(run.alpha)}, scaling ${short(run.scaling)}, learning rate ` +
      `${short(run.lr)}; ${number(run.trainable)} trainable numbers, an adapter of ${number(4 * run.trainable)} bytes in float32\n${end}\n` +
      `best by validation: in this row ${place(best(row(state, state.rule, state.rank)))}; of this rule ${place(best(runs(state)))}`;
  };
  const done = page.start();
  return () => { model.off("msg:custom", told); done(); };
} };
