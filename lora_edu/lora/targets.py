"""Which linear layers get a LoRA: PEFT's rules of matching (0.21), and the four placements that the course compares.

A list matches names that equal an entry or end in "." + entry; a string is a regular expression for the whole name;
"all-linear" is every linear layer but the output head, and which that is, `output_heads` says. What torch.compile,
DataParallel and other wrappers put into a name is looked through.
"""
import dis
import difflib
import functools
import inspect
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")     # of a LLaMA's block
PLACEMENTS = {"all-linear": PROJECTIONS, "MLP": PROJECTIONS[4:], "Q, K, V, O": PROJECTIONS[:4],
              "Q, V": ("q_proj", "v_proj")}
HEADS = ("lm_head", "head", "score", "classifier")                  # what an output head is called
WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod", model._modules.get("module"))
    return model


def unwrap_to_train(model: nn.Module) -> nn.Module:
    """The same, for whoever changes what trains. ValueError for DistributedDataParallel: it sends the gradients of what
    trained when it was made, and later factors would be trained by every process for itself.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("the model is inside DistributedDataParallel already, which would not send the gradients of "
                         "what trains from now on: change the model first, then put DistributedDataParallel around it.")
    return unwrap(model)


def plain_name(name: str) -> str:
    """A module's name without what wrappers around it, or around one of its parents, put in.

    >>> plain_name("model.layers.0._orig_mod.q_proj")
    'model.layers.0.q_proj'
    """
    return WRAPPERS.sub("", name).removeprefix(".")


def find_targets(model: nn.Module, linears: dict[str, nn.Module], target_modules: Sequence[str] | str) -> list[str]:
    """Names of the linear layers that `target_modules` asks for, in the model's order."""
    if not linears:
        raise ValueError(f"this {type(model).__name__} has no linear layer, and LoRA goes beside nn.Linear and "
                         "transformers' Conv1D: give a model that has one.")
    if isinstance(target_modules, str):
        if target_modules.lower() == "all-linear":
            heads = output_heads(model, linears)
            found = [name for name in linears if name not in heads]
            if not found:
                raise ValueError(f"'all-linear' leaves out the output head {heads[0]!r}, and it is the only linear "
                                 "layer: name it in a list.")
            return found
        try:
            found = [name for name in linears if re.fullmatch(target_modules, plain_name(name))]
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is read as a regular expression, and it is none "
                             f"({error}): give a list of name endings such as ['q_proj', 'v_proj'].") from None
        if not found:
            raise ValueError(f"target_modules={target_modules!r} is read as a regular expression for whole names and "
                             f"matches no linear layer: the model has {shorten(list(linears))}. "
                             f"{_near_misses(target_modules, linears)}".rstrip())
        return found
    entries = list(target_modules) if isinstance(target_modules, (list, tuple, set, frozenset)) else []
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"target_modules={target_modules!r} is empty, or no list of names: name at least one layer "
                         "ending, such as 'q_proj', or pass 'all-linear'.")
    for entry in entries:
        if not any(ends_in(name, entry) for name in linears):
            raise ValueError(f"target_modules entry {entry!r} matches no linear layer. {_near_misses(entry, linears)}")
    return [name for name in linears if any(ends_in(name, entry) for entry in entries)]


def ends_in(name: str, entry: str) -> bool:
    return ("." + plain_name(name)).endswith("." + entry)


def by_ending(named: Mapping) -> dict[str, list]:
    """What lies under names of one ending, such as "q_proj", together, in order."""
    kinds: dict[str, list] = {}
    for name, each in named.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(each)
    return kinds


