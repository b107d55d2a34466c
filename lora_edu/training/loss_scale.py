"""Float16's remedy: gradients under 6e-8 are zero there, so a loss is multiplied before the backward pass and its
gradients are divided after it, before anything looks at them.

A scale whose gradients overflow is halved and that step is skipped; after 2,000 steps without, it doubles.
`torch.amp.GradScaler` does this for one optimizer; here every run of a stack has a scale of its own, so that its
numbers are those of training it alone. Source: Micikevicius et al. (2018), arXiv:1710.03740, section 3.2.
"""
import math
from collections.abc import Iterable

import torch
from torch import nn


class LossScale:
    """A scale for each of so many runs, 2^16 at first; with products in another type than float16 it is 1, and nothing
    is skipped.

    Attributes:
        scales: what each run's loss is multiplied by. skipped: how many of its steps have overflowed.

    >>> scale = LossScale(1, torch.float16)
    >>> scale.skips(0, loss=2.5, norm=float("inf")), scale.scales, scale.skipped
    (True, [32768.0], [1])
    """

    first, doubles_after = 2.0**16, 2000

    def __init__(self, runs: int, autocast: torch.dtype | None):
        self.on = autocast == torch.float16
        self.scales = [self.first if self.on else 1.0] * runs
        self.skipped, self.since = [0] * runs, [0] * runs

    def unscale(self, i: int, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients of run i by its scale, in place."""
        if self.scales[i] != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.scales[i]

    def skips(self, i: int, loss: float, norm: float) -> bool:
        """Is run i's step to be skipped? A finite loss, a gradient norm that is not, and a scale that can still fall;
        what overflows at scale 1 has diverged. Brings the scale up to date.
        """
        over = self.on and math.isfinite(loss) and not math.isfinite(norm) and self.scales[i] > 1
        self.since[i] = 0 if over else self.since[i] + 1
        if over:
            self.scales[i] /= 2
            self.skipped[i] += 1
        elif self.on and self.since[i] == self.doubles_after:
            self.scales[i], self.since[i] = 2 * self.scales[i], 0
        return over
