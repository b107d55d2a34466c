"""Many adapters trained in one pass: the loop of `train` over a `LoRAStack`.

Runs that share a pass share every product with a frozen weight, and what Python costs; each keeps its own loss,
gradient norm, learning rate and optimizer state, so that its numbers are those of training it alone.
"""
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.lora.stack import LoRAStack
from lora_edu.training.loop import Batch, loss_on, mode, warmup_linear
from lora_edu.training.loss_scale import LossScale

ROWS = 8      # of a held-out batch that every adapter reads at a time: as much as training takes, or less


@dataclass(frozen=True)
class StackStep:
    """What one step of a stack did: the loss of each adapter's rows before its update (nats per token; nan once it
    has diverged), and how many steps of each have overflowed in float16 so far, and were skipped.
    """

    step: int
    losses: list[float]
    skipped: list[int]


def group_losses(model: nn.Module, batch: Batch, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses (nats, float32 or wider) and count of the tokens that count, for each of `groups`
    groups of rows.
    """
    each = loss_on(model, batch, "none")
    return each.view(groups, -1).sum(1), (batch[1].to(each.device) != -100).view(groups, -1).sum(1)


def side_by_side(batches: list[Batch]) -> Batch:
    """One batch of groups; shorter rows are padded on the right with a token that no loss counts and no earlier one
    sees.

    Raises ValueError if one batch has more rows than another: the groups of a stack are of one size.
    """
    counts = sorted({len(inputs) for inputs, _ in batches})
    if len(counts) > 1:
        raise ValueError(f"batches of {' and '.join(map(str, counts))} rows side by side: give every adapter as many "
                         "rows as the others.")
    width = max(inputs.shape[1] for inputs, _ in batches)
    padded = [(F.pad(inputs, (0, width - inputs.shape[1])), F.pad(targets, (0, width - targets.shape[1]), value=-100))
              for inputs, targets in batches]
    return torch.cat([inputs for inputs, _ in padded]), torch.cat([targets for _, targets in padded])


def train_stack(stack: LoRAStack, batches: Iterable[Batch], steps: int, *,
                schedule: Callable[[int, int], float] = warmup_linear(),
                max_grad_norm: float | None = 1.0, autocast: torch.dtype | None = None,
                losses_of: Callable[[nn.Module, Batch, int], tuple[torch.Tensor, torch.Tensor]] = group_losses
                ) -> Iterator[StackStep]:
    """Train every adapter of the stack, in place, and yield a `StackStep` after each step; each is what `train` would
    make of it alone.

    An adapter whose loss or gradient is no longer finite has diverged: it goes back to its start, its losses are nan
    from then on, and its neighbours go on untouched. (In float16 each has its own loss scale, and a gradient that
    overflows skips a step.)

    Args:
        batches: (inputs, targets), each with a group of rows for every adapter, as many rows each; see `side_by_side`.
        schedule, max_grad_norm, autocast: as in `train`; gradients are clipped for each adapter by its own norm.
        losses_of: another loss than that of the next token, with the arguments and results of `group_losses`.

    Raises:
        ValueError: batches that end early, rows of which no token counts, factors in 16 bits, a first gradient of zero.
    """
    _refuse_narrow(stack)
    model, alive = stack.model, [True] * len(stack)
    parameters = [stack.parameters_of(i) for i in range(len(stack))]
    device = parameters[0][0].device
    # fused: one call for an adapter; a loop over its tensors is slower
    optimizer = torch.optim.AdamW([{"params": group, "lr": 0.0} for group in parameters], weight_decay=0.0,
                                  fused=device.type in ("cpu", "cuda"))
    batches, scale = iter(batches), LossScale(len(stack), autocast)
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(mode(model, training=True))
        afterwards.callback(stack.zero_grad)
        for step in range(steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step} steps, and {steps} were asked for.")
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                sums, counts = losses_of(model, batch, len(stack))
            _refuse_uncounted(counts, step)
            losses = sums / counts
            stack.zero_grad()
            (losses * torch.tensor(scale.scales).to(losses)).sum().backward()
            norms = []
            for i, group in enumerate(parameters):
                stack.share_gradients(i, group)
                scale.unscale(i, group)
                norms.append(nn.utils.clip_grad_norm_(group, math.inf if max_grad_norm is None else max_grad_norm))
                optimizer.param_groups[i]["lr"] = stack.adapters[i].lr * schedule(step, steps)
            said, norms = losses.tolist(), torch.stack(norms).tolist()
            if not step:
                _refuse_unmoved(norms)
            _leave_out(stack, parameters, alive, said, norms, scale)
            optimizer.step()
            yield StackStep(step + 1, [loss if ok else math.nan for loss, ok in zip(said, alive)], list(scale.skipped))


def _refuse_narrow(stack: LoRAStack) -> None:
    if any(layer.lora_A.dtype in (torch.float16, torch.bfloat16) for layer in stack.layers.values()):
        raise ValueError("the stack's factors are in 16 bits, which round small steps away: move the model to its "
                         "dtype before LoRAStack, which makes factors in float32.")


def _refuse_uncounted(counts: torch.Tensor, step: int) -> None:
    if not counts.all():
        raise ValueError(f"step {step + 1}: no token of adapter {counts.tolist().index(0)}'s rows counts, all their "
                         "targets are -100: look at how the prompt is masked and where the text is cut.")


def _refuse_unmoved(norms: list[float]) -> None:
    if not all(norms):
        raise ValueError(f"adapter {[bool(norm) for norm in norms].index(False)}'s first gradient is exactly zero, so "
                         "nothing of it would move: is its alpha 0?")


def _leave_out(stack: LoRAStack, parameters: list, alive: list[bool], losses: list[float], norms: list[float],
               scale: LossScale) -> None:
    """Who has overflowed in float16 gets no step this time; who has just diverged goes back to its start and gets none
    any more. `alive` is brought up to date.
    """
    for i, group in enumerate(parameters):
        skipped = alive[i] and scale.skips(i, losses[i], norms[i])
        if alive[i] and not skipped and not math.isfinite(losses[i] + norms[i]):
            alive[i] = False
            stack.reset(i)
        if skipped or not alive[i]:
            for parameter in group:
                parameter.grad = None


def evaluate_stack(stack: LoRAStack, batches: Iterable[Batch]) -> list[float]:
    """Mean loss in nats per token of every adapter on the same batches, in eval mode; the model's mode is put back.

    Raises ValueError if there is no token that counts.
    """
    total = count = torch.zeros(len(stack))
    with mode(stack.model, training=False), torch.no_grad():
        for inputs, targets in ((i, t) for batch in batches for i, t in zip(*(part.split(ROWS) for part in batch))):
            sums, counts = group_losses(stack.model, (inputs.repeat(len(stack), 1), targets.repeat(len(stack), 1)),
                                        len(stack))
            # on the CPU: Apple's GPUs have no float64
            total, count = total + sums.cpu().double(), count + counts.cpu()
    if not count.all():
        raise ValueError("no held-out token counts: give at least one batch whose targets are not all -100.")
    return (total / count).tolist()