def _near_misses(entry: str, linears: dict[str, nn.Module]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    close = difflib.get_close_matches(entry, endings, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"The endings here are {shorten(endings)}."


def shorten(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def output_heads(model: nn.Module, linears: dict[str, nn.Module]) -> list[str]:
    """The layers that make the outputs, which "all-linear" leaves out.

    A transformers model says which it is, or has none; its classification head is known by its name. In any other
    model, and around a transformers model: a layer called as in `HEADS`, else the last one whose output no linear
    layer could read, else the last one; but none that has brothers of its name or lies in a numbered block.
    """
    inside: list[str] = []                               # of transformers models, wherever they lie
    heads: list[str] = []
    for prefix, module in model.named_modules():
        if hasattr(module, "get_output_embeddings") and not any(prefix == p or prefix.startswith(p + ".") or not p
                                                                for p in inside):
            inside.append(prefix)
            said = module.get_output_embeddings()
            heads += [name for name, linear in linears.items() if linear is said
                      or (said is None and name in (f"{prefix}.{end}".removeprefix(".") for end in HEADS))]
    free = [name for name in linears if not any(not p or name.startswith(p + ".") for p in inside)]
    return heads + _heads_by_name_or_shape({name: linears[name] for name in free})


def _heads_by_name_or_shape(linears: dict[str, nn.Module]) -> list[str]:
    ends = [name.rpartition(".")[2] for name in linears]
    alone = [name for name, end in zip(linears, ends) if (ends.count(end) == 1 or name == end)
             and not re.search(r"(^|\.)\d+\.(?!\d)", name)]
    named = [name for name in alone if name.rpartition(".")[2] in HEADS]
    # (out, in), without a look at the weight, which may be computed when it is read
    widths = {linear: (linear.out_features, linear.in_features) if hasattr(linear, "out_features")
              else tuple(linear.weight.shape)[::-1] for linear in linears.values()}
    read = {into for _, into in widths.values()}
    unread = [name for name in alone if widths[linears[name]][0] not in read]
    last = [name for name in list(linears)[-1:] if name in alone]
    if named:                                            # and what answers after it, as a value head does
        order = list(linears)
        return named + [name for name in unread if "." not in name and order.index(name) > order.index(named[-1])]
    return unread[-1:] or last


def weight_readers(model: nn.Module) -> set[str]:
    """Names of the children whose `weight` their parent's code reads, and so may go past their forward: attention's
    out_proj, the encoder layer's linear1 and linear2 in eval mode, a state-space layer's dt_proj.

    >>> sorted(weight_readers(nn.TransformerEncoderLayer(8, 2, 16)))
    ['linear1', 'linear2', 'norm1', 'norm2', 'self_attn.out_proj']
    """
    return {f"{name}.{child}".removeprefix(".") for name, parent in model.named_modules()
            for child in _weights_read_in(type(parent)) if child in parent._modules}


@functools.cache
def _weights_read_in(cls: type) -> frozenset[str]:
    """The names in `self.NAME.weight`, in all methods but those that set the weights up; read from their bytecode."""
    found = set()
    for base in cls.__mro__[:cls.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if code is not None and not re.match("_*(init|reset)", name):
                loads = [step.argval for step in dis.get_instructions(code)]
                found |= {before for before, after in zip(loads, loads[1:]) if after == "weight"}
    return frozenset(name for name in found if isinstance(name, str))


def refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """A tied weight cannot be adapted alone: merged, the update would land in both places (silently wrong in PEFT
    0.21).
    """
    for names in _users(model).values():
        for name in targets:
            if f"{name}.weight" in names and len(names) > 1:
                raise ValueError(f"the weights {' and '.join(names)} are one tensor (tied): leave {name!r} out of "
                                 "target_modules, or untie them first by giving one a copy.")


def tied_parameters(model: nn.Module) -> set[str]:
    """Plain names of the parameters that share their tensor with another."""
    return {plain_name(name) for names in _users(model).values() if len(names) > 1 for name in names}


def _users(model: nn.Module) -> dict[tuple, list[str]]:
    """A tensor -> the names of all parameters that are it."""
    users: dict[tuple, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            users.setdefault(storage_of(parameter), []).append(f"{module_name}.{parameter_name}")
    return users


def storage_of(tensor: torch.Tensor) -> tuple:
    """What two names of one tensor have in common: its memory, or where none is to be seen (a shard, a tensor without
    values), the object.
    """
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    storage = tensor.untyped_storage() if plain else None
    return (storage.data_ptr(), tensor.storage_offset()) if storage and storage.data_ptr() else (id(tensor),)
