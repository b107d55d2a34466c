// The live trainer: the loop is in Python, the clock is the page's. A tick is a message; the kernel works for about a
// fifth of a second, puts what it found into `runs`, and answers; only then comes the next tick. Another cell may keep
// it waiting, and a page that goes away stops the clock.

// The recorded path of a setting, or null: the record knows some ranks, rates and rules, on all matrices.
export const recorded = (record, state) => record && state.targets === "all-linear" ? record.grid.find((run) =>
  run.task === state.task && run.rule === state.rule && run.rank === state.rank && run.lr === state.lr && run.alpha === state.alpha) ?? null : null;
// A guess by its end alone: half of the way every tenth of the steps.
export const guessed = (start, end, steps) => Array.from({ length: 21 }, (_, i) => [i * steps / 20, end + (start - end) * 0.5 ** (i / 2)]);

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), record = data.record;
  const known = (state) => state.like && record && state.task in record.tasks;       // a task of the reader's is in no record
  const runs = () => model.get("runs"), steps = (state) => (known(state) ? record.tasks[state.task].steps : data.steps);
  let playing = false, waiting = null, timer = null;
  page.fit = (next, changes) => ({                           // under 2r alpha follows the rank; a guess is of one task,
    alpha: next.rule === "2r" ? 2 * next.rank : changes.rule === "fixed" ? data.fixed : changes.rule === "rslora" ? data.rslora : next.alpha,
    drawn: "task" in changes || "guess" in changes ? null : next.drawn });      // and drawn or told
  const ask = (what) => {
    if (waiting || runs().ended) return;
    waiting = setTimeout(() => { note.textContent = "waiting for the kernel: it measures, or runs another cell"; }, 3000);
    model.send({ do: what });
  };
  const play = action("▶ Play", () => { playing = !playing; note.textContent = ""; if (playing) ask("tick"); page.redraw(); }, { "data-name": "play" });
  const note = h("span", { class: "note" });
  const heard = ({ done, stop }) => {
    clearTimeout(waiting);
    waiting = null;
    note.textContent = "";
    if (stop) playing = false;
    if (playing && done === "tick") timer = setTimeout(() => ask("tick"), 20);
    page.redraw();
  };
  const found = () => page.redraw();
  model.on("msg:custom", heard);
  model.on("change:runs", found);

  page.add(play, action("Step", () => { playing = false; ask("step"); page.redraw(); }, { "data-name": "step" }),
    action("New run", () => { playing = false; ask("new"); page.redraw(); }, { "data-name": "new" }),
    ...(record ? [check(page, "like", { label: "as in the record" })] : []), check(page, "hide", { label: "guess first" }), note);
  page.add(slider(page, "rank", { label: "rank r", values: data.ranks, text: (rank) => `rank ${rank}` }),
    slider(page, "alpha", { label: "alpha", values: data.alphas, text: (alpha) => `alpha ${short(alpha)}`, locked: (state) => state.rule === "2r" }),
    slider(page, "lr", { label: "rate", values: data.rates, text: (rate) => `rate ${short(rate)}` }));
  page.add(choices(page, "rule", { label: "alpha rule", options: Object.entries(data.rules) }),
    choices(page, "task", { label: "task", options: Object.entries(data.tasks) }));
  page.add(choices(page, "targets", { label: "matrices", options: Object.keys(data.counts).map((name) => [name, name]) }));
  const guess = slider(page, "guess", { label: "my guess of the end (or draw the curve)", values: Array.from({ length: 51 }, (_, i) => i / 10),
    text: (loss) => `loss ${loss.toFixed(1)}` });
  const samples = h("div", { class: "panels", style: "min-height: 6.2em" }), legend = h("div", { class: "row", style: "min-height: 24px" });
  page.add(guess);
  page.block(samples);
  page.block(legend);
  const written = (run) => h("div", {}, key(run.name, look(run)), h("p", { style: "margin: 2px 0; font-size: 1.1em" },
    h("span", { style: "color: var(--soft)" }, `${run.prompt} → `), run.sample ? run.sample[1] : "…", h("span", { class: "note" },
      `${run.sample ? ` (written at step ${run.sample[0]}` : " (a sample at every 25th step"}${run.score === null ? ")" : `; ${run.judged} ${percent(run.score)} on ${run.asked} test prompts)`}`)));

  const all = () => [...runs().earlier, ...(runs().now ? [runs().now] : [])];
  const look = (run) => LOOKS[run.look % LOOKS.length];
  const start = (state) => (all()[0]?.points[0]?.[1]) ?? (record?.before[state.task] ?? 4.2);
  const drawn = (state) => state.drawn && state.drawn.length > 1 ? state.drawn : guessed(start(state), state.guess, steps(state));
  const losses = chart(page, { height: 215, title: (state) => `loss on ${data.tasks[state.task]}`,
    describe: () => all().map((run) => `${run.name}: ${run.points.map(([step, loss]) => `step ${step} ${loss.toFixed(2)}`).join(", ")}`).join("; ") || "no run yet",
    draw: (svg, width, height, state) => {
      const last = Math.max(steps(state), ...all().map((run) => run.steps)), path = pale(state), top = Math.min(12, 1.15 * Math.max(start(state), ...all().flatMap((run) => run.points.map((point) => point[1]))));
      const plot = axes(svg, width, height, { x: [0, last], y: [0, top], xlabel: "optimizer step", ylabel: "nats per token; marked: held-out" });
      const inside = (points) => points.filter(([, y]) => y !== null && y <= top);
      if (path) {
        line(plot, inside(path.path.map(([step, train]) => [step, train])), { color: "var(--rule)", width: 3, opacity: 0.45 });
        line(plot, inside(path.path.map(([step, , valid]) => [step, valid])), { color: "var(--rule)", width: 7, opacity: 0.45 });
      }
      if (state.hide) line(plot, inside(drawn(state)), { color: "var(--c4)", dash: "5 4" });
      for (const run of all()) {
        line(plot, inside(run.losses.map((loss, i) => [i + 1, loss])), { ...look(run), mark: "", width: 1, dash: "" });
        line(plot, inside(run.points.map(([step, loss]) => [step, loss])), look(run));
      }
      svg.at = (event) => {                                  // [step, loss] under the pointer
        const up = (plot.bottom - (event.clientY - svg.getBoundingClientRect().top)) / (plot.bottom - plot.top);
        return [Math.round(svg.value([0, last])(event.clientX)), top * up];
      };
    } });
  const pale = (state) => (state.like && !(state.hide && !runs().now?.complete) ? recorded(record, state) : null);
  const svg = losses.querySelector("svg[role=img]");
  let pen = [];                                              // a guess is drawn from left to right
  draggable(svg, (event) => {
    const [step, loss] = svg.at(event);
    if (step >= 0 && step <= steps(page.state) && loss >= 0 && !(step <= pen.at(-1)?.[0])) { pen.push([step, loss]); page.set({ drawn: [...pen] }); }
  }, () => { pen = []; return page.state.hide; });

  const spectrum = chart(page, { height: 215, title: () => `scaling · BA of ${(runs().now?.watched ?? "one matrix").replace("model.layers.", "layer ").replace(".self_attn", "").replace(".mlp", "").replace(".", " ")}`, describe: () => `singular values ${(runs().now?.sigma ?? []).map(short).join(", ")}`,
    draw: (svg1, width, height, state) => {
      const sigma = runs().now?.sigma ?? Array(state.rank).fill(0);
      const plot = axes(svg1, width, height, { x: [0, sigma.length + 1], y: [0, 1.1 * Math.max(...sigma) || 1], xlabel: "index i", ylabel: "singular value σᵢ" });
      line(plot, sigma.map((value, i) => [i + 1, value]), { ...(runs().now ? look(runs().now) : LOOKS[0]), dash: "", width: 1 });
    } });
  const plane = chart(page, { height: 215, title: () => "learned ↓   forgotten →", describe: () => all().filter((run) => run.points.length).map((run) =>
      `${run.name}: ${data.plain} ${run.points.at(-1)[2].toFixed(2)}, held-out ${run.points.at(-1)[1].toFixed(2)}`).join("; ") || "no run yet",
    draw: (svg1, width, height, state) => {
      const points = all().flatMap((run) => run.points), kept = points.map((point) => point[2]).filter((value) => value < 12);
      const plot = axes(svg1, width, height, { x: [Math.floor(Math.min(...kept, 3)) - 0.2, Math.max(...kept, 5) + 0.3], y: [0, 1.15 * Math.min(10, Math.max(start(state), ...points.map((point) => point[1])))],
        xlabel: `loss on the ${data.plain}`, ylabel: "held-out loss" });
      for (const run of all()) line(plot, run.points.filter(([, loss, forgot]) => loss < 10 && forgot < 12).map(([, loss, forgot]) => [forgot, loss]), look(run));
    } });
  page.panels(losses, spectrum, plane);

  const result = (run) => `${run.done} of ${run.steps} steps, batch ${run.losses.at(-1).toFixed(3)}; at step ${run.points.at(-1)[0]} held-out ${run.points.at(-1)[1].toFixed(3)}, ` +
    `${data.plain} ${run.points.at(-1)[2].toFixed(3)}` + (run.score === null ? "" : `; ${run.judged} ${percent(run.score)}`) + (run.diverged ? `; diverged at step ${run.diverged}` : "");
  page.draw = (state) => {
    const { now, ended, problem } = runs();
    if (ended || now?.complete) playing = false;
    play.textContent = playing ? "❚❚ Pause" : "▶ Play";
    play.setAttribute("aria-pressed", playing);
    for (const name of ["play", "step", "new"]) page.root.querySelector(`[data-name=${name}]`).setAttribute("aria-disabled", Boolean(ended));
    guess.style.visibility = state.hide ? "visible" : "hidden";
    samples.replaceChildren(...(all().length ? all().slice(-2).map(written)
      : [h("p", { class: "note" }, "What the last two runs write after one prompt appears here.")]));
    legend.replaceChildren(...all().map((run) => key(run.name, look(run))), ...(pale(state) ? [key("the record", { color: "var(--rule)", width: 5 })] : []),
      ...(state.hide ? [key("your guess", { color: "var(--c4)", dash: "5 4" })] : []));
    const count = state.rank * data.counts[state.targets], scaling = state.alpha / (state.rule === "rslora" ? Math.sqrt(state.rank) : state.rank);
    const stage = ended ? "this trainer has ended: its cell was run again, and the new one goes on"
      : problem || `step ${now?.done ?? 0} of ${now?.steps ?? steps(state)}` + (!now ? ": press Play, or Step" : now.diverged ? `: diverged at step ${now.diverged}, the loss is no finite number any more; choose a smaller rate or alpha`
        : now.complete ? ": complete; move a slider, or press New run" : now.done === now.steps ? ": now the exam" : "");
    const miss = state.hide && now?.complete && !now.diverged ? `\nyou guessed ${drawn(state).at(-1)[1].toFixed(2)} at the end, it is ${now.points.at(-1)[1].toFixed(2)}` : "";
    const alphas = record?.grid.some((run) => run.rule === "fixed") ? `2r, ${data.fixed}, or ${short(data.rslora)} under rsLoRA` : "2r";
    const unknown = known(state) && !recorded(record, state) ? `\nthe record has no run of this setting: it has rank ${record.ranks.join(", ")} with alpha ${alphas}, rates ` +
      `${record.rates.map(short).join(", ")}, on all-linear` : "";
    return `${stage}\n${data.tasks[state.task]}, ${state.targets}, r ${state.rank}, alpha ${short(state.alpha)}, lr ${short(state.lr)}; scaling = alpha / ${state.rule === "rslora" ? "√r" : "r"} = ${scaling.toFixed(2)}; ${number(count)} trainable parameters, ${number(4 * count)} bytes in float32; ` +
      `${known(state) ? data.place.like : data.place.own}${miss}${unknown}` +
      (now?.skipped ? `\n${now.skipped} steps overflowed in float16 and were skipped` : "") + all().filter((run) => run.done).map((run) => `\n${run.name}: ${result(run)}`).join("");
  };
  const end = page.start();
  return () => { clearTimeout(timer); clearTimeout(waiting); model.off("msg:custom", heard); model.off("change:runs", found); end(); };
} };
