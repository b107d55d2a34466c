"""What processes send each other: the bytes that every collective operator is given, counted while it runs.

DDP and FSDP2 call the same few operators (all-reduce, all-gather, reduce-scatter); a mode that sees every operator sees
these too. How many bytes then go over a wire depends on how the collective is made: a ring all-reduce of b bytes over n
processes sends 2 (n - 1) / n b from each of them, an all-gather or a reduce-scatter (n - 1) / n b.

Source: Patarasuk and Yuan (2009), "Bandwidth optimal all-reduce algorithms", for the ring.
"""
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# an operator of c10d, by the start of its name -> what it is
COLLECTIVES = {"allreduce": "all-reduce", "_allgather_base": "all-gather", "allgather": "all-gather",
               "_reduce_scatter_base": "reduce-scatter", "reduce_scatter": "reduce-scatter", "broadcast": "broadcast"}


class Traffic(TorchDispatchMode):
    """Inside, `given` counts the bytes of each kind of collective, and `calls` how often it was called.

    What is counted is the whole tensor that is reduced or gathered. Tensors of `smallest` numbers or fewer are left
    out: counts and losses, a few bytes a step.

    >>> with Traffic() as traffic:
    ...     _ = torch.ones(3) + 1
    >>> dict(traffic.given)
    {}
    """

    def __init__(self, smallest: int = 8):
        super().__init__()
        self.given, self.calls, self.smallest = Counter(), Counter(), smallest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            kind = next((kind for start, kind in COLLECTIVES.items() if name.startswith(start)), None)
            numel, size = largest(args)
            if kind and numel > self.smallest:
                self.given[kind] += size
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def largest(args) -> tuple[int, int]:
    """Numbers and bytes of the largest tensor, or list of tensors, among an operator's arguments."""
    found = [(0, 0)]
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append((arg.numel(), arg.nbytes))
        elif isinstance(arg, (list, tuple)):
            flat = [t for each in arg for t in (each if isinstance(each, (list, tuple)) else [each])]
            tensors = [t for t in flat if isinstance(t, torch.Tensor)]
            found.append((sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)))
    return max(found)
