"""Give a whole model LoRA: matched linear layers become `LoRALinear`, everything else is frozen.

Read the last four lines of `apply_lora`: that is all there is to it. What stands before them are checks, so that a call
that raises has changed nothing; which layers match is told in `targets.py`, how the update is folded in and taken out
again in `merge.py`.
"""
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from torch import nn

from lora_edu.lora.layer import LoRALinear, features, is_linear
from lora_edu.lora.settings import check_settings, scaling_of
from lora_edu.lora.targets import find_targets, refuse_tied, shorten
from lora_edu.tables import ShowsTables, Table

NOT_THE_MODEL = ("this is apply_lora's report and not the model, which was changed in place and is still the one that "
                 "you passed: write apply_lora(model, …) on a line of its own, without `model =`.")


@dataclass(frozen=True, repr=False)
class LoRAReport(ShowsTables):
    """What `apply_lora` did, as a table. Counts are numbers, sizes are bytes.

    Attributes:
        matched: name -> (out_features, in_features) of every wrapped layer.
        left_out: names of the linear layers that were not wrapped, the output head among them.
        trainable, total: parameters that train; all parameters, the factors included (as PEFT counts).
        adapter_bytes: the factors alone, in their dtype: what a file of this adapter holds besides its header.
        merge_bytes: what `merge_lora` keeps in memory on top: one copy of each wrapped matrix.
    """

    rank: int
    alpha: float
    rslora: bool
    matched: dict[str, tuple[int, int]]
    left_out: list[str] = field(repr=False)
    trainable: int
    total: int
    adapter_bytes: int
    merge_bytes: int

    @classmethod
    def of(cls, model: nn.Module, left_out: list[str]) -> "LoRAReport":
        layers = dict(lora_layers(model))
        factors = [p for m in layers.values() for p in (m.lora_A, m.lora_B)]
        first = next(iter(layers.values()))
        return cls(rank=first.rank, alpha=first.alpha, rslora=first.rslora,
                   matched={name: (m.out_features, m.in_features) for name, m in layers.items()}, left_out=left_out,
                   trainable=sum(p.numel() for p in factors), total=sum(p.numel() for p in model.parameters()),
                   adapter_bytes=sum(p.nbytes for p in factors),
                   merge_bytes=sum(m.weight.nbytes for m in layers.values()))

    @property
    def scaling(self) -> float:
        return scaling_of(self.rank, self.alpha, self.rslora)

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of layer (name ending and shape): ending, how many, shape, trainable numbers in all."""
        kinds: dict[tuple[str, tuple[int, int]], int] = {}
        for name, shape in self.matched.items():
            kind = (name.rpartition(".")[2], shape)
            kinds[kind] = kinds.get(kind, 0) + 1
        return [(ending, str(count), f"{out} x {into}", f"{count * self.rank * (out + into):,}")
                for (ending, (out, into)), count in kinds.items()]

    def summary(self) -> str:
        return (f"rank {self.rank}, alpha {self.alpha:g}, scaling {self.scaling:g}: {self.trainable:,} of "
                f"{self.total:,} parameters train ({self.trainable / self.total:.2%}); the adapter is "
                f"{self.adapter_bytes:,} bytes, merging keeps {self.merge_bytes:,} more in memory.")

    def tables(self) -> list[Table]:
        return [Table(("layer", "count", "shape (out x in)", "trainable numbers"), self.rows(), self.summary())]

    def __call__(self, *args, **kwargs) -> NoReturn:
        raise TypeError(NOT_THE_MODEL)

    def __getattr__(self, name: str) -> NoReturn:
        """Who writes `model = apply_lora(model)`, as with PEFT, learns here what became of the model."""
        meant = hasattr(nn.Module, name) or name == "generate"
        raise AttributeError(NOT_THE_MODEL if meant else f"a LoRAReport has no {name!r}.")


def apply_lora(model: nn.Module, target_modules: Sequence[str] | str = "all-linear", rank: int = 8, alpha: float = 16.0,
               dropout: float = 0.0, rslora: bool = False) -> LoRAReport:
    """Wrap the linear layers that match with `LoRALinear` and freeze the rest; the model is changed in place.

    Args:
        target_modules: name endings such as ("q_proj", "v_proj"), a regular expression, or "all-linear" (all but the
            output head).
        rank, alpha, dropout, rslora: as in `LoRALinear`; the same for every layer.

    Returns:
        What matched, and the counts; it displays as a table. The model is not in it: it was changed in place.

    Raises:
        ValueError: an entry that matches no linear layer (near misses are named), a matched weight that is tied to
            another one, a model that has LoRA already, a rank that does not fit one of the layers.

    Source: Hu et al. (2021), section 4, arXiv:2106.09685.

    >>> model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> apply_lora(model, ["0"], rank=2, alpha=4)     # doctest: +NORMALIZE_WHITESPACE
    layer  count  shape (out x in)  trainable numbers
    0          1            8 x 12                 40
    rank 2, alpha 4, scaling 2: 40 of 171 parameters train (23.39%); the adapter is 160 bytes, merging keeps 384 more in
    memory.
    """
    chosen = choose_layers(model, target_modules, rank, alpha, dropout)
    left_out = [name for name in linear_layers(model) if name not in chosen]
    model.requires_grad_(False)
    for name, layer in chosen.items():
        replace(model, name, LoRALinear.wrap(layer, rank, alpha, dropout, rslora))
    return LoRAReport.of(model, left_out)


def choose_layers(model: nn.Module, target_modules: Sequence[str] | str, rank: int, alpha: float, dropout: float = 0.0
                  ) -> dict[str, nn.Module]:
    """Name -> linear layer, of those that a LoRA with these settings goes beside; all of `apply_lora`'s checks are
    made here.
    """
    taken = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if taken:
        raise ValueError(f"the model has LoRA already, on {shorten(taken)}: call remove_lora(model, merge=…) first.")
    linears = linear_layers(model)
    if "" in linears:
        raise ValueError("the model is itself one linear layer: use LoRALinear.wrap(model, "
                         "…), there is no parent to put it in.")
    targets = find_targets(model, linears, target_modules)
    refuse_tied(model, targets)
    for name in targets:
        try:
            check_settings(*features(linears[name]), rank, alpha, dropout)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return {name: linears[name] for name in targets}


def unfreeze_matrices(model: nn.Module, target_modules: Sequence[str] | str = "all-linear") -> list[str]:
    """Full fine-tuning's side of a fair comparison: exactly the matrices that `apply_lora` would wrap train, all else
    is frozen.

    Returns their names.
    """
    linears = linear_layers(model)
    targets = find_targets(model, linears, target_modules)
    model.requires_grad_(False)
    for name in targets:
        linears[name].weight.requires_grad_(True)
    return targets


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that `LoRALinear.wrap` can take, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, module)


def share_weights(model: nn.Module) -> nn.Module:
    """A model of new modules around the same weights: nothing big is copied, and it can be wrapped, or moved, without
    touching `model`.

    Its Parameter objects are its own and frozen; the storage is shared, so what writes into the weights changes both.
    """
    shared = {id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, memo=shared | {id(buffer): buffer for buffer in model.buffers()})


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every `LoRALinear` of the model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def some_lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """The same as a list; raises ValueError where there is none."""
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layer: call apply_lora(model, …) first.")
    return layers


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every `lora_A` (rank, in_features) and `lora_B` (out_features, rank), in the model's order: what an optimizer
    needs.

    Raises ValueError if the model has no LoRA.

    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, "all-linear", rank=2)     # all but the last, the output head
    >>> [tuple(p.shape) for p in lora_parameters(model)]
    [(2, 12), (8, 2)]
    """
    return [parameter for _, layer in some_lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model: nn.Module) -> dict:
    """The factors by name ("….q_proj.lora_A"), detached, not copied; `model.load_state_dict(…, strict=False)` takes
    them back.

    Raises ValueError if the model has no LoRA.

    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> {name: tuple(t.shape) for name, t in lora_state_dict(model).items()}
    {'0.lora_A': (2, 12), '0.lora_B': (8, 2)}
    """
    return {f"{name}.{factor}": getattr(layer, factor).detach()
            for name, layer in some_lora_layers(model) for factor in ("lora_A", "lora_B")}
