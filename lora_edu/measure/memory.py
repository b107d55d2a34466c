"""What training costs in memory, predicted by formula; `memory_measured.py` measures it.

Read `RECIPES` first: bytes for each number that is stored; then `kept`, the rules of what autograd keeps for the
backward pass, one line a tensor, which can be checked by hand.

With N = batch · length tokens, C the hidden size, F the MLP's, a LoRA saves gradients and optimizer states, but most of
what is kept is N · C or N · F and stays: the chain rule needs it to reach the first adapter.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

from lora_edu.models.sizes import Sizes, sizes_of
from lora_edu.numbers import bytes_in_words, whole
from lora_edu.tables import ShowsTables, Table
from lora_edu.training.group import STRATEGIES


class Recipe(NamedTuple):
    """Bytes for each number: of a block's frozen matrices, of all else that is frozen; of what trains in full
    fine-tuning, its gradient, a float32 copy that the optimizer keeps, one optimizer state; of an adapter's numbers
    (weight, gradient, state); of activations."""

    frozen: float
    other: int
    trained: int
    gradient: int
    master: int
    state: int
    adapter: int
    activation: int


# Dettmers et al. (2023), section 3: four bits, a float32 constant for each 64
NF4 = 4 / 8 + 4 / 64
# constants in eight bits, and a float32 constant for each 256 of those
NF4_DOUBLE = 4 / 8 + 1 / 64 + 4 / (64 * 256)
RECIPES = {
    "fp32": Recipe(4, 4, 4, 4, 0, 4, 4, 4),
    # 16 bytes a number with Adam; adapters in float32, as PEFT makes them
    "bf16-mixed": Recipe(2, 2, 2, 2, 4, 4, 4, 2),
    "16-bit": Recipe(2, 2, 2, 2, 0, 2, 2, 2),
    "nf4": Recipe(NF4, 2, 0, 0, 0, 4, 4, 2),         # adapters only: four bits do not train
    "nf4-double": Recipe(NF4_DOUBLE, 2, 0, 0, 0, 4, 4, 2),
}
# states a number, and bytes of a state where the recipe does not say: 8-bit AdamW keeps a float32 constant for each 256
OPTIMIZERS = {"sgd": (0, None), "adam": (2, None), "adamw-8bit": (2, 1 + 4 / 256)}


class Kept(NamedTuple):
    """A tensor that autograd keeps: what it is, its rule, how many numbers, bytes of each."""

    what: str
    rule: str
    numbers: int
    bytes_each: float

    @property
    def bytes(self) -> float:
        return self.numbers * self.bytes_each


def kept(sizes: Sizes, batch: int, length: int, targets=None, rank: int = 8, act: int = 4, factor: int = 4,
         first: bool = False) -> list[Kept]:
    """What one block keeps for the backward pass, without dropout: the rules. Full fine-tuning where `targets` is None.

    They hold for the course's `Llama`, for transformers' where every query head has a key head of its own (else it
    keeps fewer keys and values), and for transformers' GPT-2 in float32; with fused attention, which keeps no matrix of
    scores.

    Args:
        act: bytes of an activation.
        factor: bytes of an adapter's numbers; where they are wider than the activations, each adapted layer keeps a
            copy of its input.
        first: the block is the first above a frozen embedding, so nothing behind its first adapter is kept.
    """
    N, C, F, q = batch * length, sizes.hidden, sizes.wide, sizes.heads * sizes.head_dim
    shapes = None if targets is None else sizes.adapted(targets, rank)
    block, gpt2 = _Block(shapes, act, factor), sizes.kind == "gpt2"
    attention, out, inputs, down = GPT2_PARTS if gpt2 else LLAMA_PARTS

    flows = block.full or not first                   # does anything before this point train?
    block.norm("first", N, C, flows, gpt2)
    block.read(attention, "N·C", N * C)
    attends = flows or block.trains(*attention)
    block.keep(attends, "attention: queries, keys, values, output", "4 · N·H·D", 4 * N * q)
    block.keep(attends, "attention: log of the sum in the softmax", "N·H", N * sizes.heads, 4)
    block.read((out,), "N·H·D", N * q, there=attends)
    flows = attends or block.trains(out)
    block.norm("second", N, C, flows, gpt2)
    block.read(inputs, "N·C", N * C)
    if gpt2:
        block.keep(flows or block.trains(*inputs), "GELU: input, half of it, tanh, 1 + tanh", "4 · N·F", 4 * N * F)
    else:
        block.keep(flows or block.trains("gate_proj"), "SiLU: input, and the factor from up_proj", "2 · N·F", 2 * N * F)
        block.keep(flows or block.trains("up_proj"), "SiLU: output", "N·F", N * F)
    block.read((down,), "N·F", N * F)
    for name, (rows_of_B, _) in block.shapes.items():
        block.keep(True, f"adapter of {name}: x Aᵀ, and B laid out anew", "N·r + r·out", N * rank + rank * rows_of_B,
                   factor)
    return block.rows


LLAMA_PARTS = (("q_proj", "k_proj", "v_proj"), "o_proj", ("gate_proj", "up_proj"), "down_proj")
GPT2_PARTS = (("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj")


class _Block:
    """The rows of one block, as `kept` writes them down; `shapes` are the adapted matrices, None where all train."""

    def __init__(self, shapes: dict | None, act: int, factor: int):
        self.full, self.shapes, self.act, self.factor = shapes is None, shapes or {}, act, factor
        self.rows: list[Kept] = []

    def trains(self, *names: str) -> bool:
        return self.full or any(name in self.shapes for name in names)

    def keep(self, needed: bool, what: str, rule: str, numbers: int, each: float | None = None) -> None:
        if needed:
            self.rows.append(Kept(what, rule, numbers, self.act if each is None else each))

    def read(self, names: tuple[str, ...], rule: str, numbers: int, there: bool = False) -> None:
        """The input of linear layers: one for all of them, or a copy for each adapted one.

        `there`: something else keeps it already.
        """
        if self.full or self.factor == self.act:
            self.keep(self.trains(*names) and not there, f"input of {', '.join(names)}", rule, numbers)
        else:
            copies = sum(name in self.shapes for name in names)
            self.keep(copies > 0, f"input of {', '.join(names)}, in the adapters' type", f"{copies} · {rule}",
                      copies * numbers, self.factor)

    def norm(self, which: str, N: int, C: int, flows: bool, gpt2: bool) -> None:
        if gpt2:
            self.keep(flows, f"{which} norm: input", "N·C", N * C)
            self.keep(flows, f"{which} norm: mean, 1/deviation", "2 · N", 2 * N, 4)
        else:                                         # computed in float32, whatever comes in
            self.keep(flows, f"{which} norm: input, 1/rms", "N·C + N", N * C + N, 4)
            self.keep(self.full, f"{which} norm: normalised", "N·C", N * C)


def _kept_outside(sizes: Sizes, batch: int, length: int, full: bool, act: int = 4) -> list[Kept]:
    """What is kept beside the blocks: positions, the last norm, the loss."""
    N, C = batch * length, sizes.hidden
    rows = [Kept("loss: log-probabilities", "N·V", N * sizes.vocab, 4), Kept("loss: targets", "N", N, 8),
            Kept("loss: count", "1", 1, 4)]
    if sizes.kind == "gpt2":
        rows += [Kept("last norm: input", "N·C", N * C, act), Kept("last norm: mean, 1/deviation", "2 · N", 2 * N, 4)]
        return rows + full * [Kept("embedding: ids", "N", N, 8), Kept("embedding: positions", "T", length, 8),
                              Kept("last norm: output", "N·C", N * C, act)]
    rows += [Kept("rotary cos, sin", "2 · T·D", 2 * length * sizes.head_dim, act),
             Kept("last norm: input, 1/rms", "N·C + N", N * C + N, 4)]
    return rows + full * [Kept("embedding: ids", "N", N, 8),
                          Kept("last norm: normalised, output", "2 · N·C", 2 * N * C, act)]


@dataclass(frozen=True, repr=False)
class Bill(ShowsTables):
    """Predicted bytes by category. `tensors`: (how many blocks, what they keep), the rules behind the activations."""

    model: str
    parameters: int
    trainable: int
    parts: dict[str, float]
    tensors: tuple[tuple[int, Kept], ...]
    recipe: str
    length: int

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    def rows(self) -> list[tuple[str, str, str]]:
        return [(name, f"{value:,.0f}", bytes_in_words(value))
                for name, value in (*self.parts.items(), ("total", self.total))]

    def summary(self) -> str:
        return f"{self.model}: {self.parameters:,} parameters; {self.trainable:,} numbers train."

    def tables(self) -> list[Table]:
        return [Table((self.model, "bytes", "size"), self.rows(), self.summary())]


def bill(model: str | Sizes, method: str = "lora", rank: int = 8, targets="all-linear", recipe: str | None = None,
         optimizer: str = "adam", batch: int = 1, length: int | None = None, checkpointing: bool = False,
         strategy: str | None = None, processes: int = 1) -> Bill:
    """What a training step needs, by category, from sizes alone.

    Args:
        model: a preset, a config.json, a folder with one, a name on the hub, or `Sizes`.
        method: "full" (everything trains) or "lora" (rank and targets, as in `apply_lora`).
        recipe, optimizer: keys of `RECIPES` and `OPTIMIZERS`; where no recipe is given, "bf16-mixed", or the four bits
            that the model's config says it is stored in.
        length: tokens of a text; 2,048, or the model's context where that is shorter.
        checkpointing: each block keeps its input alone and is computed again in the backward pass.
        strategy, processes: one of `STRATEGIES`, and the bill is one process's, of so many; batch is its own rows.

    "temporary" is the larger of two moments: the loss going back through the logits, in two float32 copies whatever
    the recipe, and, with checkpointing, the one block that is there again. "allocator" is an allowance of 5 % on what
    comes and goes, a guess and no prediction: a CPU's accounting does not need it. "in transit" is what a strategy
    holds besides (`_share_out`).

    Raises:
        ValueError: an unknown name, a batch or length that is no whole number above zero, a length beyond the context,
            a rank that does not fit, full fine-tuning of four-bit weights, four-bit weights under FSDP2, which does
            not share them out, cross-attention, whose activations have no rule here.
    """
    sizes = model if isinstance(model, Sizes) else sizes_of(model)
    recipe = recipe or sizes.stored or "bf16-mixed"
    length = min(2048, sizes.context) if length is None else length
    _check(sizes, method, recipe, optimizer, batch, length, strategy, processes)
    rank, batch, length = whole(rank), whole(batch), whole(length)
    full, byte = method == "full", RECIPES[recipe]
    P, linear = sizes.parameters(), sizes.linear()
    trainable = P if full else sizes.adapter(targets, rank)
    states, each = OPTIMIZERS[optimizer]
    parts = {
        "weights": P * byte.trained if full else linear * byte.frozen + (P - linear) * byte.other,
        "adapter": 0 if full else trainable * byte.adapter,
        "gradients": trainable * (byte.gradient if full else byte.adapter),
        "optimizer states": trainable
        * (states * (each or (byte.state if full else byte.adapter)) + (byte.master if full else 0)),
    }
    act, N = byte.activation, batch * length
    blocks = [kept(sizes, batch, length, None if full else targets, rank, act, byte.adapter, first)
              for first in (not full, False)]
    again = 0.0
    if checkpointing:
        again = sum(row.bytes for row in blocks[1])
        blocks = [[Kept("input of the block", "N·C", N * sizes.hidden, act)]] * 2
    tensors = [(1, row) for row in (*_kept_outside(sizes, batch, length, full, act), *blocks[0])]
    tensors += [(sizes.layers - 1, row) for row in blocks[1] if sizes.layers > 1]
    parts["activations"] = sum(times * row.bytes for times, row in tensors)
    parts["temporary"] = max(8 * N * sizes.vocab, again)
    if strategy:
        _share_out(parts, sizes, full, byte, strategy, processes)
    parts["allocator (an allowance)"] = 0.05 * (parts["activations"] + parts["temporary"])
    name = model if isinstance(model, str) else f"a {sizes.kind} model"
    return Bill(name, P, trainable, parts, tuple(tensors), recipe, length)


def _share_out(parts: dict[str, float], sizes: Sizes, full: bool, byte: Recipe, strategy: str, processes: int) -> None:
    """One process's part of a bill. DDP keeps everything in each, and the gradients a second time, in the buckets that
    it sends. FSDP2 keeps a share of each tensor (even here; of an A with fewer rows than there are processes some have
    nothing). While it works there are, whole, what is outside the blocks and, in the backward pass, twice a block (in
    use, and the next one's buffer) and twice a block's gradients (its own, and the last one's buffer; of one or two
    blocks less); a head that trains has its gradient whole until the end. So torch's own accounting has it; NCCL and
    gloo may copy once more.
    """
    if strategy == "ddp":
        parts["in transit"] = parts["gradients"]
        return
    numbers = 2 * replace(sizes, layers=1).parameters() - replace(sizes, layers=2).parameters()
    outside = numbers * (byte.trained if full else byte.other)
    block = (parts["weights"] + parts["adapter"] - outside) / sizes.layers
    sent = (parts["gradients"] - full * numbers * byte.gradient) / sizes.layers
    head = full * sizes.vocab * sizes.hidden * byte.gradient
    parts["in transit"] = outside + head + 2 * block + min(2, sizes.layers - 1) * sent
    for name in ("weights", "adapter", "gradients", "optimizer states"):
        parts[name] /= processes


def _check(sizes: Sizes, method: str, recipe: str, optimizer: str, batch: int, length: int, strategy: str | None,
           processes: int) -> None:
    """What `bill` refuses."""
    for name, value, known in (("recipe", recipe, RECIPES), ("optimizer", optimizer, OPTIMIZERS),
                               ("method", method, ("full", "lora")), ("strategy", strategy, (None, *STRATEGIES))):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}.")
    for name, value in (("batch", batch), ("length", length), ("processes", processes)):
        if whole(value) is None or value < 1:
            raise ValueError(f"{name}={value!r}: choose a whole number, 1 or more.")
    if length > sizes.context:
        raise ValueError(f"length={length} does not fit: the model reads at most {sizes.context:,} tokens.")
    if sizes.cross:
        raise ValueError("the model has cross-attention, and what autograd keeps of that has no rule here: count its "
                         "numbers with sizes_of(…).parameters(), and measure the rest.")
    if processes != 1 and strategy is None:
        raise ValueError(f"processes={processes} without a strategy: choose one of "
                         f"{', '.join(map(repr, STRATEGIES))}.")
    if strategy == "fsdp" and not RECIPES[recipe].trained:
        raise ValueError(f"recipe={recipe!r} with strategy='fsdp': weights in four bits are no parameters, and FSDP2 "
                         "shares those out; choose another recipe, or 'ddp'.")
    if method == "full" and not RECIPES[recipe].trained:
        raise ValueError(f"recipe={recipe!r} stores the weights in four bits, and those do not train: choose "
                         "method='lora', or another.")
