"""What a training step keeps in memory, measured: run one and count. The prediction is in `memory.py`."""
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_edu.training.autograd_kept import kept_by_autograd


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all that operators return and that is still held: `now`, and at the most, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        known, new = ({t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(some)
                       if isinstance(t, torch.Tensor)} for some in ((args, kwargs), found))
        for address in new.keys() - known.keys():          # views, and what is written in place, are known
            self.now += new[address].nbytes()
            weakref.finalize(new[address], self._gone, new[address].nbytes())
        self.peak = max(self.peak, self.now)
        return found

    def _gone(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Measured:
    """Bytes that were there: `kept` is every tensor that autograd kept, (shape, dtype, bytes), storage that is shared
    counted once.

    `peak`: the most that was there at once. On CUDA the allocator's own count, of the whole step; elsewhere weights,
    adapter and what the operators of the forward and backward pass return, without what one needs for itself alone.
    """

    weights: int
    adapter: int
    gradients: int
    states: int
    kept: tuple[tuple[tuple[int, ...], torch.dtype, int], ...]
    peak: int

    @property
    def activations(self) -> int:
        return sum(size for _, _, size in self.kept)

    @property
    def parts(self) -> dict[str, int]:
        """Under the names of `Bill.parts`."""
        return {"weights": self.weights, "adapter": self.adapter, "gradients": self.gradients,
                "optimizer states": self.states,
                "activations": self.activations}


def measure(model: nn.Module, loss: Callable[[], torch.Tensor],
            optimizer: torch.optim.Optimizer | None = None) -> Measured:
    """Run one training step and count. The model's weights are not what is counted as kept, nor are views of what is
    counted already.

    Args:
        loss: computes the loss of the step, a scalar: ``lambda: loss_on(model, batch)``.
        optimizer: takes a step, so that its states exist; without one there are none.

    Raises:
        ValueError: the loss is not a scalar that anything trainable leads to.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.zero_grad(set_to_none=True)
    with kept_by_autograd() as found, LiveBytes() as live:
        value = loss()
    if value.ndim or not value.requires_grad:
        raise ValueError(f"the loss has shape {tuple(value.shape)} and "
                         + ("depends on" if value.requires_grad else "depends on nothing")
                         + " that trains: return one number, of a model in which something trains.")
    kept_tensors = tuple((shape, dtype, storage.nbytes()) for pointer, (storage, shape, dtype) in found.items()
                         if pointer not in own)
    found.clear()                                     # held no longer: the peak is the step's, not the measurement's
    with live:
        value.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = 0
    if optimizer is not None:
        optimizer.step()
        states = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()
                     if isinstance(tensor, torch.Tensor) and tensor.ndim)          # step counters are numbers
    model.zero_grad(set_to_none=True)
    adapter = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    weights = sum(p.nbytes for p in model.parameters()) - adapter
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else weights + adapter + live.peak
    return Measured(weights, adapter, gradients, states, kept_tensors, peak)


def checkpoint_blocks(model: nn.Module) -> None:
    """Gradient checkpointing for the course's `Llama`: each block keeps its input, and is computed again in the
    backward pass.

    The gradients stay the same, bit for bit; models of transformers have a method for it. Source: Chen et al. (2016),
    arXiv:1604.06174.
    """
    for block in model.model["layers"]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
