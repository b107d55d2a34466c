"""Train a whole grid of adapters at once: `sweep` cuts it into chunks, and `train_stack` trains one chunk in one pass.

Runs that share a pass share every product with a frozen weight, and what Python costs; each keeps its own loss, gradient
norm, learning rate and optimizer state, so that its numbers are those of training it alone.
"""
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lora_edu.files import write_whole
from lora_edu.lora.report import html_table, text_table
from lora_edu.lora.stack import Adapter, LoRAStack, targets_of
from lora_edu.training.loop import Batch, loss_on, warmup_linear
from lora_edu.training.saved import saved_tensors

CPU, OTHERS = 8, 64      # adapters in a pass at most: a CPU is busy with fewer, and more leave its caches
ROWS = 8      # of a held-out batch that every adapter reads at a time: as much as training takes, or less


@dataclass(frozen=True)
class StackStep:
    """What one step of a stack did: the loss of each adapter's rows before its update (nats per token; nan once it has diverged)."""

    step: int
    losses: list[float]


def group_losses(model: nn.Module, batch: Batch, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the next-token losses (nats, float32 or wider) and count of the tokens that count, for each of `groups` groups of rows."""
    each = loss_on(model, batch, "none")
    return each.view(groups, -1).sum(1), (batch[1].to(each.device) != -100).view(groups, -1).sum(1)


def side_by_side(batches: list[Batch]) -> Batch:
    """One batch of groups; shorter rows are padded on the right with a token that no loss counts and no earlier one sees.

    Raises ValueError if one batch has more rows than another: the groups of a stack are of one size.
    """
    counts = sorted({len(inputs) for inputs, _ in batches})
    if len(counts) > 1:
        raise ValueError(f"batches of {' and '.join(map(str, counts))} rows side by side: give every adapter as many rows as the others.")
    width = max(inputs.shape[1] for inputs, _ in batches)
    padded = [(F.pad(inputs, (0, width - inputs.shape[1])), F.pad(targets, (0, width - targets.shape[1]), value=-100))
              for inputs, targets in batches]
    return torch.cat([inputs for inputs, _ in padded]), torch.cat([targets for _, targets in padded])


def train_stack(stack: LoRAStack, batches: Iterable[Batch], steps: int, *, schedule: Callable[[int, int], float] = warmup_linear(),
                max_grad_norm: float | None = 1.0, autocast: torch.dtype | None = None,
                losses_of: Callable[[nn.Module, Batch, int], tuple[torch.Tensor, torch.Tensor]] = group_losses) -> Iterator[StackStep]:
    """Train every adapter of the stack, in place, and yield a `StackStep` after each step; each is what `train` would make of it alone.

    An adapter whose loss or gradient is no longer finite has diverged: it goes back to its start, its losses are nan from then
    on, and its neighbours go on untouched.

    Args:
        batches: (inputs, targets), each with a group of rows for every adapter, as many rows each; see `side_by_side`.
        schedule, max_grad_norm, autocast: as in `train`; gradients are clipped for each adapter by its own norm.
        losses_of: another loss than that of the next token, with the arguments and results of `group_losses`.
    """
    model, alive = stack.model, [True] * len(stack)
    parameters = [stack.parameters_of(i) for i in range(len(stack))]
    device = parameters[0][0].device
    optimizer = torch.optim.AdamW([{"params": group, "lr": 0.0} for group in parameters], weight_decay=0.0,
                                  fused=device.type in ("cpu", "cuda"))     # one call for an adapter; a loop over its tensors is slower
    was_training = model.training
    model.train()
    batches = iter(batches)
    try:
        for step in range(steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step} steps, and {steps} were asked for.")
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                sums, counts = losses_of(model, batch, len(stack))
            losses = sums / counts
            stack.zero_grad()
            losses.sum().backward()
            norms = []
            for i, group in enumerate(parameters):
                stack.share_gradients(i, group)
                norms.append(nn.utils.clip_grad_norm_(group, math.inf if max_grad_norm is None else max_grad_norm))
                optimizer.param_groups[i]["lr"] = stack.adapters[i].lr * schedule(step, steps)
            for i, (finite, group) in enumerate(zip((losses + torch.stack(norms)).isfinite().tolist(), parameters)):
                if not finite and alive[i]:
                    alive[i] = False
                    stack.reset(i)
                if not alive[i]:
                    for parameter in group:
                        parameter.grad = None
            optimizer.step()
            yield StackStep(step + 1, [loss if ok else math.nan for loss, ok in zip(losses.tolist(), alive)])
    finally:
        model.train(was_training)
        stack.zero_grad()


def evaluate_stack(stack: LoRAStack, batches: Iterable[Batch]) -> list[float]:
    """Mean loss in nats per token of every adapter on the same batches, in eval mode; the model's mode is put back.

    Raises ValueError if there is no token that counts.
    """
    was_training = stack.model.training
    stack.model.eval()
    total = count = torch.zeros(len(stack))
    try:
        with torch.no_grad():
            for inputs, targets in ((i, t) for batch in batches for i, t in zip(*(part.split(ROWS) for part in batch))):
                sums, counts = group_losses(stack.model, (inputs.repeat(len(stack), 1), targets.repeat(len(stack), 1)), len(stack))
                total, count = total.to(sums.device) + sums.double(), count.to(counts.device) + counts
    finally:
        stack.model.train(was_training)
    if not count.all():
        raise ValueError("no held-out token counts: give at least one batch whose targets are not all -100.")
    return (total / count).tolist()


class SweepTable(list):
    """One dict a run, in the order of the grid: its settings and `steps`, `scaling`, `trainable` (count), `losses` (one a step, of the
    batch before the update, nats per token), `heldout` ([step, loss], the last one after training), `diverged` (None, or the
    step), and what `score` added."""

    COLUMNS = {"rank": "rank", "alpha": "alpha", "scaling": "scaling", "lr": "learning rate", "seed": "seed", "final": "held-out loss"}

    def best(self, **where) -> dict:
        """The run of the lowest held-out loss among those with these settings. Raises ValueError if there is none."""
        found = [run for run in self if run["diverged"] is None and all(run[key] == value for key, value in where.items())]
        if not found:
            raise ValueError(f"no finished run has {where}: the table has {len(self)} runs.")
        return min(found, key=lambda run: run["heldout"][-1][1])

    def _rows(self) -> list[list[str]]:
        def final(run):
            return f"{run['heldout'][-1][1]:.3f}" if run["diverged"] is None else f"diverged at step {run['diverged']}"
        return [list(self.COLUMNS.values())] + [[f"{run[key]:g}" for key in list(self.COLUMNS)[:-1]] + [final(run)] for run in self]

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def save(self, path: str | Path) -> None:
        """As JSON, written whole or not at all."""
        text = json.dumps(list(self), indent=1, allow_nan=False) + "\n"
        write_whole(Path(path), lambda part: part.write_text(text, encoding="utf-8"))


def sweep(model: nn.Module, grid: Iterable[Adapter], batches: Callable[[int], Iterator[Batch]], steps: int, heldout: list[Batch], *,
          every: int | None = None, memory: float = 4e9, out: str | Path | None = None,
          watch: Callable[[list[int], StackStep], None] | None = None, score: Callable[[nn.Module], dict] | None = None,
          schedule: Callable[[int, int], float] = warmup_linear(), autocast: torch.dtype | None = None) -> SweepTable:
    """Train every adapter of a grid on one base, many at a time, and measure each on the same held-out batches.

    The model is plain again at the end, its weights as before and frozen. The stop button (KeyboardInterrupt) ends the sweep: the
    runs of finished chunks are returned, and with `out` they are on disk, so that the same call goes on from there; a run inside a
    chunk starts again.

    Args:
        batches: ``batches(seed)`` gives the training batches for an adapter's seed, as many rows each.
        every: measure the held-out loss every so many steps, and after the last one (by default only then).
        memory: bytes the training may take beyond the model: adapters, their gradients and Adam states, and activations, which are
            measured on one adapter; the grid is cut into chunks that fit.
        out: a JSON file that finished chunks are written to and read back from.
        watch: called after each step with the grid's numbers of the runs in the chunk and their `StackStep`.
        score: called with each trained model; the dict it returns joins the run's row (a number that is not finite as None).

    Raises:
        ValueError: an empty grid, no steps or no held-out tokens; an adapter that does not fit the model, or alone needs more than
            `memory`; `out` holds another sweep, or no sweep. All before any training. And batches that end early.
    """
    grid, heldout = list(grid), list(heldout)
    targets_of(model, grid)
    tokens = sum((targets != -100).sum().item() for _, targets in heldout)
    if steps < 1 or not tokens:
        raise ValueError(f"steps={steps} and {tokens} held-out tokens that count: a sweep needs at least one of each.")
    rows = _read_finished(out, grid, steps)
    open_runs = sorted((i for i in range(len(grid)) if i not in rows), key=lambda i: grid[i].rank)   # like ranks together: little padding
    chunks = []
    while open_runs:
        fit = _fitting(model, [grid[i] for i in open_runs], batches, memory, autocast)
        chunks.append(open_runs[:fit])
        open_runs = open_runs[fit:]
    with tqdm(total=len(grid) * steps, initial=len(rows) * steps, unit="run-step", leave=False) as bar:
        try:
            for chunk in chunks:
                rows |= zip(chunk, _train_chunk(model, chunk, grid, batches, steps, heldout, every, bar, watch, score, schedule, autocast))
                if out is not None:
                    SweepTable(rows[i] for i in sorted(rows)).save(out)
        except KeyboardInterrupt:
            print(f"Stopped: {len(rows)} of {len(grid)} runs are finished and kept.")
    return SweepTable(rows[i] for i in sorted(rows))


def _train_chunk(model, chunk, grid, batches, steps, heldout, every, bar, watch, score, schedule, autocast) -> list[dict]:
    stack = LoRAStack(model, [grid[i] for i in chunk])
    try:
        losses, measured = [], []
        sources = {seed: iter(batches(seed)) for seed in sorted({grid[i].seed for i in chunk})}
        for step in train_stack(stack, _rows_for(stack, sources), steps, schedule=schedule, autocast=autocast):
            losses.append(step.losses)
            if step.step == steps or (every and step.step % every == 0):
                measured.append((step.step, evaluate_stack(stack, heldout)))
            bar.update(len(chunk))
            if watch:
                watch(chunk, step)
        return [_row(stack, k, [loss[k] for loss in losses], [[step, found[k]] for step, found in measured], steps, score)
                for k in range(len(chunk))]
    finally:
        stack.remove()


def _rows_for(stack: LoRAStack, sources: dict[int, Iterator[Batch]]) -> Iterator[Batch]:
    """Every step's batch for every adapter: one draw for each seed, and adapters of one seed share it."""
    while True:
        try:
            drawn = {seed: next(source) for seed, source in sources.items()}
        except StopIteration:
            return
        yield side_by_side([drawn[adapter.seed] for adapter in stack.adapters])


def _row(stack: LoRAStack, k: int, losses: list[float], heldout: list, steps: int, score) -> dict:
    adapter = stack.adapters[k]
    diverged = min([step for step, loss in [*enumerate(losses, 1), *heldout] if not math.isfinite(loss)], default=None)
    row = asdict(adapter) | {"steps": steps, "scaling": adapter.scaling, "trainable": sum(p.numel() for p in stack.parameters_of(k)),
                             "losses": losses[:diverged - 1] if diverged else losses,
                             "heldout": [pair for pair in heldout if not diverged or pair[0] < diverged], "diverged": diverged}
    scored = score(stack.unstack(k)) if score and not diverged else {}
    return row | {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in scored.items()}


def _read_finished(out, grid: list[Adapter], steps: int) -> dict[int, dict]:
    """The finished runs of an earlier call, by their number in the grid; equal adapters share one."""
    if out is None:
        return {}
    Path(out).parent.mkdir(parents=True, exist_ok=True)      # now, and not after the first chunk
    if not Path(out).exists():
        return {}
    found = {}
    wanted = [json.loads(json.dumps(asdict(adapter) | {"steps": steps})) for adapter in grid]
    try:
        runs = [(run, {key: run[key] for key in wanted[0]}) for run in json.loads(Path(out).read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out} is not the JSON of a sweep: choose another file, or move this one away.") from None
    for run, settings in runs:
        if settings not in wanted:
            raise ValueError(f"{out} holds a run of another sweep, {settings}: choose another file, or move this one away.")
        found |= {i: run | asdict(adapter) for i, adapter in enumerate(grid) if wanted[i] == settings}      # tuples were lists in JSON
    return found


def _fitting(model: nn.Module, adapters: list[Adapter], batches, memory: float, autocast) -> int:
    """How many of these adapters, in their order (ranks rise), to train together: as many as fit the memory and are worth their padding."""
    first = list(itertools.islice(batches(adapters[0].seed), 4))
    if not first:
        raise ValueError(f"batches({adapters[0].seed}) gives no batch: let it give one for every step.")
    widest = max(first, key=lambda batch: batch[0].shape[1])
    on_cpu, fit, need, known = next(model.parameters()).device.type == "cpu", 0, 0.0, {}
    for adapter in adapters[:CPU if on_cpu else OTHERS]:
        if fit and on_cpu and adapter.rank > max(8, 2 * adapters[0].rank):
            break                                  # a CPU pays for every zero that pads a small adapter; a GPU hardly notices
        shape = adapter.rank, adapter.target_modules
        known[shape] = known.get(shape) or _bytes_for(model, adapter, widest, autocast)
        need = (fit + 1) * max(known.values())
        if need > memory:
            break
        fit += 1
    if not fit:
        raise ValueError(f"an adapter of rank {adapters[0].rank} needs about {need / 1e6:,.0f} MB for batches of "
                         f"{tuple(widest[0].shape)}, and memory={memory / 1e6:,.0f} MB: give it more, or smaller batches.")
    return fit


def _bytes_for(model: nn.Module, adapter: Adapter, batch: Batch, autocast) -> float:
    """What training one adapter takes: every tensor that the forward pass keeps, two more of the logits' size, and 20 bytes a number."""
    stack = LoRAStack(model, [adapter])
    try:
        fixed = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        device = next(model.parameters()).device
        with saved_tensors() as saved, torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            sums, _ = group_losses(model, batch, 1)
        del sums
        kept = {pointer: each.storage.nbytes() for pointer, each in saved.items()}
        numbers = sum(p.numel() for p in stack.parameters_of(0))
        widest = max(kept.values())
        return sum(size for pointer, size in kept.items() if pointer not in fixed) + 2 * widest + 20 * numbers
    finally:
        stack.remove()
