// The merge lab: an adapter folded into weights of a dtype, at a strength. The corner of the matrix is rounded here, by
// the rules of the two 16-bit formats; the whole matrix and the losses were measured beforehand.

// float32 to the nearest bfloat16 (8 binary digits), ties to even.
export function bfloat16(value) {
  const bits = new Uint32Array(new Float32Array([value]).buffer)[0];
  return new Float32Array(new Uint32Array([((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) << 16]).buffer)[0];
}
// … and the nearest float16 (11 binary digits, the smallest step 2⁻²⁴, infinite from 65520 on).
export function float16(value) {
  const size = Math.abs(value);
  if (size === 0 || !Number.isFinite(value)) return value;
  if (size >= 65520) return Math.sign(value) * Infinity;
  const step = 2 ** (Math.max(Math.floor(Math.log2(size)), -14) - 10), whole = size / step, below = Math.floor(whole), rest = whole - below;
  return Math.sign(value) * step * (rest > 0.5 || (rest === 0.5 && below % 2) ? below + 1 : below);
}
export const ROUND = { float32: Math.fround, bfloat16, float16 };

const floats = (base64) => new Float32Array(Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer);

// What became of each entry of the corner: |arrived - ΔW| / |ΔW|, and NaN where W₀'s value stayed.
export function corner({ weight, delta }, dtype, strength) {
  const round = ROUND[dtype];
  return Array.from(weight, (value, i) => {
    const stored = round(value), asked = Math.fround(strength * delta[i]), came = round(Math.fround(stored + asked)) - stored;
    return asked === 0 ? 0 : came === 0 ? NaN : Math.abs((came - asked) / asked);
  });
}

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), { strengths, dtypes } = data, scales = Object.keys(data.scales);
  const matrix = { weight: floats(data.corner.weight), delta: floats(data.corner.delta) };
  const effective = (state) => state.strength * data.scales[state.scaled];
  const at = (state) => [nearest(strengths, state.strength), scales.indexOf(state.scaled)];
  const point = (state) => at(state).reduce((list, i) => list[i], data.measured[state.dtype]), apart = (state) => at(state).reduce((list, i) => list[i], data.apart);
  const words = h("p", { class: "big", style: "min-height: 4.5em" });
  page.add(choices(page, "dtype", { label: "weights in", options: dtypes.map((name) => [name, name]) }),
    choices(page, "scaled", { label: "scaled down to", options: scales.map((name) => [name, name]) }));
  page.add(slider(page, "strength", { label: "strength", values: strengths, text: (value) => `strength ${value.toFixed(2)}`, wide: true }));
  if (data.samples) page.block(words);

  const canvas = h("canvas", { width: data.corner.width, height: data.corner.height, role: "img",
    style: "width: 100%; max-width: 250px; image-rendering: pixelated; border: 1px solid var(--rule); display: block" });
  const paint = (errors) => {
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    errors.forEach((error, i) => {
      const pale = Math.min(error, 1);
      image.data.set(Number.isNaN(error) ? [0, 0, 0, 255] : [255 - 205 * pale, 255 - 130 * pale, 255 - 60 * pale, 255], 4 * i);
    });
    context.putImageData(image, 0, 0);
  };
  const entries = h("div", { class: "panel" }, h("div", { class: "title" }, "The error of each entry of a corner"), h("div", { class: "row" },
    key("none", { fill: "#fff", stroke: "var(--rule)" }), key("as large as the update", { fill: "rgb(50,125,195)" }), key("rounded away", { fill: "#000", stroke: "var(--rule)" })), canvas);

  const error = chart(page, { height: 250, title: () => "The error of the whole update", keys: () => dtypes.map((name, i) => [name, LOOKS[i]]),
    describe: (state) => `${state.dtype}: update of ${short(point(state).size)} of the matrix, error ${short(point(state).error)}`,
    draw: (svg, width, height, state) => {
      const all = dtypes.flatMap((name) => data.lines[name]), sizes = all.map(([size]) => size);
      const plot = axes(svg, width, height, { x: [Math.min(...sizes) / 1.5, Math.max(...sizes) * 1.5], y: [1e-9, 1e2], logx: true, logy: true,
        xlabel: "‖ΔW‖ / ‖W₀‖ (no unit)", ylabel: "‖arrived − ΔW‖ / ‖ΔW‖" });
      dtypes.forEach((name, i) => line(plot, data.lines[name].filter(([, y]) => y > 1e-9), { ...LOOKS[i], every: 4 }));
      const here = point(state);
      if (here.size > 0) svg.append(s("circle", { cx: plot.X(here.size), cy: plot.Y(Math.max(here.error, 1e-9)), r: 7, fill: "var(--ink)" }));
    } });
  const losses = chart(page, { height: 250, title: () => "Lines: apart. Dots: merged", keys: () => data.tasks.map((name, i) => [name, LOOKS[i]]),
    describe: (state) => data.tasks.map((name, i) => `${name}: apart ${apart(state)[i].toFixed(4)}, merged ${point(state).merged[i].toFixed(4)}`).join("; "),
    draw: (svg, width, height, state) => {
      const lines = data.tasks.map((_, i) => strengths.map((strength, j) => [strength, data.apart[j][0][i]]));
      const plot = axes(svg, width, height, { x: [strengths[0], strengths.at(-1)], y: [0, 1.08 * Math.max(...lines.flat().map(([, y]) => y))],
        xlabel: "strength in effect", ylabel: "loss (nats per token)" });
      lines.forEach((points, i) => line(plot, points, { ...LOOKS[i], every: 2 }));
      const x = plot.X(effective(state));
      svg.append(s("line", { x1: x, x2: x, y1: plot.top, y2: plot.bottom, stroke: "var(--ink)" }));
      point(state).merged.forEach((loss) => svg.append(s("circle", { cx: x, cy: plot.Y(loss), r: 7, fill: "var(--ink)" })));
    } });
  page.panels(entries, error, losses);

  page.draw = (state) => {
    const errors = corner(matrix, state.dtype, effective(state)), lost = errors.filter(Number.isNaN).length, here = point(state);
    const known = errors.filter((value) => !Number.isNaN(value)).sort((a, b) => a - b), median = known.length ? known[known.length >> 1] : 0;
    paint(errors);
    canvas.setAttribute("aria-label", `${lost} of ${errors.length} entries rounded away`);
    if (data.samples) {
      const near = data.samples[nearest(data.samples.map(([strength]) => strength), effective(state))];
      words.textContent = near[1];
      words.prepend(h("span", { class: "note" }, `at strength ${near[0].toFixed(2)}${Math.abs(near[0] - effective(state)) > 1e-6 ? " (the nearest that was written)" : ""}: `));
    }
    return `${state.dtype}, strength ${state.strength.toFixed(2)}` + (state.scaled === "1" ? "" : ` scaled down to ${state.scaled}, ${short(effective(state))} in effect`) +
      `: ‖ΔW‖/‖W₀‖ = ${short(here.size)} in ${data.name}; as trained it is ${short(data.own)}, a smaller one is this adapter scaled down by us\n` +
      `rounded away, W₀'s value stayed: ${number(here.lost)} of ${number(data.entries)} entries (${percent(here.away, 2)}); in the corner shown ${number(lost)} of ${number(errors.length)}, ` +
      `the others off by ${short(median)} of theirs (median)\nthe update that arrived is off by ${short(here.error)} of its size, over the whole matrix\n` +
      data.tasks.map((name, i) => `loss on ${name}: ${data.base[i].toFixed(4)} nats per token without the adapter, ${apart(state)[i].toFixed(4)} with it kept apart, ` +
        `${here.merged[i].toFixed(4)} merged (${here.merged[i] >= apart(state)[i] ? "+" : "−"}${Math.abs(here.merged[i] - apart(state)[i]).toFixed(4)} by the merge)`).join("\n");
  };
  return page.start();
} };
