"""The LoRA layers of a model, and their factors by name: found, handed out, taken back; and who carries an adapter of
another make, or of a class that was reloaded.
"""
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.misfit import misfit
from lora_edu.lora.targets import plain_name, shorten, unwrap


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every `LoRALinear` of the model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def some_lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """The same as a list; raises ValueError where there is none."""
    layers = list(lora_layers(unwrap(model)))
    if not layers:
        refuse_reloaded(model)
        if any(type(module).__module__.startswith("peft.tuners.") for module in model.modules()):
            refuse_adapted(model)
        raise ValueError("the model has no LoRA layer: call apply_lora(model, …) first.")
    return layers


def layers_without_gradient(model: nn.Module) -> list[str]:
    """After a backward pass: names of the adapted layers that it did not reach. Call it where a layer may not be used.

    Raises nothing: a model without LoRA has none.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, "all-linear", rank=2)
    >>> model[0](torch.randn(4, 12)).sum().backward()        # goes past the second
    >>> layers_without_gradient(model)
    ['1']
    """
    return [name for name, layer in lora_layers(unwrap(model))
            if layer.lora_B.requires_grad and layer.lora_B.grad is None]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every `lora_A` (rank, in_features) and `lora_B` (out_features, rank), in the model's order: what an optimizer
    needs.

    Raises ValueError if the model has no LoRA.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, "all-linear", rank=2)     # all but the last, the output head
    >>> [tuple(p.shape) for p in lora_parameters(model)]
    [(2, 12), (8, 2)]
    """
    return [parameter for _, layer in some_lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]


def lora_state_dict(model: nn.Module) -> dict:
    """The factors by name ("….q_proj.lora_A"), detached, not copied; `load_lora_state_dict` takes them back.

    Raises ValueError if the model has no LoRA.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> {name: tuple(t.shape) for name, t in lora_state_dict(model).items()}
    {'0.lora_A': (2, 12), '0.lora_B': (8, 2)}
    """
    return {f"{plain_name(name)}.{factor}": getattr(layer, factor).detach()
            for name, layer in some_lora_layers(model) for factor in ("lora_A", "lora_B")}


def load_lora_state_dict(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy factors into a model that has LoRA: exactly those that `lora_state_dict` names, or nothing is changed.

    Raises:
        ValueError: a name that is missing or has no place, another shape, a number that is not finite, no LoRA.
        RuntimeError: the model is merged, and its merged weights would not follow.

    >>> from lora_edu import apply_lora
    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> kept = {name: factor.clone() for name, factor in lora_state_dict(model).items()}
    >>> _ = nn.init.normal_(model[0].lora_B)
    >>> load_lora_state_dict(model, kept)
    >>> model[0].lora_B.any().item()
    False
    """
    refuse_merged(model)
    places = lora_state_dict(model)
    wrong = misfit(tensors, places)
    if wrong:
        raise ValueError(f"these are not the factors of this model: {wrong}.")
    copy_all(tensors, places)


def refuse_merged(model: nn.Module) -> None:
    """Raise RuntimeError for a merged model: what is loaded into its factors would not count."""
    merged = [name for name, layer in some_lora_layers(model) if layer.merged]
    if merged:
        raise RuntimeError(f"merged: {shorten(merged)}. Call unmerge_lora(model), then load.")


@torch.no_grad()
def copy_all(tensors: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> None:
    """Every tensor into its place, which may be of another shape of the same size; stopped on the way, none."""
    before = {name: place.clone() for name, place in places.items()}
    try:
        for name, place in places.items():
            place.copy_(tensors[name].reshape(place.shape))
    except BaseException:
        for name, place in places.items():
            place.copy_(before[name])
        raise


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model carries LoRA or another adapter: ours, PEFT's, or of a class that was reloaded."""
    peft = [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.tuners.")]
    if peft:
        raise ValueError(f"the model carries an adapter of PEFT already, on {shorten(peft)}: call PEFT's "
                         "merge_and_unload() or unload() and go on with the model that it returns.")
    taken = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if taken:
        refuse_reloaded(model)
        makes = {type(model.get_submodule(name)).__module__.partition(".")[0] for name in taken} - {"lora_edu"}
        if makes:
            raise ValueError(f"the model carries a LoRA of {' and '.join(sorted(makes))} already, on {shorten(taken)}: "
                             "give the model as it was before.")
        raise ValueError(f"the model has LoRA already, on {shorten(taken)}: call remove_lora(model, merge=…) first.")


def refuse_reloaded(model: nn.Module) -> None:
    """Raise ValueError for a `LoRALinear` whose class is not this one: autoreload has made it anew since."""
    old = [name for name, module in model.named_modules()
           if type(module).__name__ == "LoRALinear" and type(module).__module__.startswith("lora_edu.")
           and not isinstance(module, LoRALinear)]
    if old:
        raise ValueError(f"{shorten(old)} were wrapped by a LoRALinear of before lora_edu was reloaded, and are not "
                         "known any more: load the model anew, or restart the kernel.")
