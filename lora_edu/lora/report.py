"""What `apply_lora` did, as a table: which layers, how many numbers train, how large the adapter file will be."""
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
        table = [("layer", "count", "shape", "trainable"), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in table]
        return "\n".join([*lines, self.summary()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("layer", "count", "shape (out x in)", "trainable numbers"))
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{self.summary()}</p>"
