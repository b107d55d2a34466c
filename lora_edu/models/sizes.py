"""Sizes of well-known models, and how many parameters they make: what can be counted without a single weight.

Sources: the models' public config.json files; Brown et al. (2020), "Language Models are Few-Shot Learners", table 2.1,
for GPT-3.
"""
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lora_edu.files import HUB_NAME, from_hub, read_json
from lora_edu.models.llama import LlamaConfig
from lora_edu.numbers import whole


@dataclass(frozen=True)
class Sizes:
    """A transformer in numbers. `kind` is "llama" (RMSNorm, SwiGLU, rotary positions) or "gpt2" (LayerNorm, a two-layer
    MLP, learned positions, biases everywhere).

    Args:
        biased: the matrices of a llama that have a bias.
        cross: each block of a gpt2 has cross-attention, too.
        stored: the recipe (of `measure.memory`) that the checkpoint's own quantisation is; None where it has none.

    Raises:
        ValueError: an unknown kind, a size that is not a positive whole number, heads that do not share evenly.
    """

    kind: str
    vocab: int
    hidden: int
    wide: int          # hidden units of the MLP
    layers: int
    heads: int
    kv_heads: int
    context: int
    head_dim: int
    tied: bool = False
    biased: tuple[str, ...] = ()
    cross: bool = False
    stored: str | None = None

    def __post_init__(self):
        if self.kind not in ("llama", "gpt2"):
            raise ValueError(f"an architecture {self.kind!r} cannot be counted here: give a config.json with "
                             f"model_type 'llama' or 'gpt2', or one of the presets: {', '.join(PRESETS)}.")
        for name in ("vocab", "hidden", "wide", "layers", "heads", "kv_heads", "context", "head_dim"):
            value = whole(getattr(self, name))
            if value is None or not 0 < value < 2**40:
                raise ValueError(f"{name}={repr(getattr(self, name))[:40]}: a size is a whole number from 1 to 2**40.")
            object.__setattr__(self, name, value)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly.")

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, (out_features, in_features), under the names that `target_modules` uses."""
        C, F, q, kv = self.hidden, self.wide, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.kind == "gpt2":
            return {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (F, C), "mlp.c_proj": (C, F)}
        return {"q_proj": (q, C), "k_proj": (kv, C), "v_proj": (kv, C), "o_proj": (C, q), "gate_proj": (F, C),
                "up_proj": (F, C),
                "down_proj": (C, F)}

    def linear(self) -> int:
        """Numbers in the matrices of all blocks, without biases: what LoRA can adapt and NF4 stores in four bits."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices().values())

    def parameters(self) -> int:
        """All of them; a tied output head counts once."""
        C = self.hidden
        if self.kind == "gpt2":                                          # norms and linear layers have biases
            # of the block, and of cross-attention: c_attn (2C, C), q_attn, c_proj (C, C) and a norm
            block = 4 * C + sum(rows for rows, _ in self.matrices().values()) + self.cross * (4 * C * C + 6 * C)
            return self.linear() + self.layers * block + (self.vocab * (2 - self.tied) + self.context) * C + 2 * C
        biases = sum(self.matrices()[name][0] for name in self.biased)
        return self.linear() + self.layers * (2 * C + biases) + C + (1 if self.tied else 2) * self.vocab * C

    def adapter(self, targets: tuple[str, ...] | str, rank: int) -> int:
        """Numbers of a LoRA: rank · (in + out) for each adapted matrix (Hu et al. 2021, section 4.1)."""
        return self.layers * sum(rank * (rows + columns) for rows, columns in self.adapted(targets, rank).values())

    def adapted(self, targets: tuple[str, ...] | str, rank: int) -> dict[str, tuple[int, int]]:
        """The matrices of a block that the targets name, by their endings as in `apply_lora`; "all-linear" is all of
        them.

        Raises:
            ValueError: a target that names none, or a rank that does not fit the smallest.
        """
        named = self.matrices()
        if not targets:
            raise ValueError(f"no target is given: choose from {', '.join(named)}, or 'all-linear'.")
        chosen = named
        if targets != "all-linear":
            chosen = {name: shape for name, shape in named.items()
                      if any(("." + name).endswith("." + target) for target in targets)}
        if targets != "all-linear":
            for target in targets:
                if not any(("." + name).endswith("." + target) for name in named):
                    raise ValueError(f"no matrix is named {target!r}: choose from {', '.join(named)}, or 'all-linear'.")
        largest = min(min(shape) for shape in chosen.values())
        if whole(rank) is None or not 1 <= rank <= largest:
            raise ValueError(f"rank={rank!r} does not fit: choose a whole number, "
                             f"1 <= rank <= {largest}, the smallest side of a target.")
        return chosen

    def llama_config(self) -> LlamaConfig:
        """What `Llama` is built from. Raises ValueError for another architecture."""
        if self.kind != "llama" or self.biased:
            raise ValueError(f"a {self.kind}{' with biases' * bool(self.biased)} is counted here and not built: load "
                             "it with transformers.")
        return LlamaConfig(self.vocab, self.hidden, self.wide, self.layers, self.heads, self.kv_heads, self.context,
                           self.head_dim,
                           tie_word_embeddings=self.tied)

    @classmethod
    def from_config(cls, config: dict) -> "Sizes":
        """From the entries of a config.json.

        Raises ValueError for another architecture, or a size that it does not say.
        """
        kind = config.get("model_type")
        if kind not in ("llama", "gpt2"):
            cls(kind, 1, 1, 1, 1, 1, 1, 1, 1)                            # says what can be counted
        keys = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions") if kind == "gpt2" else (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if missing := [key for key in keys if key not in config]:
            raise ValueError(f"the config does not say {', '.join(missing)}: "
                             f"it is not the whole config of a {kind} model.")
        if kind == "gpt2":
            vocab, C, layers, heads, context = (config[key] for key in keys)
            wide, head_dim = config.get("n_inner") or 4 * C, _share(C, heads)
            return cls(kind, vocab, C, wide, layers, heads, heads, context, head_dim,
                       config.get("tie_word_embeddings") is not False, cross=bool(config.get("add_cross_attention")),
                       stored=_stored(config))
        vocab, C, layers, heads, wide = (config[key] for key in keys)
        biased = ("q_proj", "k_proj", "v_proj", "o_proj") * bool(config.get("attention_bias"))
        biased += ("gate_proj", "up_proj", "down_proj") * bool(config.get("mlp_bias"))
        return cls(kind, vocab, C, wide, layers, heads, config.get("num_key_value_heads") or heads,
                   config.get("max_position_embeddings") or 2048, config.get("head_dim") or _share(C, heads),
                   bool(config.get("tie_word_embeddings", False)), biased, stored=_stored(config))


