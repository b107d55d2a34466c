"""Give a whole model LoRA: matched linear layers become `LoRALinear`, everything else is frozen.

Read `wrap_layers`: that is all there is to it. What stands around it are checks, and a net: a call that raises, or is
stopped, has changed nothing. Which layers match is told in `targets.py`, how the update is folded in and taken out
again in `merge.py`.
"""
import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_edu.lora.conv import LoRAConv
from lora_edu.lora.factors import refuse_adapted, some_lora_layers
from lora_edu.lora.layer import HOOKS, LoRALinear, check_weight, features, is_linear, move_hooks
from lora_edu.lora.quantized import base_weight, packed_away
from lora_edu.lora.settings import check_settings
from lora_edu.lora.targets import find_targets, output_heads, refuse_tied, shorten, unwrap_to_train, weight_readers
from lora_edu.numbers import low_to_high, whole
from lora_edu.tables import ShowsTables, Table

NOT_THE_MODEL = ("this is apply_lora's report and not the model, which was changed in place and is still the one that "
                 "you passed: write apply_lora(model, …) on a line of its own, without `model =`.")


@dataclass(frozen=True, repr=False)
class LoRAReport(ShowsTables):
    """What `apply_lora` did, as a table. Counts are numbers, sizes are bytes.

    Attributes:
        matched: name -> (out_features, in_features) of every wrapped layer.
        left_out: names of the linear layers that were not wrapped, the output head among them.
        head: names of those that "all-linear" left out because they were taken for the output head.
        rank, alpha: of the first layer; a file may bring others for other layers, which `ranks` and `scalings` tell.
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
    ranks: dict[str, int] = field(repr=False)
    scalings: dict[str, float] = field(repr=False)
    head: list[str] = field(default_factory=list, repr=False)
    note: str = field(default="", repr=False)

    @classmethod
    def of(cls, model: nn.Module, left_out: list[str], head: Sequence[str] = (), note: str = "") -> "LoRAReport":
        layers = dict(some_lora_layers(model))
        factors = [p for m in layers.values() for p in (m.lora_A, m.lora_B)]
        first = next(iter(layers.values()))
        return cls(rank=first.rank, alpha=first.alpha, rslora=first.rslora,
                   matched={name: (m.out_features, m.in_features) for name, m in layers.items()}, left_out=left_out,
                   trainable=sum(p.numel() for p in factors),
                   total=sum(p.numel() for p in model.parameters()) + packed_away(model),
                   adapter_bytes=sum(p.nbytes for p in factors),
                   merge_bytes=sum(base_weight(m.base_layer).nbytes for m in layers.values()),
                   ranks={name: m.rank for name, m in layers.items()},
                   scalings={name: m.scaling for name, m in layers.items()}, head=list(head), note=note)

    @property
    def scaling(self) -> float:
        return next(iter(self.scalings.values()))

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of layer (name ending and shape): ending, how many, shape, trainable numbers in all."""
        kinds: dict[tuple[str, tuple[int, int]], list[int]] = {}
        for name, shape in self.matched.items():
            kinds.setdefault((name.rpartition(".")[2], shape), []).append(self.ranks[name])
        return [(ending, str(len(ranks)), f"{out} x {into}", f"{sum(ranks) * (out + into):,}")
                for (ending, (out, into)), ranks in kinds.items()]

    def summary(self) -> str:
        ranks, scalings = ([*dict.fromkeys(values.values())] for values in (self.ranks, self.scalings))
        said = (f"rank {self.rank}, alpha {self.alpha:g}, scaling {self.scaling:g}" if len(ranks) == len(scalings) == 1
                else f"rank {low_to_high(ranks)}, scaling {low_to_high(scalings)}")
        return (f"{said}: {self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.2%}); "
                f"the adapter is {self.adapter_bytes:,} bytes, merging keeps {self.merge_bytes:,} more of them."
                + f" Left out as the output head: {shorten(self.head)}." * bool(self.head)
                + f" {self.note}" * bool(self.note))

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

    Raises (then the model is as it was, also after Ctrl-C):
        ValueError: an entry that matches no linear layer (near misses are named), a matched weight that is tied to
            another one or is no plain tensor of floating numbers, a model that has LoRA already, PEFT's too, a rank
            that does not fit one of the layers.

    Source: Hu et al. (2021), section 4, arXiv:2106.09685.

    >>> model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> apply_lora(model, ["0"], rank=2, alpha=4)     # doctest: +NORMALIZE_WHITESPACE
    layer  count  shape (out x in)  trainable numbers
    0          1            8 x 12                 40
    rank 2, alpha 4, scaling 2: 40 of 171 parameters train (23.39%); the adapter is 160 bytes, merging keeps 384 more
    of them.
    """
    model = unwrap_to_train(model)
    chosen = choose_layers(model, target_modules, rank, alpha, dropout)
    linears = linear_layers(model)
    everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    head = output_heads(model, linears) if everything else []
    wrap_layers(model, {name: (layer, dict(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora))
                        for name, layer in chosen.items()})
    return LoRAReport.of(model, [name for name in linears if name not in chosen], head, _in_no_layer(model))


def _in_no_layer(model: nn.Module) -> str:
    """A sentence about stacks of matrices that are no layer's weight, as experts are: no LoRA goes beside them."""
    others = {name: module for name, module in model.named_modules() if not isinstance(module, _ConvNd)}
    stacks = {f"{name}.{end}".removeprefix("."): p for name, module in others.items()
              for end, p in module.named_parameters(recurse=False) if p.ndim > 2 and min(p.shape) > 1}
    said = f"{sum(p.numel() for p in stacks.values()):,} numbers lie in stacks of matrices that it does not reach: "
    return f"{said}{shorten(list(stacks), 2)}." if stacks else ""


