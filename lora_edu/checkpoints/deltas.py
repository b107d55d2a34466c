"""What fine-tuning changed: the difference of two models, one matrix at a time, and a list of all that is no such
matrix.

Nothing is dropped in silence: a tensor is either yielded as a `Delta` or stands in `others` with the reason.
"""
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lora_edu.checkpoints.kinds import BARE, CARRIED, CONV1D, CONVOLUTION, LOOSE, kind_of, stores_conv1d
from lora_edu.checkpoints.reading import Side, as_named_by, open_side
from lora_edu.lora.targets import ends_in, shorten
from lora_edu.tables import ShowsTables, Table

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RELATED = 0.1           # mean cosine of W₀ and W₁: fine-tuned pairs have more than 0.8, unrelated ones about 0
PIECE = 2**16           # entries that are summed in their own precision


class Delta(NamedTuple):
    """One matrix before and what was added to it, both (out_features, in_features); a convolution is seen as (out, in *
    k * k).

    Float32, or float64 where a side is. `name` is the module's; a tensor that is not called ".weight" keeps its whole
    name.
    `weight` may share memory with the base model: read it, do not write into it.
    """

    name: str
    weight: torch.Tensor
    delta: torch.Tensor


class Other(NamedTuple):
    """A tensor that is no matrix a LoRA could change."""

    name: str
    kind: str                   # "bias", "norm", "embedding", "tied to …", "32000 x 576 became 32002 x 576", …
    squared: float | None       # squared change, the sum over its entries; None where no difference can be taken


