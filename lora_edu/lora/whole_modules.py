"""Modules that lie in an adapter's file whole (`modules_to_save`: a trained head, an embedding), by PEFT's rules.

An entry chooses every module whose name ends so, "norm" an "input_norm" as well, and one that finds nothing is passed
over: PEFT writes "classifier" and "score" for every classifier.

Source: PEFT 0.21, `_set_trainable` and `_check_tied_modules`.
"""
from collections.abc import Collection, Mapping

import torch
from torch import nn

from lora_edu.lora.factors import lora_layers
from lora_edu.lora.targets import plain_name, shorten, tied_parameters

EMBEDDINGS = ("embed_tokens", "lm_head")            # the names by which PEFT knows an embedding and its head


def whole_modules(model: nn.Module) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """What trains and is no factor, or came with an adapter: name of each module that holds such a parameter itself ->
    its whole state; and the entries of modules_to_save. What these choose beside is among the modules, as it is.
    """
    adapted = [name for name, _ in lora_layers(model)]
    found = {}                                  # of tied ones both: PEFT looks for both in the file
    for name, module in model.named_modules():
        if name in adapted or not (getattr(module, "comes_with_adapter", False)
                                   or any(p.requires_grad for p in module.parameters(recurse=False))):
            continue
        if name.endswith(".base_layer") or name == "base_layer" or any(a.startswith(name + ".") or not name
                                                                       for a in adapted):
            raise ValueError(f"{name or 'the model'} has numbers that train beside the factors, and PEFT's format has "
                             "no place for both: freeze them (requires_grad_(False)), or save the whole model.")
        found[plain_name(name)] = module.state_dict()
    entries = list(found)
    chosen = {name: module for name, module in _chosen(model, entries).items() if name not in found}
    both = [name for name in chosen if any(f"{plain_name(a)}.".startswith(f"{name}.") for a in adapted)]
    if both:
        raise ValueError(f"{shorten(entries, 2)} trains whole, and PEFT finds whole modules by how their names end: "
                         f"{shorten(both, 2)} ends so and has factors. Give the module a name of its own.")
    return found | {name: module.state_dict() for name, module in chosen.items()}, entries


def whole_places(model: nn.Module, config: Mapping, stored: Mapping[str, torch.Tensor]
                 ) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """The model's own tensors that whole modules of a file replace, by name; which of them were tied and get a place of
    their own; and which the config names, as trained. ValueError for a module that is in the file and not in the model.
    """
    saved: dict[str, torch.Tensor] = {}
    for entry in config["modules_to_save"]:
        modules = _chosen(model, [entry])
        if not modules and any(f".{entry}." in f".{name}" for name in stored):
            raise ValueError(f"the config saves a module {entry!r} whole, and this {type(model).__name__} has none: "
                             "build the model with that head first.")
        saved |= {f"{name}.{end}": t for name, module in modules.items() for end, t in module.state_dict().items()}
    # PEFT keeps together what is asked for by these names alone
    together = config["ensure_weight_tying"] and any(entry.rpartition(".")[2] in EMBEDDINGS
                                                     for entry in config["modules_to_save"])
    alone = [] if together else [name for name in saved if name in tied_parameters(model)]
    heads = saved | _embeddings(model, stored)
    return heads | {name: heads[name].clone() for name in alone}, alone, list(saved)


def make_room(model: nn.Module, heads: Mapping, alone: Collection[str], trained: Collection[str]) -> None:
    """Give what was tied a place of its own, and let train what did."""
    for name in alone:
        module, _, end = name.rpartition(".")
        setattr(model.get_submodule(module), end, nn.Parameter(heads[name], requires_grad=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if plain_name(name) in trained:
            parameter.requires_grad_(True)


def remember(model: nn.Module, heads: Collection[str]) -> None:
    """Mark the modules that these tensors lie in, so that `save_adapter` writes them again."""
    for name, module in model.named_modules():
        if not name.endswith("base_layer") and any(f"{plain_name(name)}.{end}" in heads
                                                   for end, _ in module.named_parameters(recurse=False)):
            module.comes_with_adapter = True


def _chosen(model: nn.Module, entries: Collection[str]) -> dict[str, nn.Module]:
    """The modules whose plain names end in one of the entries."""
    names = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    return {name: module for name, module in names.items()
            if name.endswith(tuple(entries)) and not name.endswith("base_layer")}


def _embeddings(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own tensors that a file brings unasked: PEFT saves an embedding or a head that is a target, or that
    grew, beside the factors, and puts it back when it loads.
    """
    own = {plain_name(name): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    found = {name: name.replace(".base_layer.", ".") for name in stored if ".lora_" not in name}
    return {name: own[plain] for name, plain in found.items()
            if plain in own and plain.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS}
