"""What changed between two models as tables: what a LoRA on the matrices carries, what it leaves out, and how much an extract keeps."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lora_edu.lora.report import html_table, text_table


class Other(NamedTuple):
    """A tensor that is no matrix a LoRA could change."""

    name: str
    kind: str                   # "bias", "norm", "embedding", "tied to …", "32000 x 576 became 32002 x 576", …
    squared: float | None       # squared change, the sum over its entries; None where no difference can be taken


@dataclass(frozen=True)
class ChangeReport:
    """Squared changes (sums over entries) of a pair of models, by what carries them: a LoRA on linear layers and convolutions, or nothing.

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
        """Share of the whole squared change that a LoRA on the matrices leaves out, 0 to 1; what has no difference is not in it."""
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
        return f"{sum(known) / whole:.2%}" if known and whole else "unchanged" if known else "no difference"

    def summary(self) -> str:
        return (f"{self.changed} of {self.matrices} matrices changed; a LoRA on them leaves out {self.others_share:.2%} "
                "of the squared change.")

    def __str__(self) -> str:
        table = text_table([("left out of a LoRA", "count", "first of them", "share"), *self.rows()]) + "\n" if self.others else ""
        return table + self.summary()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table([("left out of a LoRA", "count", "first of them", "share of the squared change"), *self.rows()])
        return (table if self.others else "") + f"<p>{self.summary()}</p>"


@dataclass(frozen=True)
class ExtractReport:
    """What `extract_lora` wrote. Energies are shares of a squared change, 0 to 1.

    Attributes:
        shapes: name -> (out, in) of every matrix that is in the adapter; kept: name -> energy that its rank-r part keeps.
        energy: the same for all matrices together.
        bytes: of the adapter's tensor file.
        change: the table of what the adapter leaves out.
    """

    rank: int
    shapes: dict[str, tuple[int, int]] = field(repr=False)
    kept: dict[str, float] = field(repr=False)
    energy: float
    bytes: int
    folder: Path
    change: ChangeReport

    @property
    def targets(self) -> int:
        return len(self.shapes)

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of matrix (name ending and shape): ending, how many, shape, smallest and largest energy kept."""
        kinds: dict[tuple[str, tuple[int, int]], list[float]] = {}
        for name, shape in self.shapes.items():
            kinds.setdefault((name.rpartition(".")[2], shape), []).append(self.kept[name])
        return [(ending, str(len(kept)), f"{shape[0]} x {shape[1]}", f"{min(kept):.1%} to {max(kept):.1%}")
                for (ending, shape), kept in kinds.items()]

    def summary(self) -> str:
        return (f"rank {self.rank} on {self.targets} matrices keeps {self.energy:.1%} of their squared change; "
                f"{self.bytes:,} bytes.")

    def __str__(self) -> str:
        return "\n".join([text_table([("matrix", "count", "shape", "energy kept"), *self.rows()]), self.summary(), str(self.change)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table([("matrix", "count", "shape (out x in)", "energy kept"), *self.rows()])
        return f"{table}<p>{self.summary()}</p>{self.change._repr_html_()}"
