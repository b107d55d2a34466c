// The target picker: tick the matrices that get an adapter, choose its rank; two bars, attention and MLP, are the sums.

// What would train: data.sides[name] is the number of trainable numbers at rank 1.
export const counted = (data, rank, chosen) => rank * chosen.reduce((sum, name) => sum + data.sides[name], 0);

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), names = Object.keys(data.sides);
  const groups = Object.entries(data.groups), most = data.ranks.at(-1);
  const chosen = (state) => names.filter((name) => state.chosen.includes(name));
  const toggle = (name) => page.set({ chosen: names.filter((each) => page.state.chosen.includes(each) !== (each === name)) });
  page.add(slider(page, "rank", { label: "rank r", values: data.ranks, text: (rank) => `rank ${rank}`, wide: true }));
  for (const [group, its] of groups) {
    const buttons = its.map((name) => h("button", { type: "button", "data-name": name, onclick: () => toggle(name) }, name));
    page.shown.push((state) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", state.chosen.includes(its[i]))));
    page.add(h("div", { class: "control", role: "group", "aria-label": `matrices of ${group}` },
      h("span", { "aria-hidden": "true", style: "min-width: 5em" }, group), ...buttons));
  }
  page.panels(chart(page, { height: 190, title: () => data.title,
    keys: () => [["gets an adapter", { fill: "var(--c0)" }], ["would cost, too", { fill: "none", stroke: "var(--rule)" }]],
    describe: (state) => groups.map(([group, its]) =>
      `${group}: ${number(counted(data, state.rank, its.filter((name) => state.chosen.includes(name))))}`).join("; "),
    draw: (svg, width, height, state) => {
      const scale = data.ranks.find((rank) => rank >= Math.min(most, state.rank <= 16 ? 16 : most));
      const plot = axes(svg, width, height, { x: [0, scale * Math.max(...groups.map(([, its]) => counted(data, 1, its)))],
        y: [0, 1], yticks: [], ylabel: "", xlabel: `trainable numbers (scale: up to rank ${scale})`, left: 66 });
      groups.forEach(([group, its], row) => {
        const y = plot.top + 8 + row * 62;
        let from = 0;
        svg.append(s("text", { x: 60, y: y + 24, "text-anchor": "end" }, group));
        for (const name of its) {
          const to = from + state.rank * data.sides[name], on = state.chosen.includes(name);
          const [x, wide] = [plot.X(from), Math.max(plot.X(to) - plot.X(from) - 2, 1)];
          svg.append(s("rect", { x, y, width: wide, height: 34, fill: on ? "var(--c0)" : "var(--face)", stroke: on ? "var(--c0)"
            : "var(--rule)", "stroke-dasharray": on ? "" : "4 3" }));
          if (wide > 7 * name.length - 30) svg.append(s("text", { x: x + wide / 2, y: y + 21, "text-anchor": "middle", style: on ? "fill: var(--face)" : "" },
            name.replace("_proj", "")));
          from = to;
        }
        svg.append(s("text", { x: plot.X(0) + 2, y: y + 49 }, `${number(counted(data, state.rank, its.filter((name) =>
          state.chosen.includes(name))))} of ${number(counted(data, state.rank, its))}`));
      });
    } }));
  page.draw = (state) => {
    const count = counted(data, state.rank, state.chosen), total = data.frozen + count;
    return `rank ${state.rank} on ${chosen(state).join(", ") || "nothing"}: ${number(count)} trainable numbers, ` +
      `${percent(count / total, 2)} of ${number(total)}; the adapter is ${number(4 * count)} bytes in float32`;
  };
  return page.start();
} };
