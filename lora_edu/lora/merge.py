"""Fold the updates into the weights, take them out again, turn them down: what can be done with a LoRA once it is
there.

A merge adds s·BA to W₀ and rounds the sum to the weight's dtype. A weight keeps 24 binary digits in float32, 11 in
float16, 8 in
bfloat16: an update below half the step to the next number is lost. `MergeReport` says how much was.
"""
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from lora_edu.lora.factors import some_lora_layers
from lora_edu.lora.inject import replace
from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.quantized import base_weight, is_quantized, plain_layer
from lora_edu.lora.targets import by_ending, shorten, unwrap
from lora_edu.tables import ShowsTables, Table


class Rounding(NamedTuple):
    """What became of one update, or of several: `asked` entries have an update that is not zero, `lost` of these did
    not move.
    """

    entries: int
    asked: int
    lost: int
    weight: float    # ‖W₀‖, Frobenius
    delta: float     # ‖ΔW‖
    off: float       # ‖(merged - W₀) - ΔW‖

    @classmethod
    @torch.no_grad()
    def of(cls, weight: torch.Tensor, delta: torch.Tensor, folded: torch.Tensor) -> "Rounding":
        """Compare what was asked, `delta`, with what arrived, `folded - weight`; in float64 (float32 where there may be
        none, as on MPS).
        """
        wide = torch.float64 if weight.device.type in ("cpu", "cuda") else torch.float32
        arrived = folded.to(wide, copy=True).sub_(weight)
        asked, lost = torch.count_nonzero(delta), torch.count_nonzero(delta[arrived == 0])
        weight, delta, off = (torch.linalg.vector_norm(t, dtype=wide) for t in (weight, delta, arrived.sub_(delta)))
        return cls(folded.numel(), int(asked), int(lost), float(weight), float(delta), float(off))

    @classmethod
    def total(cls, *parts: "Rounding") -> "Rounding":
        *counts, weight, delta, off = zip(*parts, strict=True)
        return cls(*map(sum, counts), math.hypot(*weight), math.hypot(*delta), math.hypot(*off))

    @property
    def size(self) -> float:
        """‖ΔW‖ / ‖W₀‖."""
        return self.delta / self.weight if self.weight else math.inf

    @property
    def rounded_away(self) -> float:
        """The lost ones' share of the asked entries."""
        return self.lost / max(self.asked, 1)

    @property
    def error(self) -> float:
        """‖(merged - W₀) - ΔW‖ / ‖ΔW‖; an update of zero has none."""
        return self.off / (self.delta or 1)

    def cells(self) -> tuple[str, str, str]:
        return f"{self.size:.3g}", f"{self.rounded_away:.1%}", f"{self.error:.2g}"


@dataclass(frozen=True, repr=False)
class MergeReport(ShowsTables):
    """`parts` by layer name and all of them in `total`, the dtype of the weights, and the bytes kept in memory
    beside W₀.
    """

    parts: dict[str, Rounding]
    dtype: str
    extra_bytes: int

    @property
    def total(self) -> Rounding:
        return Rounding.total(*self.parts.values())

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each name ending."""
        return [(ending, str(len(parts)), *Rounding.total(*parts).cells())
                for ending, parts in by_ending(self.parts).items()]

    def summary(self) -> str:
        size, lost, error = self.total.cells()
        return (f"{len(self.parts)} matrices in {self.dtype}, {self.total.entries:,} entries: the update is {size} of "
                f"W₀; {lost} of its entries were rounded away, what arrived is off by {error} of it. "
                f"{self.extra_bytes:,} more bytes in memory.")

    def tables(self) -> list[Table]:
        return [Table(("layer", "count", "‖ΔW‖/‖W₀‖", "rounded away", "error of ΔW"), self.rows(), self.summary())]


def merge_lora(model: nn.Module) -> MergeReport:
    """Merge every LoRA layer, or none: all sums are made and checked before the first is used.

    Returns:
        How large the update is, what rounding took from it, what the copies cost; it displays as a table.

    Raises:
        RuntimeError: a layer is merged already, or in training mode with dropout.
        ValueError: an update, or its sum with W₀, is not finite; a layer has a forward of its own.

    Source: Hu et al. (2021), section 4.1, "No Additional Inference Latency".

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> merge_lora(model).extra_bytes     # W₀ is kept, so that unmerging is exact
    384
    """
    layers = some_lora_layers(model)
    merged = [name for name, layer in layers if layer.merged]
    if merged:
        raise RuntimeError(f"merged already: {shorten(merged)}. Call unmerge_lora(model) first.")
    folded, report = _fold_all(layers, keep=True)
    _set_merged(layers, folded)
    return report


def _set_merged(layers: list[tuple[str, LoRALinear]], weights: list) -> None:
    """Every layer's merged weight (None: apart), or, stopped on the way, none of them."""
    before = [layer.merged_weight for _, layer in layers]
    try:
        for (_, layer), weight in zip(layers, weights, strict=True):
            layer.merged_weight = weight
    except BaseException:
        for (_, layer), weight in zip(layers, before, strict=True):
            layer.merged_weight = weight
        raise


