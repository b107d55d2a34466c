// The rank-r picture: the first r outer products of a grey picture, beside the picture. What was added up at every
// 32nd rank is kept, so that any rank is at most 16 products away from one that is known.

const STEP = 32;

export function unpack({ base64, scale }) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer), (value) => value * scale);
}

// pixels(r): the sum of the first r products of a column of `left` and a row of `right`, as a Float32Array.
export function compressor({ height, width, left, right, values }) {
  const columns = unpack(left), rows = unpack(right), most = values.length;      // columns: one after another
  const add = (sum, i, sign) => {
    for (let y = 0; y < height; y++) {
      const factor = sign * columns[i * height + y], at = y * width, from = i * width;
      for (let x = 0; x < width; x++) sum[at + x] += factor * rows[from + x];
    }
  };
  const kept = [new Float32Array(height * width)];
  for (let i = 0; i < most; i++) {
    if (i % STEP === 0 && i) kept.push(kept.at(-1).slice());
    if (i === 0) kept.push(kept[0].slice());
    add(kept.at(-1), i, 1);
  }
  return (rank) => {
    const known = Math.min(Math.round(rank / STEP), kept.length - 1), start = Math.min(known * STEP, most);
    const sum = kept[known].slice();
    for (let i = start; i < rank; i++) add(sum, i, 1);
    for (let i = rank; i < start; i++) add(sum, i, -1);
    return sum;
  };
}

// The share of the picture's size (Frobenius norm) that is missing at each rank, from 0 on.
export function errors(values) {
  const left = [0];
  for (const value of values.toReversed()) left.push(left.at(-1) + value * value);
  return left.toReversed().map((rest) => Math.sqrt(rest / left.at(-1)));
}

export default { render({ model, el }) {
  const data = model.get("data"), page = lab(model, el, data.title), { height, width } = data;
  const pixels = compressor(data), missing = errors(data.values);
  const numbers = (rank) => rank * (height + width);
  const picture = (label) => {
    const canvas = h("canvas", { width, height, role: "img", style: "width: 100%; max-width: 320px; display: block" });
    const name = h("div", { class: "title" }, label);
    return { canvas, name, panel: h("div", { class: "panel" }, name, canvas) };
  };
  const paint = ({ canvas }, values) => {
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    values.forEach((value, i) => image.data.set([value * 255, value * 255, value * 255, 255], 4 * i));
    context.putImageData(image, 0, 0);
  };
  const whole = picture(`the picture: ${number(height * width)} numbers`), part = picture("");
  page.add(slider(page, "rank", { label: "rank r", values: data.ranks, text: (rank) => `rank ${rank}`, wide: true }));
  page.panels(part.panel, whole.panel, chart(page, { height: 260,
    title: () => "What is missing, at each rank", describe: (state) => `missing at rank ${state.rank}: ${percent(missing[state.rank], 1)}`,
    draw: (svg, w, tall, state) => {
      const plot = axes(svg, w, tall, { x: [1, data.values.length], y: [0, 100 * missing[1] * 1.1], logx: true, xticks: data.ranks.filter((r) =>
        Number.isInteger(Math.log2(r) / 2)), xlabel: "rank r (log scale)", ylabel: "missing (% of the picture's size)" });
      line(plot, data.ranks.map((rank) => [rank, 100 * missing[rank]]), { ...LOOKS[0], mark: "" });
      svg.append(s("circle", { cx: plot.X(state.rank), cy: plot.Y(100 * missing[state.rank]), r: 6, fill: "var(--ink)" }));
    } }));
  paint(whole, pixels(data.values.length));
  whole.canvas.setAttribute("aria-label", "the picture");
  let drawn = null;
  page.draw = ({ rank }) => {
    if (rank !== drawn) paint(part, pixels(rank));
    drawn = rank;
    part.name.textContent = `rank ${rank}: ${number(numbers(rank))} numbers`;
    part.canvas.setAttribute("aria-label", `the picture at rank ${rank}`);
    return `rank ${rank}: ${rank} × (${height} + ${width}) = ${number(numbers(rank))} numbers in place of ${number(height * width)} ` +
      `(${percent(numbers(rank) / (height * width))}); error ${percent(missing[rank], 1)} of the picture's size (Frobenius norm)`;
  };
  return page.start();
} };