@dataclass(frozen=True, repr=False)
class ChangeReport(ShowsTables):
    """What a LoRA on the matrices of a pair would carry, and what it would leave out, as a table.

    Squared changes (sums over entries) of a pair of models, by what carries them: a LoRA on linear layers and
    convolutions, or nothing.

    Attributes:
        matrices: how many matrices a LoRA can change; changed: how many of them did change.
        squared: their squared change, all together.
        others: everything else.
    """

    matrices: int
    changed: int
    squared: float
    others: list[Other] = field(repr=False)

    @property
    def others_squared(self) -> float:
        return sum(other.squared or 0.0 for other in self.others)

    @property
    def others_share(self) -> float:
        """Share of the whole squared change that a LoRA on the matrices leaves out, 0 to 1; what could not be compared
        is not in it.
        """
        whole = self.squared + self.others_squared
        return self.others_squared / whole if whole else 0.0

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of the others: kind, how many, the first of them, share of the whole squared change."""
        kinds: dict[str, list[Other]] = {}
        for other in self.others:
            kinds.setdefault(other.kind, []).append(other)
        return [(kind, str(len(those)), those[0].name, self.share(those)) for kind, those in kinds.items()]

    def share(self, those: list[Other]) -> str:
        whole = self.squared + self.others_squared
        known = [other.squared for other in those if other.squared is not None]
        if not known:
            return "no difference"
        return "unchanged" if not sum(known) else "changed" if self.not_compared else f"{sum(known) / whole:.2%}"

    @property
    def not_compared(self) -> list[Other]:
        """What is on one side only, or of unlike shapes, or of numbers that are not floating and differ."""
        return [other for other in self.others if other.squared is None and not other.kind.startswith("tied to")]

    def summary(self) -> str:
        said, alone = f"{self.changed} of {self.matrices} matrices changed", self.not_compared
        if not alone:
            return f"{said}; a LoRA on them leaves out {self.others_share:.2%} of the squared change."
        return (f"{said}; {len(alone)} tensors could not be compared (first: {alone[0].name}, {alone[0].kind}), so "
                "what a LoRA leaves out has no share.")

    def tables(self) -> list[Table]:
        head = ("left out of a LoRA", "count", "first of them", "share of the squared change")
        return [Table(head, self.rows() if self.others else [], self.summary())]


class Measured(NamedTuple):
    squared: float          # of ΔW, the sum over its entries
    cosine: float | None    # of W₀ and W₁; None where one of them is zero


class Deltas:
    """What `deltas` returns: iterate over it as often as you like, it reads anew each time.

    Attributes:
        base, tuned: the two sides, with `names`, `shapes` and `get(tensor_name)`.
        matrices: tensor name -> kind, of what iterating yields, in the base's order.
        measured: tensor name -> squared change and cosine, filled as the iteration goes.
    """

    def __init__(self, base: nn.Module | str | Path, tuned: nn.Module | str | Path, kinds: Mapping[str, str]):
        self.base, self.kinds = open_side(base), kinds
        self.tuned, done = as_named_by(open_side(tuned), self.base)
        if done:
            warnings.warn(f"{done}.", stacklevel=3)
        self.matrices: dict[str, str] = {}
        self.measured: dict[str, Measured] = {}
        self.warned = False
        self.set_aside: dict[str, str] = {}                 # differences to take, but not of matrices
        self.without_difference: dict[str, str] = {}
        if not set(self.base.names) & set(self.tuned.names):
            first = [next(iter(side.names), "nothing at all") for side in (self.base, self.tuned)]
            raise ValueError(f"the two models have no tensor name in common: {self.base.source} begins with "
                             f"{first[0]}, {self.tuned.source} with {first[1]}. Give a model and its own fine-tune, "
                             "saved in the same form.")
        self.sort_tensors()

    def sort_tensors(self) -> None:
        conv1d = stores_conv1d(self.base.shapes)
        for name in dict.fromkeys([*self.base.names, *self.tuned.names]):
            reason = _no_difference(name, self.base, self.tuned)
            if reason:
                self.without_difference[name] = reason
                continue
            tied = [said for said, side in (("base", self.base), ("tuned", self.tuned)) if name in side.tied]
            layer = self.base.layer(name) or self.tuned.layer(name)
            kind = f"tied in the {tied[0]} model only" if tied else kind_of(name, self.base.shapes[name], layer, conv1d)
            kind = CONVOLUTION if self.told(name) and kind == BARE else kind
            (self.matrices if kind in (*CARRIED, LOOSE, BARE) else self.set_aside)[name] = kind
        strange = [entry for entry in self.kinds if not any(ends_in(name.removesuffix(".weight"), entry)
                                                            for name in self.base.names)]
        if strange:
            raise ValueError(f"no tensor is called {strange[0]!r}: there are {shorten(self.base.names)}.")

    def told(self, name: str) -> bool:
        """Has the caller said that this tensor is the kernel of a plain convolution? ValueError if it cannot be."""
        said = next((kind for entry, kind in self.kinds.items() if ends_in(name.removesuffix(".weight"), entry)), None)
        axes = len(self.base.shapes[name])
        if said not in (None, f"conv{axes - 2}d"):
            raise ValueError(f"{name} has {axes} axes, and kind {said!r} does not: choose conv1d, conv2d or conv3d for "
                             "a kernel of 3, 4 or 5 axes.")
        return said is not None

    def __len__(self) -> int:
        return len(self.matrices)

    def __iter__(self) -> Iterator[Delta]:
        for name in self.matrices:
            yield self.delta(name)                          # no local name: nothing is held while the caller works
        self.warn_if_unrelated()

    def delta(self, name: str) -> Delta:
        """The Delta of one tensor name; both sides are checked for NaN and infinity, and the change is measured."""
        weight, delta, self.measured[name] = self.subtract(name)
        if self.matrices[name] == CONV1D:
            weight, delta = weight.T, delta.T
        return Delta(name.removesuffix(".weight"), weight.flatten(1), delta.flatten(1))

    def subtract(self, name: str) -> tuple[torch.Tensor, torch.Tensor, Measured]:
        """W₀, ΔW as they are stored, and their measures.

        One file is mapped at a time: the peak is two copies and what is 16 bits wide.
        """
        dtype = torch.float64 if torch.float64 in (self.base.dtype(name), self.tuned.dtype(name)) else torch.float32
        delta = self.tuned.get(name).to(dtype, copy=True)
        weight = self.base.get(name).to(dtype)
        before, after = dot(weight, weight), dot(delta, delta)
        for total, tensor, side in ((before, weight, self.base), (after, delta, self.tuned)):
            if not math.isfinite(total) and not tensor.isfinite().all():
                raise ValueError(f"{name} of {side.source} has NaN or infinity in it: that model is broken, take an "
                                 "earlier checkpoint.")
        product = dot(weight, delta := delta.to(weight.device))
        delta.sub_(weight)
        return weight, delta, Measured(dot(delta, delta), product / math.sqrt(before * after) if before * after
                                       else None)

    def warn_if_unrelated(self) -> None:
        """Once for a pair, and only when every matrix has been read."""
        if self.warned:
            return
        self.warned = True
        cosines = [m.cosine for m in self.measured.values() if m.cosine is not None]
        if cosines and abs(sum(cosines) / len(cosines)) < RELATED:
            warnings.warn(f"{self.base.source} and {self.tuned.source} look unrelated: the mean cosine of their "
                          f"matrices is {sum(cosines) / len(cosines):.3f}, and a model and its fine-tune have nearly "
                          "1. The difference of two models trained apart "
                          "says nothing about fine-tuning.", stacklevel=3)

    @cached_property
    def others(self) -> list[Other]:
        """All that is not yielded, with its kind and its squared change (None where no difference can be taken)."""
        taken = [Other(name, kind, self.subtract(name)[2].squared) for name, kind in self.set_aside.items()]
        return taken + [Other(name, reason, self.same(name)) for name, reason in self.without_difference.items()]

    def same(self, name: str) -> float | None:
        """0.0 for numbers that are not floating and are the same on both sides, such as a mask, and for the positions
        that some versions of transformers stored: nothing changed.
        """
        sides = [side for side in (self.base, self.tuned) if name in side.shapes and name not in side.tied]
        if name.endswith("position_ids") and len(sides) == 1:
            return 0.0
        if len(sides) < 2 or self.base.shapes[name] != self.tuned.shapes[name]:
            return None
        one, other = self.base.get(name), self.tuned.get(name)
        return 0.0 if one.dtype == other.dtype and torch.equal(one.to(other.device), other) else None

    def report(self) -> ChangeReport:
        """What a LoRA can carry of this change, and what it cannot; reads what has not been read yet."""
        for name in self.matrices:
            if name not in self.measured:
                self.delta(name)
        self.warn_if_unrelated()
        loose = [Other(name, kind, self.measured[name].squared) for name, kind in self.matrices.items()
                 if kind not in CARRIED]
        carried = [self.measured[name].squared for name, kind in self.matrices.items() if kind in CARRIED]
        return ChangeReport(len(carried), sum(value > 0 for value in carried), sum(carried), loose + self.others)


def deltas(base: nn.Module | str | Path, tuned: nn.Module | str | Path, kinds: Mapping[str, str] | None = None
           ) -> Deltas:
    """The change between a model and its fine-tune: yields a `Delta` (name, W₀, ΔW) for each matrix, one in memory at a
    time.

    A loop variable keeps its matrix until the next one is made: `del` it at the end of the loop's body where memory is
    short. After the last matrix it warns if the two models look unrelated (mean cosine of W₀ and W₁ near zero).

    Args:
        base, tuned: models, folders, .safetensors files, pickled .bin or .pt files of plain tensors, or names on the
            hub such as "HuggingFaceTB/SmolLM2-135M" (fetched to the hub client's cache). The two may be of different
            sorts, and a prefix that only one side's names have ("bert.") is matched, with a warning that says so; what
            is yielded has the base's names.
        kinds: what bare files do not tell: ending of a module's name -> "conv1d", "conv2d" or "conv3d" for the kernel
            of a plain convolution (no groups, dilation or padding of its own, not transposed).

    Raises:
        FileNotFoundError, RuntimeError: a side is not there, or the hub did not give it.
        ValueError: a side is damaged, the sides share no name, or (while iterating) a tensor has NaN or infinity in it.

    >>> base, tuned = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    >>> _ = tuned.load_state_dict({"0.weight": base[0].weight + 0.1, "0.bias": base[0].bias})
    >>> for name, weight, delta in deltas(base, tuned):
    ...     print(name, tuple(delta.shape), f"{delta.mean():.1f}")
    0 (2, 3) 0.1
    """
    return Deltas(base, tuned, kinds or {})


def _no_difference(name: str, base: Side, tuned: Side) -> str | None:
    """Why these two sides have no difference under this name, or None if they have one."""
    for one, other in ((base, tuned), (tuned, base)):
        if name in one.tied and (name not in other.shapes or name in other.tied):
            return f"tied to {one.tied[name]}"
    for said, side in (("tuned", base), ("base", tuned)):
        if name not in side.shapes:
            return f"only in the {said} model"
    if base.shapes[name] != tuned.shapes[name]:
        return f"{_spell(base.shapes[name])} became {_spell(tuned.shapes[name])}"
    strange = [dtype for dtype in (base.dtype(name), tuned.dtype(name)) if dtype not in FLOATS]
    return f"{str(strange[0]).removeprefix('torch.')} numbers" if strange else None


def _spell(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum of the products of two tensors of one type, to about 1e-7: pieces in their own type, the sum of the pieces
    in float64.
    """
    pieces = list(zip(a.reshape(-1).split(PIECE), b.to(a.device).reshape(-1).split(PIECE), strict=True))
    total = sum(torch.dot(x, y).item() for x, y in pieces)
    if total and math.isfinite(total):
        return total
    # squares that leave float32's range
    return sum(torch.dot(x.cpu().double(), y.cpu().double()).item() for x, y in pieces)
