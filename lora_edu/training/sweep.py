"""Train a whole grid of LoRAs at once: `sweep` cuts it into chunks that fit the memory, and `train_stack` trains one
chunk in one pass.
"""
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from lora_edu.files import write_text
from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack, targets_of
from lora_edu.numbers import whole
from lora_edu.tables import ShowsTables, Table
from lora_edu.training.autograd_kept import kept_by_autograd
from lora_edu.training.loop import Batch, warmup_linear
from lora_edu.training.stacked import StackStep, evaluate_stack, group_losses, side_by_side, train_stack

CPU, OTHERS = 8, 64      # adapters in a pass at most: a CPU is busy with fewer, and more leave its caches


class SweepTable(ShowsTables, list):
    """One dict a run, in the order of the grid: its settings and `steps`, `scaling`, `trainable` (count), `losses` (one
    a step, of the batch before the update, nats per token), `heldout` ([step, loss], the last one after training),
    `diverged` (None, or the step), and what `score` added."""

    COLUMNS = {"rank": "rank", "alpha": "alpha", "scaling": "scaling", "lr": "learning rate", "seed": "seed",
               "final": "held-out loss"}

    def best(self, **where) -> dict:
        """The run of the lowest held-out loss among those with these settings. Raises ValueError if there is none."""
        found = [run for run in self if run["diverged"] is None
                 and all(run[key] == value for key, value in where.items())]
        if not found:
            raise ValueError(f"no finished run has {where}: the table has {len(self)} runs.")
        return min(found, key=lambda run: run["heldout"][-1][1])

    def tables(self) -> list[Table]:
        def final(run):
            return f"{run['heldout'][-1][1]:.3f}" if run["diverged"] is None else f"diverged at step {run['diverged']}"
        return [Table(tuple(self.COLUMNS.values()),
                      [[f"{run[key]:g}" for key in list(self.COLUMNS)[:-1]] + [final(run)] for run in self])]

    def save(self, path: str | Path) -> None:
        """As JSON, written whole or not at all."""
        write_text(Path(path), json.dumps(list(self), indent=1, allow_nan=False) + "\n")


def sweep(model: nn.Module, grid: Iterable[LoRASettings], batches: Callable[[int], Iterator[Batch]], steps: int,
          heldout: list[Batch], *,
          every: int | None = None, memory: float = 4e9, out: str | Path | None = None,
          watch: Callable[[list[int], StackStep], None] | None = None, score: Callable[[nn.Module], dict] | None = None,
          schedule: Callable[[int, int], float] = warmup_linear(), autocast: torch.dtype | None = None) -> SweepTable:
    """Train every adapter of a grid on one base, many at a time, and measure each on the same held-out batches.

    The model is plain again at the end, its weights as before and frozen. The stop button (KeyboardInterrupt) ends the
    sweep: the runs of finished chunks are returned, and with `out` they are on disk, so that the same call goes on from
    there; a run inside a chunk starts again.

    Args:
        batches: ``batches(seed)`` gives the training batches for an adapter's seed, as many rows each.
        every: measure the held-out loss every so many steps, and after the last one (by default only then).
        memory: bytes the training may take beyond the model: adapters, their gradients and Adam states, and
            activations, which are measured on one adapter; the grid is cut into chunks that fit.
        out: a JSON file that finished chunks are written to and read back from.
        watch: called after each step with the grid's numbers of the runs in the chunk and their `StackStep`.
        score: called with each trained model; the dict it returns joins the run's row (a number that is not finite as
            None).

    Raises:
        ValueError: an empty grid, no steps or no held-out tokens; an adapter that does not fit the model, or alone
            needs more than `memory`; `out` holds another sweep, or no sweep. All before any training. And batches that
            end early.

    Losses are nats per token. Source: as `LoRAStack`.

    >>> from lora_edu import load_pretrained
    >>> from lora_edu.training import bistro
    >>> model, tokenizer = load_pretrained()
    >>> grid = [LoRASettings(rank, 2 * rank, lr=lr) for rank in (1, 4) for lr in (4e-3, 8e-3)]
    >>> table = sweep(model, grid, lambda seed: bistro.batches(tokenizer, 2, batch_size=2, seed=seed), steps=2,
    ...               heldout=bistro.heldout(tokenizer, 4))
    >>> [(run["rank"], run["trainable"]) for run in table][::2]
    [(1, 19520), (4, 78080)]
    """
    from tqdm.auto import tqdm  # late: `import lora_edu` does not need it
    grid, heldout = list(grid), list(heldout)
    targets_of(model, grid)
    tokens = sum((targets != -100).sum().item() for _, targets in heldout)
    if (whole(steps) or 0) < 1 or not tokens:
        raise ValueError(f"steps={steps} and {tokens} held-out tokens that count: a sweep needs at least one of each.")
    steps = whole(steps)
    rows = _read_finished(out, grid, steps)
    # like ranks together: little padding
    open_runs = sorted((i for i in range(len(grid)) if i not in rows), key=lambda i: grid[i].rank)
    chunks = []
    while open_runs:
        fit = _fitting(model, [grid[i] for i in open_runs], batches, memory, autocast)
        chunks.append(open_runs[:fit])
        open_runs = open_runs[fit:]
    with tqdm(total=len(grid) * steps, initial=len(rows) * steps, unit="run-step", leave=False) as bar:
        try:
            for chunk in chunks:
                rows |= zip(chunk,
                            _train_chunk(model, chunk, grid, batches, steps, heldout, every, bar, watch, score,
                                         schedule, autocast))
                if out is not None:
                    SweepTable(rows[i] for i in sorted(rows)).save(out)
        except KeyboardInterrupt:
            print(f"Stopped: {len(rows)} of {len(grid)} runs are finished and kept.")
    return SweepTable(rows[i] for i in sorted(rows))


