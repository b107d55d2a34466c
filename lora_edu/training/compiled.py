"""A loss through torch.compile: the same numbers up to rounding, and faster steps after a slow first one."""
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

MULTIPLE = 16    # each new length of the rows is compiled anew, so let there be few


def padded(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up on the right to a multiple of 16 tokens, where no loss counts and no earlier token looks."""
    more = -inputs.shape[1] % MULTIPLE
    return F.pad(inputs, (0, more)), F.pad(targets, (0, more), value=-100)


def compiled(loss_of: Callable, compute: Callable) -> Callable[..., torch.Tensor]:
    """`loss_of(model, batch, reduction)` with its `compute` compiled, the model and the loss in one. Where that fails
    (no C++ compiler, a Python too new for it), it warns once and is `loss_of` from then on.
    """
    fast, failed = None, False

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], reduction: str = "mean") -> torch.Tensor:
        nonlocal fast, failed
        if not failed:
            try:
                fast = torch.compile(compute, dynamic=False) if fast is None else fast
                return loss_of(model, padded(*batch), reduction, fast)
            except Exception as error:          # compilers raise what they like
                plain = loss_of(model, batch, reduction)   # the reader's own error, if it is that
                failed, first = True, (str(error).strip() or type(error).__name__).splitlines()[0][:150]
                warnings.warn(f"torch.compile does not work here ({first}): the plain loop goes on.", stacklevel=3)
                return plain
        return loss_of(model, batch, reduction)
    return loss
