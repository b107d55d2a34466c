// A LLaMA in plain JavaScript: the weights as they are shipped, a tokenizer, a cache, and LoRA as (x Aᵀ) Bᵀ with a
// strength that may change between tokens. Read `Fable.step`: one token in, the logits of the next one out.
// The names and the order of things are those of lora_edu/models/llama.py, and a test compares the logits.

// name -> { shape, data }: a safetensors file; bfloat16 is widened, which loses nothing.
export function safetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true)), tensors = {};
  const { __metadata__, ...held } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(held)) {
    const bytes = buffer.slice(8 + length + from, 8 + length + to);
    if (dtype !== "BF16" && dtype !== "F32") throw new Error(`${name} is stored as ${dtype}, and BF16 and F32 are read here`);
    tensors[name] = { shape, data: dtype === "F32" ? new Float32Array(bytes) : widened(new Uint16Array(bytes)) };
  }
  return tensors;
}
function widened(halves) {
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16;
  return new Float32Array(bits.buffer);
}

// y += scale * W x, W (rows, columns) row by row; the loop that takes the time.
function multiply(W, x, y, scale = 1, add = false) {
  const columns = x.length;
  for (let row = 0, at = 0; row < y.length; row++, at += columns) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < columns; i += 4) {            // every width of fable's is a multiple of 4; a rank may not be
      a += W[at + i] * x[i];
      if (i + 1 < columns) b += W[at + i + 1] * x[i + 1];
      if (i + 2 < columns) c += W[at + i + 2] * x[i + 2];
      if (i + 3 < columns) d += W[at + i + 3] * x[i + 3];
    }
    y[row] = (add ? y[row] : 0) + scale * (a + b + c + d);
  }
  return y;
}
function fast(W, x, y) {                              // the same, for widths that are multiples of 4
  const columns = x.length;
  for (let row = 0, at = 0; row < y.length; row++, at += columns) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < columns; i += 4) {
      a += W[at + i] * x[i]; b += W[at + i + 1] * x[i + 1]; c += W[at + i + 2] * x[i + 2]; d += W[at + i + 3] * x[i + 3];
    }
    y[row] = a + b + c + d;
  }
  return y;
}