def _train_chunk(model, chunk, grid, batches, steps, heldout, every, bar, watch, score, schedule,
                 autocast) -> list[dict]:
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
        return [_row(stack, k, [loss[k] for loss in losses], [[step, found[k]] for step, found in measured], steps,
                     score)
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
    row = asdict(adapter) | {"steps": steps, "scaling": adapter.scaling,
                             "trainable": sum(p.numel() for p in stack.parameters_of(k)),
                             "losses": losses[:diverged - 1] if diverged else losses,
                             "heldout": [pair for pair in heldout if not diverged or pair[0] < diverged],
                             "diverged": diverged}
    scored = score(stack.unstack(k)) if score and not diverged else {}
    return row | {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in scored.items()}


def _read_finished(out, grid: list[LoRASettings], steps: int) -> dict[int, dict]:
    """The finished runs of an earlier call, by their number in the grid; equal adapters share one."""
    if out is None:
        return {}
    Path(out).parent.mkdir(parents=True, exist_ok=True)      # now, and not after the first chunk
    if not Path(out).exists():
        return {}
    found = {}
    wanted = [json.loads(json.dumps(asdict(adapter) | {"steps": steps})) for adapter in grid]
    try:
        runs = [(run, {key: run[key] for key in wanted[0]})
                for run in json.loads(Path(out).read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out} is not the JSON of a sweep: choose another file, or move this one away.") from None
    for run, settings in runs:
        if settings not in wanted:
            raise ValueError(f"{out} holds a run of another sweep, {settings}: "
                             "choose another file, or move this one away.")
        # tuples were lists in JSON
        found |= {i: run | asdict(adapter) for i, adapter in enumerate(grid) if wanted[i] == settings}
    return found


def _fitting(model: nn.Module, adapters: list[LoRASettings], batches, memory: float, autocast) -> int:
    """How many of these adapters, in their order (ranks rise), to train together: as many as fit the memory and are
    worth their padding.
    """
    first = list(itertools.islice(batches(adapters[0].seed), 4))
    if not first:
        raise ValueError(f"batches({adapters[0].seed}) gives no batch: let it give one for every step.")
    widest = max(first, key=lambda batch: batch[0].shape[1])
    on_cpu, fit, need, known = next(model.parameters()).device.type == "cpu", 0, 0.0, {}
    for adapter in adapters[:CPU if on_cpu else OTHERS]:
        if fit and on_cpu and adapter.rank > max(8, 2 * adapters[0].rank):
            # a CPU pays for every zero that pads a small adapter; a GPU hardly notices
            break
        shape = adapter.rank, adapter.target_modules
        known[shape] = known.get(shape) or _bytes_for(model, adapter, widest, autocast)
        need = (fit + 1) * max(known.values())
        if need > memory:
            break
        fit += 1
    if not fit:
        raise ValueError(f"an adapter of rank {adapters[0].rank} needs about {need / 1e6:,.0f} MB for batches of "
                         f"{tuple(widest[0].shape)}, and memory={memory / 1e6:,.0f} MB: "
                         "give it more, or smaller batches.")
    return fit


def _bytes_for(model: nn.Module, adapter: LoRASettings, batch: Batch, autocast) -> float:
    """What training one adapter takes: every tensor that the forward pass keeps, two more of the logits' size, and
    20 bytes a number.
    """
    stack = LoRAStack(model, [adapter])
    try:
        fixed = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        device = next(model.parameters()).device
        mixed = torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
        with kept_by_autograd() as saved, mixed:
            sums, _ = group_losses(model, batch, 1)
        del sums
        kept = {pointer: each.storage.nbytes() for pointer, each in saved.items()}
        numbers = sum(p.numel() for p in stack.parameters_of(0))
        widest = max(kept.values())
        return sum(size for pointer, size in kept.items() if pointer not in fixed) + 2 * widest + 20 * numbers
    finally:
        stack.remove()
