"""Which base an adapter was made for: a few numbers of tensors that no adapter changes, kept beside its factors.

An adapter loads on any model of the same shapes, and is noise on all but one. Whether this is the one, a name cannot
say; numbers can. They are rounded to bfloat16 and compared with room for one rounding, so that the base may be loaded
in 16 bits; they come from embeddings, norms and biases, so that its matrices may be quantised.
"""
import json
from collections.abc import Collection, Mapping

import torch
from torch import nn

from lora_edu.lora.layer import FLOATS, is_linear
from lora_edu.lora.targets import plain_name

BASE = "lora_edu.base"                      # the key of the tensor file's metadata that it lies under
TENSORS, VALUES = 8, 32                     # the largest tensors; numbers of each, evenly spread
ROUNDING = 2**-7                            # twice what bfloat16 moves a number; float16 moves it less, but small ones
SMALLEST = 2**-23


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str | None:
    """JSON: name of a tensor -> its shape and some of its values. None for a model in which nothing stays; `without`:
    names of tensors that are the adapter's.
    """
    untouched = next((group for group in _parameters(model) if group), {})
    return fingerprint_of({name: p for name, p in untouched.items() if not p.requires_grad and name not in without})


def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The same from tensors by name."""
    largest = sorted(tensors, key=lambda name: -tensors[name].numel())[:TENSORS]
    said = {name: [list(tensors[name].shape), _values(tensors[name], tensors[name].numel())] for name in largest}
    return json.dumps(said) if said else None


def differs(said: str, model: nn.Module) -> str | None:
    """The first tensor of a fingerprint that is another one in this model, in words; None where all agree."""
    known = {name: parameter for group in _parameters(model) for name, parameter in group.items()}
    for name, (shape, values) in _read(said).items():
        tensor = known.get(name)
        # a vocabulary that grew has more rows, and the old ones in their places
        if tensor is None or tensor.shape[1:] != torch.Size(shape[1:]) or len(tensor) < shape[0]:
            return f"{name} is {'missing' if tensor is None else 'of another shape'} here"
        there, own = torch.tensor(values), torch.tensor(_values(tensor, torch.Size(shape).numel()))
        if not torch.allclose(own, there, rtol=ROUNDING, atol=SMALLEST):
            return f"{name} holds other numbers here"
    return None


def same_base(one: str, other: str) -> bool:
    """Do two fingerprints agree in what both of them hold? There must be something that both hold."""
    left, right = _read(one), _read(other)
    both = [(*left[name], *right[name]) for name in left if name in right]
    return bool(both) and all(shape == its and torch.allclose(torch.tensor(values), torch.tensor(its_values), ROUNDING,
                                                              SMALLEST) for shape, values, its, its_values in both)


def _read(said: str) -> dict:
    try:
        found = {str(name): ([int(n) for n in shape], [float(v) for v in values])
                 for name, (shape, values) in json.loads(said).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError("the adapter's note of its base cannot be read: fetch the adapter again.") from None
    return found


def _values(tensor: torch.Tensor, numel: int) -> list[float]:
    """Numbers at evenly spread places among the first `numel`, rounded to bfloat16."""
    count = min(numel, VALUES)
    # whole numbers: from 2**24 on float32 has no place for each
    places = (torch.arange(count) * (numel - 1) // max(count - 1, 1)).to(tensor.device)
    return tensor.detach().reshape(-1)[places].bfloat16().float().tolist()


def _parameters(model: nn.Module) -> tuple[dict, dict, dict]:
    """Name -> parameter, of three sorts: of what LoRA does not go beside; biases of linear layers; their weights."""
    groups: tuple[dict, dict, dict] = ({}, {}, {})
    for prefix, module in model.named_modules():
        for end, parameter in module.named_parameters(recurse=False):
            name = f"{plain_name(prefix)}.{end}".replace(".base_layer.", ".").removeprefix(".")
            there = parameter.dtype in FLOATS and parameter.numel() and not parameter.is_meta
            if there and end not in ("lora_A", "lora_B"):
                groups[(1 if end == "bias" else 2) if is_linear(module) else 0][name] = parameter
    return groups