export class Fable {
  constructor(config, tensors) {
    this.config = config;
    this.D = config.head_dim || config.hidden_size / config.num_attention_heads;
    this.embed = tensors["model.embed_tokens.weight"].data;
    this.norm = tensors["model.norm.weight"].data;
    this.head = (tensors["lm_head.weight"] ?? tensors["model.embed_tokens.weight"]).data;
    this.adapters = [];
    this.strengths = [];
    this.layers = Array.from({ length: config.num_hidden_layers }, (_, i) => {
      const of = (name) => tensors[`model.layers.${i}.${name}.weight`].data;
      const named = (group, names) => Object.fromEntries(names.map((name) => [name, this.linear(`model.layers.${i}.${group}.${name}`, of(`${group}.${name}`))]));
      return { ...named("self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]), ...named("mlp", ["gate_proj", "up_proj", "down_proj"]),
        before: of("input_layernorm"), between: of("post_attention_layernorm") };
    });
    this.clear();
  }

  // A matrix and the adapters beside it.
  linear(name, W) { return { name, W, beside: [] }; }

  // An adapter's file in PEFT's format: its config and tensors. It begins at strength 1; returns its number.
  add(config, tensors) {
    const number = this.strengths.push(1) - 1, scaling = config.lora_alpha / (config.use_rslora ? Math.sqrt(config.r) : config.r);
    for (const layer of this.layers) for (const linear of Object.values(layer)) {
      const A = linear.name && tensors[`base_model.model.${linear.name}.lora_A.weight`];
      if (A) linear.beside.push({ number, scaling, A: A.data, B: tensors[`base_model.model.${linear.name}.lora_B.weight`].data, rank: A.shape[0] });
    }
    return number;
  }

  clear() { this.cache = this.layers.map(() => ({ keys: [], values: [] })); this.length = 0; }

  apply({ W, beside }, x, size) {
    const y = fast(W, x, new Float32Array(size));
    for (const { number, scaling, A, B, rank } of beside) {
      const strength = this.strengths[number];
      if (strength) multiply(B, multiply(A, x, new Float32Array(rank)), y, strength * scaling, true);
    }
    return y;
  }

  normed(x, weight) {
    let sum = 0;
    for (const value of x) sum += value * value;
    const scale = 1 / Math.sqrt(sum / x.length + this.config.rms_norm_eps);
    return Float32Array.from(x, (value, i) => weight[i] * value * scale);
  }

  // The pairs (i, i + D/2) of every head are turned by the position: Hugging Face's layout.
  rotated(x) {
    const { D } = this, half = D / 2;
    for (let i = 0; i < half; i++) {
      const angle = this.length / this.config.rope_theta ** (2 * i / D), cos = Math.cos(angle), sin = Math.sin(angle);
      for (let at = i; at < x.length; at += D) {
        const [a, b] = [x[at], x[at + half]];
        x[at] = a * cos - b * sin;
        x[at + half] = b * cos + a * sin;
      }
    }
    return x;
  }

  attend(layer, cache, x) {
    const { D, config } = this, heads = config.num_attention_heads, shared = heads / config.num_key_value_heads;
    const q = this.rotated(this.apply(layer.q_proj, x, heads * D));
    cache.keys.push(this.rotated(this.apply(layer.k_proj, x, heads * D / shared)));
    cache.values.push(this.apply(layer.v_proj, x, heads * D / shared));
    const out = new Float32Array(heads * D), seen = cache.keys.length, weights = new Float64Array(seen);
    for (let head = 0; head < heads; head++) {
      const at = head * D, from = Math.floor(head / shared) * D;
      let most = -Infinity, sum = 0;
      for (let t = 0; t < seen; t++) {
        let dot = 0;
        for (let i = 0; i < D; i++) dot += q[at + i] * cache.keys[t][from + i];
        weights[t] = dot / Math.sqrt(D);
        most = Math.max(most, weights[t]);
      }
      for (let t = 0; t < seen; t++) sum += weights[t] = Math.exp(weights[t] - most);
      for (let t = 0; t < seen; t++) for (let i = 0; i < D; i++) out[at + i] += weights[t] / sum * cache.values[t][from + i];
    }
    return this.apply(layer.o_proj, out, config.hidden_size);
  }

  // One token: the logits of the next one.
  step(id) {
    const { config } = this, C = config.hidden_size, wide = config.intermediate_size;
    if (this.length >= config.max_position_embeddings) throw new Error(`the context of ${config.max_position_embeddings} tokens is full`);
    const x = this.embed.slice(id * C, (id + 1) * C);
    this.layers.forEach((layer, i) => {
      const attended = this.attend(layer, this.cache[i], this.normed(x, layer.before));
      for (let c = 0; c < C; c++) x[c] += attended[c];
      const h = this.normed(x, layer.between), gate = this.apply(layer.gate_proj, h, wide), up = this.apply(layer.up_proj, h, wide);
      for (let j = 0; j < wide; j++) up[j] *= gate[j] / (1 + Math.exp(-gate[j]));
      const out = this.apply(layer.down_proj, up, C);
      for (let c = 0; c < C; c++) x[c] += out[c];
    });
    this.length += 1;
    return fast(this.head, this.normed(x, this.norm), new Float32Array(config.vocab_size));
  }
}

// Byte-level BPE, as `tokenizers` does it for this file: words are cut by GPT-2's expression, then pairs are merged in order.
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
export class Tokenizer {
  constructor({ model: { vocab, merges } }) {
    this.vocab = vocab;
    this.pieces = Object.entries(vocab).reduce((all, [piece, id]) => { all[id] = piece; return all; }, []);
    this.order = new Map(merges.map((pair, i) => [Array.isArray(pair) ? pair.join(" ") : pair, i]));
    const plain = [[33, 126], [161, 172], [174, 255]].flatMap(([a, b]) => Array.from({ length: b - a + 1 }, (_, i) => a + i));
    let next = 256;
    this.letter = Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(plain.includes(byte) ? byte : next++));
    this.byte = new Map(this.letter.map((letter, byte) => [letter, byte]));
  }

  encode(text) {
    return (text.match(WORDS) ?? []).flatMap((word) => this.merged([...new TextEncoder().encode(word)].map((byte) => this.letter[byte])))
      .map((piece) => this.vocab[piece]);
  }

  merged(parts) {
    for (;;) {
      let best = -1, rank = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const found = this.order.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (found < rank) [best, rank] = [i, found];
      }
      if (best < 0) return parts;
      const pair = [parts[best], parts[best + 1]], merged = [];
      for (let i = 0; i < parts.length; i++) {
        if (parts[i] === pair[0] && parts[i + 1] === pair[1]) { merged.push(pair.join("")); i++; } else merged.push(parts[i]);
      }
      parts = merged;
    }
  }

  decode(ids) {
    const bytes = ids.filter((id) => id !== 0).flatMap((id) => [...this.pieces[id]].map((letter) => this.byte.get(letter)));
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}

// One of the `k` likeliest tokens, by chance, or the likeliest at temperature 0; `random` gives numbers from 0 to 1.
export function sample(logits, { temperature = 0.6, k = 20, random }) {
  const ids = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]).slice(0, temperature ? k : 1);
  const weights = ids.map((id) => Math.exp((logits[id] - logits[ids[0]]) / (temperature || 1)));
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  return ids[Math.max(0, weights.findIndex((weight) => (left -= weight) <= 0))];
}
export function randomFrom(seed) {                    // mulberry32: small, and the same everywhere
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Mean loss in nats per token of what follows the first `before` tokens of a text.
export function lossOf(model, ids, before) {
  model.clear();
  let sum = 0;
  for (let t = 0; t + 1 < ids.length; t++) {
    const logits = model.step(ids[t]);
    if (t + 1 < before) continue;
    let most = -Infinity, all = 0;
    for (const value of logits) most = Math.max(most, value);
    for (const value of logits) all += Math.exp(value - most);
    sum += most + Math.log(all) - logits[ids[t + 1]];
  }
  model.clear();
  return sum / (ids.length - before);
}
