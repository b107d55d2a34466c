"""What `apply_lora` did, as a table: which layers, how many numbers train, how large the adapter file will be."""
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lora_edu.lora.layer import LoRALinear


@dataclass(frozen=True)
class LoRAReport:
    """Counts are numbers, sizes are bytes.

    Attributes:
        matched: name -> (out_features, in_features) of every wrapped layer.
        left_out: names of the linear layers that were not wrapped, the output head among them.
        trainable, total: parameters that train; all parameters, the factors included (as PEFT counts).
        adapter_bytes: the factors alone, in their dtype: what a file of this adapter holds besides its header.
        merge_bytes: what `merge_lora` keeps in memory on top: one copy of each wrapped matrix.
    """

    rank: int
    alpha: float
    matched: dict[str, tuple[int, int]]
    left_out: list[str] = field(repr=False)
    trainable: int
    total: int
    adapter_bytes: int
    merge_bytes: int

    @classmethod
    def of(cls, model: nn.Module, left_out: list[str]) -> "LoRAReport":
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
        factors = [p for m in layers.values() for p in (m.lora_A, m.lora_B)]
        first = next(iter(layers.values()))
        return cls(rank=first.rank, alpha=first.alpha,
                   matched={name: (m.out_features, m.in_features) for name, m in layers.items()}, left_out=left_out,
                   trainable=sum(p.numel() for p in factors), total=sum(p.numel() for p in model.parameters()),
                   adapter_bytes=sum(p.numel() * p.element_size() for p in factors),
                   merge_bytes=sum(m.weight.numel() * m.weight.element_size() for m in layers.values()))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of layer (name ending and shape): ending, how many, shape, trainable numbers in all."""
        kinds: dict[tuple[str, tuple[int, int]], int] = {}
        for name, shape in self.matched.items():
            kind = (name.rpartition(".")[2], shape)
            kinds[kind] = kinds.get(kind, 0) + 1
        return [(ending, str(count), f"{out} x {into}", f"{count * self.rank * (out + into):,}")
                for (ending, (out, into)), count in kinds.items()]

    def summary(self) -> str:
        return (f"rank {self.rank}, alpha {self.alpha:g}, scaling {self.scaling:g}: {self.trainable:,} of {self.total:,} parameters "
                f"train ({self.trainable / self.total:.2%}); the adapter is {self.adapter_bytes:,} bytes, "
                f"merging keeps {self.merge_bytes:,} more in memory.")

    def __str__(self) -> str:
        return text_table([("layer", "count", "shape", "trainable"), *self.rows()]) + "\n" + self.summary()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table([("layer", "count", "shape (out x in)", "trainable numbers"), *self.rows()]) + f"<p>{self.summary()}</p>"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left and the others to the right; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in
                               enumerate(zip(row, widths, strict=True))) for row in rows)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML; what the cells say is escaped."""
    head, *body = (["<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>" for row in part]
                   for tag, part in (("th", rows[:1]), ("td", rows[1:])))
    return f"<table><thead>{head[0]}</thead><tbody>{''.join(body[0])}</tbody></table>"
