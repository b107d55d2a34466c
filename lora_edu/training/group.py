"""This process among several that train one model: which rows are its own, and what all of them have in common.

The loss of a step is a sum over all tokens of all processes, divided by their number. Averaged over processes instead,
a token in a batch with few of them would count for more, and nobody would notice.
"""
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lora_edu.numbers import whole

Batch = tuple[torch.Tensor, torch.Tensor]
STRATEGIES = ("ddp", "fsdp")           # DistributedDataParallel; fully_shard, called FSDP2


@dataclass(frozen=True)
class Group:
    """Process `rank` of `size`; the only one unless said otherwise.

    >>> Group().total(3.0, torch.device("cpu"))
    3.0
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self):
        if whole(self.size) is None or whole(self.rank) is None or not 0 <= self.rank < self.size:
            raise ValueError(f"process {self.rank!r} of {self.size!r}: the first is 0, the last {self.size!r} - 1.")

    def mine(self, batch: Batch, pieces: int = 1) -> Batch:
        """This process's rows of a batch, in order; the first processes have one more where they do not divide evenly.

        Raises ValueError for fewer rows than processes, or than all their pieces: in all of them, before one waits.

        >>> rows = torch.arange(10).view(5, 2)
        >>> [Group(rank, 2).mine((rows, rows))[0].tolist() for rank in (0, 1)]
        [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
        """
        if self.size > 1 and whole(pieces):
            cut(batch, self.size * pieces, "pieces of all processes" if pieces > 1 else "processes")
        return batch if self.size == 1 else cut(batch, self.size, "processes")[self.rank]

    def total(self, value: float, device: torch.device) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        sum_of = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(sum_of)
        return sum_of.item()

    def check_reached(self, trained: Sequence[nn.Parameter], first: bool) -> None:
        """Raise ValueError in all processes where after the first backward pass of several one has a parameter without
        a gradient: DDP waits for all of them, sends none until then, and the processes would go apart.
        """
        if self.size == 1 or not first:
            return
        missing = sum(p.requires_grad and p.grad is None for p in trained)
        if self.total(float(missing), trained[0].device):
            raise ValueError(f"{missing} of {len(trained)} tensors that train got no gradient, and several processes "
                             "need one for each: freeze what a batch does not use, or leave it out of target_modules.")

    @contextlib.contextmanager
    def sending(self, model: nn.Module, yes: bool):
        """Inside, a backward pass sends its gradients to the others, or keeps them for the next one to add to."""
        if hasattr(model, "set_requires_gradient_sync"):                  # FSDP2's
            model.set_requires_gradient_sync(yes)
        quiet = not yes and isinstance(model, nn.parallel.DistributedDataParallel)
        with model.no_sync() if quiet else contextlib.nullcontext():
            yield


def cut(batch: Batch, parts: int, what: str) -> list[Batch]:
    """A batch's rows in so many parts, in order; ValueError for no such number, and for fewer rows than parts."""
    inputs, targets = batch
    if whole(parts) is None or parts < 1:
        raise ValueError(f"{what}={parts!r}: choose a whole number, 1 or more.")
    if len(inputs) < parts:
        raise ValueError(f"{len(inputs)} rows for {parts} {what}: give each at least one, or ask for fewer {what}.")
    return list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))
