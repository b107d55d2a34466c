"""What merging costs in digits: the same update added to the same matrix in float64, float32, float16 and bfloat16.

Two roads lead away from an exact merge. The sum is rounded to the weights' dtype, so small entries of the update are
lost: `numerics`.
And who unmerges by subtracting gets back not W₀ but W₀ rounded twice more, a little further away with every new
adapter: `drift`. Keeping W₀, as `LoRALinear` does, takes the second road off the map.
"""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lora_edu.lora.layer import rounded_sum, wide_dtype
from lora_edu.lora.merge import Rounding
from lora_edu.tables import Table

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Numerics:
    """A merge in one dtype; all numbers are relative, without unit.

    Attributes:
        size: ‖ΔW‖ / ‖W₀‖.
        output_difference: ‖merged outputs - unmerged outputs‖ / ‖unmerged outputs‖.
        rounded_away: share of the entries with an update that are after the merge what they were before.
        error: ‖(merged - W₀) - ΔW‖ / ‖ΔW‖.
    """

    dtype: torch.dtype
    size: float
    output_difference: float
    rounded_away: float
    error: float


@torch.no_grad()
def numerics(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype, x: torch.Tensor) -> Numerics:
    """Merge in `dtype` as `LoRALinear` does, and compare with the layer apart on the inputs x.

    Args:
        weight, delta: W₀ and its update, both (out_features, in_features). W₀ and x are rounded to `dtype` first, as a
            model loaded in it has them; the update keeps float32 or more, as LoRA's factors do over a 16-bit base.
        x: inputs (..., in_features).

    Raises:
        ValueError: shapes that do not fit, a dtype without fractions, a number that is not finite or leaves the range
            of `dtype`.
    """
    check(weight, delta, dtype)
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)} and the weight reads {weight.shape[1]} inputs: give x as (..., "
                         f"{weight.shape[1]}).")
    w, x, wide = weight.to(dtype), x.to(dtype), wide_dtype(dtype)
    delta = delta.to(wide)
    merged = rounded_sum(w, delta)
    apart = ((x @ w.T).to(wide) + x.to(wide) @ delta.T).to(dtype)
    difference = _distance(apart, x @ merged.T)
    if not math.isfinite(difference):
        raise ValueError(f"the outputs leave the range of {dtype} (largest: "
                         f"{torch.finfo(dtype).max:.4g}): give smaller inputs x.")
    lost = Rounding.of(w, delta, merged)
    return Numerics(dtype, lost.size, difference, lost.rounded_away, lost.error)


def _distance(start: torch.Tensor, end: torch.Tensor) -> float:
    """‖end - start‖ / ‖start‖, 0 where nothing changed."""
    both = Rounding.of(start, torch.zeros_like(start), end)
    return both.off / both.weight if both.off else 0.0


def check(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> None:
    if weight.ndim != 2 or weight.shape != delta.shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, the update {tuple(delta.shape)}: "
                         "give two matrices of one shape.")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} has no fractions: choose one of {', '.join(map(str, DTYPES))}.")


def table(found: Sequence[Numerics]) -> Table:
    """One row for each, such as `[numerics(weight, delta, dtype, x) for dtype in DTYPES]`."""
    head = ("dtype", "‖ΔW‖/‖W₀‖", "output difference", "rounded away", "error of ΔW")
    return Table(head,
                 [(str(n.dtype).removeprefix("torch."), f"{n.size:.3g}", f"{n.output_difference:.1e}",
                   f"{n.rounded_away:.1%}",
                                f"{n.error:.1e}") for n in found])


def of_size(delta: torch.Tensor, weight: torch.Tensor, size: float) -> torch.Tensor:
    """The same update, longer or shorter: ‖ΔW‖ = size · ‖W₀‖ (Frobenius).

    An update of zero has no direction and is refused.
    """
    if not delta.any():
        raise ValueError("the update is zero, so it cannot be given a size: train it first.")
    return delta * (size * weight.norm() / delta.norm())


@torch.no_grad()
def drift(weight: torch.Tensor, deltas: Iterable[torch.Tensor], dtype: torch.dtype,
          keep_base: bool = False) -> tuple[float, float]:
    """Merge and unmerge one update after another in `dtype`; how far is the weight from where it began?

    Args:
        deltas: the updates, one a cycle, each of the weight's shape.
        keep_base: False: added in place and subtracted again, each time rounded to `dtype` first, as PEFT 0.21 does
            (safe_merge). True: W₀ is kept beside the merged weight, as in `LoRALinear`.

    Returns:
        Share of the entries that are not what they were, and ‖W - W₀‖ / ‖W₀‖.

    Raises: as `numerics`.
    """
    start = now = weight.to(dtype)
    for delta in deltas:
        check(weight, delta, dtype)
        merged = rounded_sum(now, delta.to(dtype))
        now = now if keep_base else rounded_sum(merged, -delta.to(dtype))
    return float((now != start).sum()) / now.numel(), _distance(start, now)
