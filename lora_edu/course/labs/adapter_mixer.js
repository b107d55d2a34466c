// The adapter mixer: a slider for each adapter, what the mixture writes, and a bar for each loss.

// How a setting is called in the data: "1,0.25,0", as Python writes it.
export const settingOf = (data, state) => data.names.map((name) => String(state[name])).join(",");

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title);
  const point = (state) => data.points[settingOf(data, state)], none = data.points[data.names.map(() => "0").join(",")];
  for (const name of data.names) {
    const control = slider(page, name, { label: name, values: data.steps, text: (weight) => `weight ${weight}`, wide: true });
    control.firstChild.style.minWidth = "5.5em";           // the three begin and end at one place
    control.lastChild.style.minWidth = "6em";
    page.add(control);
  }
  const text = h("p", { class: "big", tabindex: 0, "aria-label": "what is written", style: "min-height: 6.5em" });
  page.block(text);
  const most = 1.05 * Math.max(...Object.values(data.points).flatMap((each) => each.losses));
  page.panels(chart(page, { height: 44 * data.losses.length + 62, title: () => data.title,
    keys: () => [["this mixture", { fill: "var(--c0)" }], ["fable without adapters", { color: "var(--ink)", dash: "4 3" }]],
    describe: (state) => data.losses.map((name, i) => `${name} ${point(state).losses[i].toFixed(2)}`).join("; "),
    draw: (svg, width, height, state) => {
      const plot = axes(svg, width, height, { x: [0, most], y: [0, 1], yticks: [], ylabel: "",
        xlabel: "loss (nats per token): shorter is better", left: 92 });
      data.losses.forEach((name, i) => {
        const y = plot.top + 10 + 44 * i, loss = point(state).losses[i], end = plot.X(loss), inside = end > plot.right - 40;
        svg.append(s("text", { x: 86, y: y + 19, "text-anchor": "end" }, name),
          s("rect", { x: plot.X(0), y, width: Math.max(end - plot.X(0), 1), height: 28, fill: "var(--c0)" }),
          s("line", { x1: plot.X(none.losses[i]), x2: plot.X(none.losses[i]), y1: y - 5, y2: y + 33, stroke: "var(--ink)",
            "stroke-width": 2, "stroke-dasharray": "4 3" }),
          s("text", { x: inside ? end - 6 : end + 6, y: y + 19, "text-anchor": inside ? "end" : "start",
            style: inside ? "fill: var(--face)" : "" }, loss.toFixed(2)));
      });
    } }));
  page.draw = (state) => {
    text.replaceChildren(h("span", { style: "color: var(--soft)" }, data.prompt), point(state).text);
    return `${data.names.map((name) => `${name} ${state[name]}`).join(", ")}; losses in nats per token: ` +
      `${data.losses.map((name, i) => `${name} ${point(state).losses[i].toFixed(2)}`).join(", ")}.`;
  };
  return page.start();
} };
