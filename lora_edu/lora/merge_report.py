"""What a merge did, as a table: how large the update is beside W₀, and how much of it the rounding of the sum took away.

A weight keeps 24 binary digits in float32, 11 in float16, 8 in bfloat16: an update below half the step to the next number is lost.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_edu.lora.report import html_table, text_table

HEAD = ("layer", "count", "‖ΔW‖/‖W₀‖", "rounded away", "error of ΔW")


class Rounding(NamedTuple):
    """What became of one update, or of several: `asked` entries have an update that is not zero, `lost` of these did not move."""

    entries: int
    asked: int
    lost: int
    weight: float    # ‖W₀‖, Frobenius
    delta: float     # ‖ΔW‖
    off: float       # ‖(merged - W₀) - ΔW‖

    @classmethod
    @torch.no_grad()
    def of(cls, weight: torch.Tensor, delta: torch.Tensor, folded: torch.Tensor) -> "Rounding":
        """Compare what was asked, `delta`, with what arrived, `folded - weight`; in float64 (float32 on MPS, which has none wider)."""
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
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


@dataclass(frozen=True)
class MergeReport:
    """`parts` by layer name and all of them in `total`, the dtype of the weights, and the bytes kept in memory beside W₀."""

    parts: dict[str, Rounding]
    dtype: str
    extra_bytes: int

    @property
    def total(self) -> Rounding:
        return Rounding.total(*self.parts.values())

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each name ending, in the order of HEAD."""
        kinds: dict[str, list[Rounding]] = {}
        for name, part in self.parts.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(part)
        return [(ending, str(len(parts)), *Rounding.total(*parts).cells()) for ending, parts in kinds.items()]

    def summary(self) -> str:
        size, lost, error = self.total.cells()
        return (f"{len(self.parts)} matrices in {self.dtype}, {self.total.entries:,} entries: the update is {size} of W₀; {lost} of its "
                f"entries were rounded away, what arrived is off by {error} of it. {self.extra_bytes:,} more bytes in memory.")

    def __repr__(self) -> str:
        return text_table([HEAD, *self.rows()]) + "\n" + self.summary()

    def _repr_html_(self) -> str:
        return html_table([HEAD, *self.rows()]) + f"<p>{self.summary()}</p>"
