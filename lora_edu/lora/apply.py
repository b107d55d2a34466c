"""Give a whole model LoRA, merge it, take it off again.

`apply_lora` changes the model in place: matched linear layers become `LoRALinear`, everything else is frozen. All checks
come first, so a call that raises has changed nothing.

Matching follows PEFT (0.21): a list matches names that equal an entry or end in "." + entry; a string is a regular
expression for the whole name; "all-linear" is every linear layer but the output head.
"""
import copy
import difflib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lora_edu.lora.layer import LoRALinear, check_settings, features, is_linear
from lora_edu.lora.merge_report import MergeReport, Rounding
from lora_edu.lora.report import LoRAReport


def apply_lora(model: nn.Module, target_modules: Sequence[str] | str = "all-linear", rank: int = 8, alpha: float = 16.0,
               dropout: float = 0.0) -> LoRAReport:
    """Wrap the linear layers that match with `LoRALinear` and freeze the rest; the model is changed in place.

    Args:
        target_modules: name endings such as ("q_proj", "v_proj"), a regular expression, or "all-linear".
        rank, alpha, dropout: as in `LoRALinear`; the same for every layer.

    Returns:
        What matched, and the counts; it displays as a table.

    Raises:
        ValueError: an entry that matches no linear layer (near misses are named), a matched weight that is tied to
            another one, a model that has LoRA already, a rank that does not fit one of the layers.
    """
    wrapped = [name for name, _ in lora_layers(model)]
    if wrapped:
        raise ValueError(f"the model has LoRA already, on {shorten(wrapped)}: call remove_lora(model, merge=…) first.")
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if "" in linears:
        raise ValueError("the model is itself one linear layer: use LoRALinear.wrap(model, …), there is no parent to put it in.")
    targets = find_targets(model, linears, target_modules)
    refuse_tied(model, targets)
    for name in targets:
        try:
            check_settings(*features(linears[name]), rank, alpha, dropout)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    model.requires_grad_(False)
    for name in targets:
        replace(model, name, LoRALinear.wrap(linears[name], rank, alpha, dropout))
    return LoRAReport.of(model, left_out=[name for name in linears if name not in targets])


def unfreeze_matrices(model: nn.Module, target_modules: Sequence[str] | str = "all-linear") -> list[str]:
    """Full fine-tuning's side of a fair comparison: exactly the matrices that `apply_lora` would wrap train, all else is frozen.

    Returns their names.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    targets = find_targets(model, linears, target_modules)
    model.requires_grad_(False)
    for name in targets:
        linears[name].weight.requires_grad_(True)
    return targets


def find_targets(model: nn.Module, linears: dict[str, nn.Module], target_modules: Sequence[str] | str) -> list[str]:
    """Names of the linear layers that `target_modules` asks for, in the model's order."""
    if isinstance(target_modules, str):
        if target_modules.lower() == "all-linear":
            head = output_head(model, linears)
            found = [name for name in linears if name != head]
            if not found:
                raise ValueError(f"'all-linear' leaves out the output head {head!r}, and it is the only linear layer: name it in a list.")
            return found
        found = [name for name in linears if re.fullmatch(target_modules, name)]
        if not found:
            raise ValueError(f"target_modules={target_modules!r} is read as a regular expression for whole names and matches no linear "
                             f"layer: the model has {shorten(list(linears))}. {near_misses(target_modules, linears)}".rstrip())
        return found
    entries = list(target_modules)
    if not entries:
        raise ValueError("target_modules is empty: name at least one layer ending, such as 'q_proj', or pass 'all-linear'.")
    for entry in entries:
        if not any(ends_in(name, entry) for name in linears):
            raise ValueError(f"target_modules entry {entry!r} matches no linear layer. {near_misses(entry, linears)}")
    return [name for name in linears if any(ends_in(name, entry) for entry in entries)]