def unmerge_lora(model: nn.Module) -> None:
    """Back to W₀ beside its update, bit for bit. Raises RuntimeError if a layer is not merged; then nothing is changed.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2), merge_lora(model)
    >>> unmerge_lora(model)
    >>> model[0].merged
    False
    """
    layers = some_lora_layers(model)
    apart = [name for name, layer in layers if not layer.merged]
    if apart:
        raise RuntimeError(f"not merged: {shorten(apart)}. Call merge_lora(model) first.")
    _set_merged(layers, [None] * len(layers))


def remove_lora(model: nn.Module, *, merge: bool) -> MergeReport | None:
    """Put the plain layers back: with the update written into their weights (`merge=True`), or as they were (`False`).

    Written in place, one matrix at a time: no second copy of the model is needed. A merged model is welcome: the update
    is added to W₀, which a merge never touches. Stopped on the way (Ctrl-C), every layer is either done or as it was,
    and the same call goes on. Parameters stay frozen; call `model.requires_grad_(True)` to train them.

    Returns:
        With `merge=True` what `merge_lora` returns.

    Raises (`merge=True`; then nothing has been changed):
        RuntimeError: a layer is in training mode with dropout.
        ValueError: an update, or its sum with W₀, is not finite; a layer has a forward of its own.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> remove_lora(model, merge=False)
    >>> type(model[0]).__name__
    'Linear'
    """
    layers = some_lora_layers(model)
    report = _fold_all(layers, keep=False)[1] if merge else None      # all are checked before the first is written
    for name, layer in layers:
        _put_plain_back(unwrap(model), name, layer, merge)
    return report


def _put_plain_back(model: nn.Module, name: str, layer: LoRALinear, merge: bool) -> None:
    """One layer, or nothing: were the update written and its factors still there, the next call would add it again."""
    if is_quantized(layer.base_layer):                       # what is stored stays; a merge needs a plain layer
        plain = plain_layer(layer.base_layer) if merge else layer.base_layer
        if merge:
            plain.weight.copy_(layer.folded_weight())
        replace(model, name, plain)
        return
    weight = layer.base_layer.weight.data
    folded, before = (layer.folded_weight(), weight.clone()) if merge else (weight, None)
    try:
        if merge:
            weight.copy_(folded)
        replace(model, name, layer.base_layer)
    except BaseException:
        if merge:
            weight.copy_(before)
        replace(model, name, layer)
        raise


def _fold_all(layers: list[tuple[str, LoRALinear]], keep: bool) -> tuple[list[torch.Tensor], MergeReport]:
    """Every W₀ + update (an empty list without `keep`: then one is in memory at a time) and the report; no layer is
    changed.
    """
    folded, parts = [], {}
    for name, layer in layers:
        try:
            weight, delta = layer.fold()
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{name}: {error}") from None
        parts[name] = Rounding.of(base_weight(layer.base_layer), delta, weight)
        if keep:
            folded.append(weight)
    dtypes = dict.fromkeys(str(base_weight(layer.base_layer).dtype).removeprefix("torch.") for _, layer in layers)
    return folded, MergeReport(parts, ", ".join(dtypes), sum(weight.nbytes for weight in folded))


def set_strength(model: nn.Module, strength: float) -> None:
    """Turn every update to `strength` times what was trained: 0 is the base, 1 the adapter, between them a mixture. No
    unit.

    Raises:
        RuntimeError: a layer is merged, and the merged weight would not follow.
        ValueError: the model has no LoRA.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2, alpha=4)
    >>> set_strength(model, 0.5)
    >>> model[0].scaling     # half of alpha / rank
    1.0
    """
    layers = some_lora_layers(model)
    merged = [name for name, layer in layers if layer.merged]
    if merged:
        raise RuntimeError(f"merged: {shorten(merged)}. Call unmerge_lora(model), then turn the dial.")
    for _, layer in layers:
        layer.set_strength(strength)


@contextlib.contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes, bit for bit, merged or not; PEFT's `disable_adapter`.

    Raises ValueError if the model has no LoRA.

    >>> from lora_edu import apply_lora
    >>> model, x = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), torch.randn(5, 12)
    >>> base = model(x)
    >>> _ = apply_lora(model, ["0"], rank=2), nn.init.normal_(model[0].lora_B)
    >>> with lora_off(model):
    ...     torch.equal(model(x), base)
    True
    >>> torch.equal(model(x), base)
    False
    """
    layers = [layer for _, layer in some_lora_layers(model)]
    were = [layer.off for layer in layers]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer, was in zip(layers, were, strict=True):
            layer.off = was
