// What the two dials share: the colour of a strength, between the storyteller's and the waiter's, and a picture of the
// losses at every strength, on which the strength can be dragged.

const STORY = { light: [0, 114, 178], dark: [86, 180, 233] }, WAITER = { light: [179, 74, 0], dark: [255, 154, 82] };
const CURVES = [LOOKS[2], LOOKS[4]];           // not the colours of the two voices
const AXIS = 46;                               // where the axis begins

function voice(page, strength) {
  const [from, to] = [STORY, WAITER].map((each) => each[page.root.classList.contains("dark") ? "dark" : "light"]);
  return `rgb(${from.map((a, i) => Math.round(a + Math.min(Math.max(strength, 0), 1) * (to[i] - a)))})`;
}

function lossesByStrength(page, { title, losses, strengths }, height) {
  const names = Object.keys(losses), all = Object.values(losses).flat(), top = all.length ? Math.max(...all) * 1.08 : 1;
  const range = [strengths[0], strengths.at(-1)], at = (state) => nearest(strengths, state.strength);
  const panel = chart(page, { height, title: () => title, keys: () => names.map((name, i) => [name, CURVES[i]]),
    describe: (state) => `strength ${state.strength.toFixed(1)} of ${range.join(" to ")}` +
      names.map((name) => `; ${name} ${losses[name][at(state)].toFixed(2)}`).join(""),
    draw: (svg, width, height, state) => {
      const plot = axes(svg, width, height, { x: range, y: [0, top], left: AXIS, yticks: names.length ? undefined : [],
        xticks: strengths.filter((value) => Math.abs(value * 5 - Math.round(value * 5)) < 1e-6),
        xlabel: "strength (0: off, 1: as trained)", ylabel: names.length ? "loss (nats per token)" : "" });
      const upright = (value, above, looks) => s("line",
        { x1: plot.X(value), x2: plot.X(value), y1: plot.top - above, y2: plot.bottom, ...looks });
      svg.append(upright(1, 0, { stroke: "var(--ink)", "stroke-dasharray": "4 3" }),
        s("text", { x: plot.X(1) - 5, y: plot.top - 8, "text-anchor": "end" }, "as trained"),
        upright(state.strength, 6, { stroke: voice(page, state.strength), "stroke-width": 3 }));
      names.forEach((name, i) => {
        line(plot, strengths.map((strength, j) => [strength, losses[name][j]]), CURVES[i]);
        svg.append(s("circle", { cx: plot.X(state.strength), cy: plot.Y(losses[name][at(state)]), r: 7, fill: "var(--ink)" }));
      });
    } });
  const svg = panel.querySelector("svg[role=img]");
  svg.style.cursor = "ew-resize";
  draggable(svg, (event) => {
    const strength = strengths[nearest(strengths, svg.value(range)(event.clientX))];
    if (strength !== page.state.strength) page.set({ strength });
  });
  return panel;
}