def ends_in(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def near_misses(entry: str, linears: dict[str, nn.Module]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    close = difflib.get_close_matches(entry, endings, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"The endings here are {shorten(endings)}."


def shorten(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def output_head(model: nn.Module, linears: dict[str, nn.Module]) -> str | None:
    """The layer that makes the outputs: what a transformers model says it is, else the linear layer registered last."""
    said = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if said is not None:
        return next((name for name, module in linears.items() if module is said), None)
    return next(reversed(linears), None)


def refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """A tied weight cannot be adapted alone: merged, the update would land in both places (silently wrong in PEFT 0.21)."""
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            key = id(parameter) if parameter.is_meta else parameter.data_ptr()
            users.setdefault(key, []).append(f"{module_name}.{parameter_name}")
    for names in users.values():
        for name in targets:
            if f"{name}.weight" in names and len(names) > 1:
                raise ValueError(f"the weights {' and '.join(names)} are one tensor (tied): leave {name!r} out of target_modules, "
                                 "or untie them first by giving one a copy.")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), attribute, module)


def share_weights(model: nn.Module) -> nn.Module:
    """A model of new modules around the same weights: nothing big is copied, and it can be wrapped, or moved, without touching `model`.

    Its Parameter objects are its own and frozen; the storage is shared, so what writes into the weights changes both.
    """
    shared = {id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()}
    return copy.deepcopy(model, memo=shared | {id(buffer): buffer for buffer in model.buffers()})


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every `LoRALinear` of the model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def some_lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layer: call apply_lora(model, …) first.")
    return layers


def set_strength(model: nn.Module, strength: float) -> None:
    """Turn every update to `strength` times what was trained: 0 is the base, 1 the adapter, between them a mixture.

    Raises RuntimeError if a layer is merged, because the merged weight would not follow.
    """
    layers = some_lora_layers(model)
    merged = [name for name, layer in layers if layer.merged]
    if merged:
        raise RuntimeError(f"merged: {shorten(merged)}. Call unmerge_lora(model), then turn the dial.")
    for _, layer in layers:
        layer.scaling = strength * layer.alpha / layer.rank


def fold_all(layers: list[tuple[str, LoRALinear]], keep: bool) -> tuple[list[torch.Tensor], MergeReport]:
    """Every W₀ + update (an empty list without `keep`: then one is in memory at a time) and the report; no layer is changed."""
    folded, parts = [], {}
    for name, layer in layers:
        try:
            weight, delta = layer.fold()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parts[name] = Rounding.of(layer.weight, delta, weight)
        if keep:
            folded.append(weight)
    dtypes = dict.fromkeys(str(layer.weight.dtype).removeprefix("torch.") for _, layer in layers)
    return folded, MergeReport(parts, ", ".join(dtypes), sum(weight.nbytes for weight in folded))


def merge_lora(model: nn.Module) -> MergeReport:
    """Merge every LoRA layer, or none: all sums are made and checked before the first is used.

    Returns:
        How large the update is, what rounding took from it, what the copies cost; it displays as a table.

    Raises:
        RuntimeError: a layer is merged already, or in training mode with dropout.
        ValueError: an update, or its sum with W₀, is not finite.
    """
    layers = some_lora_layers(model)
    merged = [name for name, layer in layers if layer.merged]
    if merged:
        raise RuntimeError(f"merged already: {shorten(merged)}. Call unmerge_lora(model) first.")
    folded, report = fold_all(layers, keep=True)
    for (_, layer), weight in zip(layers, folded, strict=True):
        layer.merged_weight = weight
    return report


def unmerge_lora(model: nn.Module) -> None:
    """Back to W₀ beside its update, bit for bit. Raises RuntimeError if a layer is not merged; then nothing is changed."""
    layers = some_lora_layers(model)
    apart = [name for name, layer in layers if not layer.merged]
    if apart:
        raise RuntimeError(f"not merged: {shorten(apart)}. Call merge_lora(model) first.")
    for _, layer in layers:
        layer.unmerge()


def remove_lora(model: nn.Module, *, merge: bool) -> MergeReport | None:
    """Put the plain layers back: with the update written into their weights (`merge=True`), or as they were (`False`).

    Written in place, one matrix at a time: no second copy of the model is needed. A merged model is welcome: the update is
    added to W₀, which a merge never touches. Parameters stay frozen; call `model.requires_grad_(True)` to train them.

    Returns:
        With `merge=True` what `merge_lora` returns.

    Raises (`merge=True`; then nothing has been changed):
        RuntimeError: a layer is in training mode with dropout.
        ValueError: an update, or its sum with W₀, is not finite.
    """
    layers = some_lora_layers(model)
    report = fold_all(layers, keep=False)[1] if merge else None      # all are checked before the first is written
    for name, layer in layers:
        if merge:
            layer.weight.data.copy_(layer.folded_weight())
        replace(model, name, layer.base_layer)
    return report


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every `lora_A` and `lora_B`, in the model's order: what an optimizer needs."""
    return [parameter for _, layer in some_lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The factors by name ("….q_proj.lora_A"), detached, not copied; `model.load_state_dict(…, strict=False)` takes them back."""
    return {f"{name}.{factor}": getattr(layer, factor).detach()
            for name, layer in some_lora_layers(model) for factor in ("lora_A", "lora_B")}