def wrap_layers(model: nn.Module, layers: Mapping[str, tuple[nn.Module, dict]]) -> None:
    """Freeze the model and put a `LoRALinear` in the place of each layer; name -> (layer, settings of `wrap`)."""
    readers = weight_readers(model)
    with all_or_nothing(model):
        model.requires_grad_(False)
        for name, (layer, settings) in layers.items():
            wrapped = (LoRALinear if is_linear(layer) else LoRAConv).wrap(layer, **settings)
            wrapped.read_by_parent = name in readers
            replace(model, name, wrapped)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Whoever raises inside, Ctrl-C too, finds the model as it was: its modules and parameters, their hooks, and what
    trains.
    """
    modules = [(module, dict(module._modules), {name: vars(module)[name] for name in HOOKS}
                | {"_parameters": dict(module._parameters)}) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, children, hooks in modules:
            module._modules.clear()
            module._modules.update(children)
            vars(module).update(hooks)
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        raise


def choose_layers(model: nn.Module, target_modules: Sequence[str] | str, rank: int, alpha: float, dropout: float = 0.0
                  ) -> dict[str, nn.Module]:
    """Name -> linear layer, of those that a LoRA with these settings goes beside; all of `apply_lora`'s checks are
    made here.
    """
    refuse_adapted(model)
    linears = linear_layers(model)
    if "" in linears:
        raise ValueError("the model is itself one linear layer: use LoRALinear.wrap(model, "
                         "…), there is no parent to put it in.")
    targets = find_targets(model, linears, target_modules)
    check_layers(model, targets, rank, alpha, dropout)
    return {name: linears[name] for name in targets}


def check_layers(model: nn.Module, targets: list[str], rank: int = 1, alpha: float = 1.0, dropout: float = 0.0) -> None:
    """Raise ValueError, by name, for a layer that these settings do not fit, or that no LoRA fits."""
    for name in targets:
        try:
            check_weight(model.get_submodule(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    refuse_tied(model, targets)
    for name in targets:
        layer = model.get_submodule(name)
        try:
            check_settings(*features(layer), rank, alpha, dropout)
            if dropout and isinstance(layer, NonDynamicallyQuantizableLinear):
                raise ValueError(f"attention reads this layer's weight and never calls it, so dropout={dropout} would "
                                 "do nothing: choose dropout=0, or leave the layer out.")
        except ValueError as error:
            raise ValueError(f"{name}: {error}" + _offer_without_narrow(model, targets, rank)) from None


def _offer_without_narrow(model: nn.Module, targets: list[str], rank) -> str:
    asked = whole(rank) or 1
    narrow = [name for name in targets if min(features(model.get_submodule(name))) < asked]
    if not narrow or len(narrow) == len(targets):
        return ""
    return (f" Narrower than rank {rank} are {shorten(narrow)}: take a smaller rank, or target_modules without "
            f"{'it' if len(narrow) == 1 else 'them'}.")


def unfreeze_matrices(model: nn.Module, target_modules: Sequence[str] | str = "all-linear") -> list[str]:
    """Full fine-tuning's side of a fair comparison: exactly the matrices that `apply_lora` would wrap train, all else
    is frozen.

    Returns their names; raises as `apply_lora` does, and then nothing is changed.
    """
    model = unwrap_to_train(model)
    refuse_adapted(model)
    linears = linear_layers(model)
    targets = find_targets(model, linears, target_modules)
    check_layers(model, targets)
    with all_or_nothing(model):
        model.requires_grad_(False)
        for name in targets:
            linears[name].weight.requires_grad_(True)
    return targets


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that `LoRALinear.wrap` can take, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place, in its mode and with its hooks."""
    parent, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    module.train(old.training)
    move_hooks(old, module)
    setattr(model.get_submodule(parent), attribute, module)


def share_weights(model: nn.Module) -> nn.Module:
    """A model of new modules around the same weights: nothing big is copied, and it can be wrapped, or moved, without
    touching `model`.

    Its Parameter objects are its own and frozen; the storage is shared, so what writes into the weights changes both.
    """
    shared = {id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, memo=shared | {id(buffer): buffer for buffer in model.buffers()})
