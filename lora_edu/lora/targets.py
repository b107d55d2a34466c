"""Which linear layers get a LoRA: PEFT's rules of matching (0.21), and the four placements that the course compares.

A list matches names that equal an entry or end in "." + entry; a string is a regular expression for the whole name;
"all-linear" is every linear layer but the output head.
"""
import difflib
import re
from collections.abc import Sequence

from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")     # of a LLaMA's block
PLACEMENTS = {"all-linear": PROJECTIONS, "MLP": PROJECTIONS[4:], "Q, K, V, O": PROJECTIONS[:4],
              "Q, V": ("q_proj", "v_proj")}


def find_targets(model: nn.Module, linears: dict[str, nn.Module], target_modules: Sequence[str] | str) -> list[str]:
    """Names of the linear layers that `target_modules` asks for, in the model's order."""
    if isinstance(target_modules, str):
        if target_modules.lower() == "all-linear":
            head = _output_head(model, linears)
            found = [name for name in linears if name != head]
            if not found:
                raise ValueError(f"'all-linear' leaves out the output head {head!r}, and it is the only linear layer: "
                                 "name it in a list.")
            return found
        found = [name for name in linears if re.fullmatch(target_modules, name)]
        if not found:
            raise ValueError(f"target_modules={target_modules!r} is read as a regular expression for whole names and "
                             f"matches no linear layer: the model has {shorten(list(linears))}. "
                             f"{_near_misses(target_modules, linears)}".rstrip())
        return found
    entries = list(target_modules)
    if not entries:
        raise ValueError("target_modules is empty: name at least one layer ending, "
                         "such as 'q_proj', or pass 'all-linear'.")
    for entry in entries:
        if not any(ends_in(name, entry) for name in linears):
            raise ValueError(f"target_modules entry {entry!r} matches no linear layer. {_near_misses(entry, linears)}")
    return [name for name in linears if any(ends_in(name, entry) for entry in entries)]


def ends_in(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _near_misses(entry: str, linears: dict[str, nn.Module]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    close = difflib.get_close_matches(entry, endings, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"The endings here are {shorten(endings)}."


def shorten(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _output_head(model: nn.Module, linears: dict[str, nn.Module]) -> str | None:
    """The layer that makes the outputs: what a transformers model says it is, else the linear layer registered last."""
    said = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if said is not None:
        return next((name for name, module in linears.items() if module is said), None)
    return next(reversed(linears), None)


def refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """A tied weight cannot be adapted alone: merged, the update would land in both places (silently wrong in PEFT
    0.21).
    """
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            key = id(parameter) if parameter.is_meta else parameter.data_ptr()
            users.setdefault(key, []).append(f"{module_name}.{parameter_name}")
    for names in users.values():
        for name in targets:
            if f"{name}.weight" in names and len(names) > 1:
                raise ValueError(f"the weights {' and '.join(names)} are one tensor (tied): leave {name!r} out of "
                                 "target_modules, or untie them first by giving one a copy.")
