"""How long a grid of 16 adapters takes on fable: our chunks in a pass each, beside 16 PEFT runs one after another.

    python benchmarks/sweep_speed.py               three rounds of 8 steps; medians, tokens per second, peak memory
    python benchmarks/sweep_speed.py --batch 1 --length 32    the same with smaller batches
    python benchmarks/sweep_speed.py --profile     where the time of a step goes, for both

Ranks 1 to 64, alpha = 2 rank, every linear layer but the head, batch 4 x 64 for each adapter, AdamW, 2 threads and
float32 on a CPU; on a GPU the 16 train in one pass. The chunks are those that `sweep` cuts. In a round ours and PEFT
take turns in one process, so that a noisy machine is noisy for both; what is compared is the time of all steps of all
adapters, without building the models. Each round starts with one step of each that is not counted. Peak memory comes
from a process for each side.
"""
import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_edu import load_pretrained
from lora_edu.lora.layer import is_linear
from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack
from lora_edu.lora.targets import find_targets
from lora_edu.models.pretrained import best_device
from lora_edu.training.loop import Batch, sixteen_bits, train
from lora_edu.training.stacked import side_by_side, train_stack
from lora_edu.training.sweep import _fitting

RANKS = (1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 24, 32, 32, 48, 64, 64)
BATCH, LENGTH, THREADS, LR, MEMORY = 4, 64, 2, 1e-3, 4e9
GRID = [LoRASettings(rank, 2 * rank, lr=LR, seed=i) for i, rank in enumerate(RANKS)]


def batches() -> Iterator[Batch]:
    ids = torch.randint(2048, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    while True:
        yield ids[:, :-1], ids[:, 1:]


def base() -> nn.Module:
    return load_pretrained()[0].to(best_device())


def autocast() -> torch.dtype | None:
    """16-bit products on a GPU, for both sides; float32 on a CPU."""
    return sixteen_bits(best_device()) if best_device().type == "cuda" else None


def chunks() -> list[list[LoRASettings]]:
    """The grid as `sweep` cuts it."""
    model, left, cut = base(), sorted(GRID, key=lambda adapter: adapter.rank), []
    while left:
        fit = _fitting(model, left, lambda seed: batches(), MEMORY, autocast())
        cut.append(left[:fit])
        left = left[fit:]
    return cut


def stacked(adapters: list[LoRASettings], steps: int):
    """The training loop of one chunk."""
    stack = LoRAStack(base(), adapters)
    return train_stack(stack, (side_by_side([batch] * len(adapters)) for batch in batches()), steps,
                       autocast=autocast())


def alone(adapter: LoRASettings, steps: int):
    """The training loop of one PEFT run."""
    model = base()
    names = find_targets(model, {name: module for name, module in model.named_modules() if is_linear(module)},
                         "all-linear")
    torch.manual_seed(adapter.seed)
    model = peft.get_peft_model(model, peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=names))
    return train(model, batches(), steps, adapter.lr, autocast=autocast())


def timed(loop, steps: int) -> float:
    """Seconds of `steps` steps, after one that is not counted: it makes the optimizer's state."""
    next(loop)
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        next(loop)
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if best_device().type == "cuda":
        torch.cuda.synchronize()


def one_round(cut: list[list[LoRASettings]], steps: int) -> tuple[float, float]:
    """Seconds for the whole grid, ours and PEFT's: a chunk, then the runs of that chunk one after another, and so
    on.
    """
    ours = theirs = 0.0
    for chunk in cut:
        ours += timed(stacked(chunk, steps + 1), steps)
        theirs += sum(timed(alone(adapter, steps + 1), steps) for adapter in chunk)
    return ours, theirs


def peak() -> int:
    """Most bytes this process has held: on the GPU, or in memory (VmHWM, which Linux keeps)."""
    if best_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def growth(side: str) -> int:
    """Bytes that training the grid takes beyond a loaded model; two steps reach the peak.

    To be called in a fresh process.
    """
    model = base()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long, device=best_device()))
    del model
    before = peak()
    runs = ((stacked, chunk) for chunk in chunks()) if side == "stack" else ((alone, adapter) for adapter in GRID)
    for build, what in runs:
        list(build(what, 2))
        gc.collect()
    return peak() - before


def growth_elsewhere(side: str) -> int:
    command = [sys.executable, __file__, "--peak", side, "--batch", str(BATCH), "--length", str(LENGTH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def show_profile() -> None:
    """The eight operations that take most of one step, the second, by their own time."""
    device, last = best_device().type, chunks()[-1]
    for title, loop in ((f"a stack of {len(last)}, the largest ranks", stacked(last, 2)),
                        ("PEFT, rank 64", alone(GRID[-1], 2))):
        next(loop)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities) as taken:
            next(loop)
            wait()
        times = taken.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=8, max_name_column_width=40)
        print(f"{title}:\n{times}")


def compare(rounds: int, steps: int) -> None:
    cut = chunks()
    print(f"{len(GRID)} adapters of rank {RANKS[0]} to {RANKS[-1]} on fable, batch {BATCH} x {LENGTH} each, {steps} "
          f"steps, {best_device()}, {THREADS} threads, torch {torch.__version__}, peft {peft.__version__}; chunks of "
          + ", ".join(f"{len(chunk)} (rank {chunk[0].rank} to {chunk[-1].rank})" for chunk in cut), flush=True)
    times = []
    for i in range(rounds):
        times.append(one_round(cut, steps))
        print("round {}: stacks {:.2f} s, 16 PEFT runs {:.2f} s, {:.2f} times as fast".format(
            i + 1, *times[-1], times[-1][1] / times[-1][0]), flush=True)
    tokens = len(GRID) * BATCH * LENGTH * steps
    for name, side, seconds in zip(("stacks", "PEFT"), ("stack", "peft"), map(statistics.median, zip(*times))):
        print(f"{name:7} {seconds:.2f} s (median), {tokens / seconds:,.0f} tokens per second, peak "
              f"{growth_elsewhere(side) / 1e6:,.0f} MB beyond the loaded model", flush=True)
    ratios = sorted(theirs / ours for ours, theirs in times)
    print(f"PEFT / stacks: median of {rounds} rounds {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to "
          f"{ratios[-1]:.2f}")


def main() -> None:
    global BATCH, LENGTH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="the operations that take most of a step, for both")
    parser.add_argument("--peak", choices=("stack", "peft"), help="bytes that one side takes, measured in this process")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    args = parser.parse_args()
    BATCH, LENGTH = args.batch, args.length
    torch.set_num_threads(THREADS)
    if args.peak:
        print(growth(args.peak))
    elif args.profile:
        show_profile()
    else:
        compare(args.rounds, args.steps)


if __name__ == "__main__":
    main()