def _share(hidden: int, heads: int) -> int:
    if whole(hidden) is None or whole(heads) is None or heads < 1:
        raise ValueError(f"hidden size {hidden!r}, {heads!r} heads: sizes are whole numbers, 1 or more.")
    return hidden // heads


def _stored(config: dict) -> str | None:
    """The recipe of a checkpoint's own quantisation; what is not known here has to be said, as `recipe`."""
    said = config.get("quantization_config") or {}
    if not isinstance(said, dict):
        raise ValueError(f"quantization_config={said!r}: a config.json has names and values there.")
    if said.get("load_in_4bit"):
        return "nf4-double" if said.get("bnb_4bit_use_double_quant") else "nf4"
    return f"{said.get('quant_method') or 'unknown'} quantisation" if said else None


def _gpt2(hidden: int, layers: int, heads: int, context: int = 1024) -> Sizes:
    return Sizes("gpt2", 50257, hidden, 4 * hidden, layers, heads, heads, context, hidden // heads, True)


def _llama(vocab: int, hidden: int, wide: int, layers: int, heads: int, kv_heads: int, context: int,
           tied: bool = False) -> Sizes:
    return Sizes("llama", vocab, hidden, wide, layers, heads, kv_heads, context, hidden // heads, tied)


PRESETS = {
    "fable": _llama(2048, 256, 688, 4, 8, 8, 512, True),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 8192, True),
    "gpt2": _gpt2(768, 12, 12), "gpt2-medium": _gpt2(1024, 24, 16), "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama-7b": _llama(32000, 4096, 11008, 32, 32, 32, 2048), "llama-13b": _llama(32000, 5120, 13824, 40, 40, 40, 2048),
    "llama-65b": _llama(32000, 8192, 22016, 80, 64, 64, 2048),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, 131072),
    "llama-3.1-70b": _llama(128256, 8192, 28672, 80, 64, 8, 131072),
    "gpt3-175b": _gpt2(12288, 96, 96, 2048),
}


def sizes_of(name: str | Path) -> Sizes:
    """A preset, a config.json, a folder that has one, or a name on the hub (owner/name; needs a network).

    Raises:
        ValueError: no such preset, or a config that cannot be counted.
        RuntimeError: the hub did not give it.
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if not HUB_NAME.fullmatch(str(name)) or path.suffix == ".json":
            near = get_close_matches(str(name).lower(), PRESETS, n=1)
            raise ValueError(f"{str(name)!r} is no preset and no file"
                             + (f"; did you mean {near[0]!r}?" if near else "") +
                             f" Choose one of {', '.join(PRESETS)}, a config.json, "
                             "or a name on the hub such as owner/name.")
        file = from_hub(str(name), ["config.json"]) / "config.json"
        if not file.is_file():
            raise RuntimeError(f"{str(name)!r} has no config.json on the hub: give the name of a model.")
    return Sizes.from_config(read_json(file, "the config.json of a model"))
