"""What autograd keeps of a forward pass for the backward pass."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Kept(NamedTuple):
    """A storage that is kept, and the first tensor that looked at it. Held, so that no address is used twice."""

    storage: torch.UntypedStorage
    shape: tuple[int, ...]
    dtype: torch.dtype


@contextmanager
def kept_by_autograd() -> Iterator[dict[int, Kept]]:
    """Collects, by address, every storage that autograd keeps within the block, weights included, each once however
    many views it has.
    """
    found: dict[int, Kept] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), Kept(storage, tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
