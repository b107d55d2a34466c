"""How long a training step on fable takes: our LoRA beside PEFT, loralib and full fine-tuning.

    python benchmarks/step_time.py              five runs, a process each; their medians and the median of those
    python benchmarks/step_time.py --one-run    one run

Rank 8, alpha 16, every linear layer but the head, batch 8 x 128, float32, 2 threads, AdamW. The four variants take
turns step by step in one process, so that a noisy machine is noisy for all of them; what is compared is a ratio of
medians.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import loralib
import peft
import torch
from torch import nn

from lora_edu import apply_lora, load_pretrained
from lora_edu.lora.inject import replace
from lora_edu.lora.targets import find_targets
from lora_edu.rivals.methods import prepare
from lora_edu.training.loop import train

RANK, ALPHA, BATCH, LENGTH, THREADS = 8, 16, 8, 128, 2
WARM_UP, STEPS = 5, 40


def ours() -> nn.Module:
    model, _ = load_pretrained()
    apply_lora(model, "all-linear", RANK, ALPHA)
    return model


def with_peft() -> nn.Module:
    model, _ = load_pretrained()
    names = find_targets(model, linears(model), "all-linear")
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))


def with_loralib() -> nn.Module:
    model, _ = load_pretrained()
    layers = linears(model)
    for name in find_targets(model, layers, "all-linear"):
        old = layers[name]
        new = loralib.Linear(old.in_features, old.out_features, r=RANK, lora_alpha=ALPHA, bias=False)
        new.weight.data = old.weight.data
        replace(model, name, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


def full() -> nn.Module:
    model, _ = load_pretrained()
    prepare(model, "full")
    return model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


VARIANTS = {"lora_edu": ours, "PEFT": with_peft, "loralib": with_loralib, "full fine-tuning": full}


def one_run() -> dict[str, float]:
    """Median seconds of a step, for each variant."""
    torch.set_num_threads(THREADS)
    ids = torch.randint(2048, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batches = [(ids[:, :-1], ids[:, 1:])] * (WARM_UP + STEPS)
    loops = {name: train(build(), batches, WARM_UP + STEPS, lr=1e-4) for name, build in VARIANTS.items()}
    times = {name: [] for name in loops}
    for _ in range(WARM_UP + STEPS):
        for name, loop in loops.items():
            began = time.perf_counter()
            next(loop)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[WARM_UP:]) for name, each in times.items()}


def show(run: dict[str, float], title: str) -> None:
    cells = (f"{name} {1000 * seconds:.0f} ms ({seconds / run['PEFT']:.3f})" for name, seconds in run.items())
    print(f"{title}: " + ", ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-run", action="store_true", help="one run in this process, as JSON")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.one_run:
        print(json.dumps(one_run()))
        return
    print(f"median step on fable, batch {BATCH} x {LENGTH}, rank {RANK}, {THREADS} threads, torch {torch.__version__}, "
          f"peft {peft.__version__}; in brackets the ratio to PEFT")
    runs = []
    for i in range(args.runs):
        done = subprocess.run([sys.executable, __file__, "--one-run"], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        show(runs[-1], f"run {i + 1}")
    ratios = sorted(run["lora_edu"] / run["PEFT"] for run in runs)
    print(f"lora_edu / PEFT: median of {len(ratios)} runs {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to "
          f"{ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
