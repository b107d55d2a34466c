"""How long a training step on fable takes: our LoRA beside PEFT, loralib and full fine-tuning, and compiled.

    python benchmarks/step_time.py              five runs, a process each; their medians and the median of those
    python benchmarks/step_time.py --one-run    one run

Rank 8, alpha 16, every linear layer but the head, batch 8 x 128, float32 and 2 threads on a CPU (on a GPU the 16-bit
products of `sixteen_bits`), AdamW. The variants take turns step by step in one process, so that a noisy machine is
noisy for all of them; what is compared is a ratio of medians. "Compiled" is train(..., compile=True), for PEFT's model
as for ours; the seconds of the first step, which compiles, are printed beside it.
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
from lora_edu.models.pretrained import best_device
from lora_edu.rivals.methods import prepare
from lora_edu.training.loop import sixteen_bits, train

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


# name -> (how it is built, compiled?)
VARIANTS = {"lora_edu": (ours, False), "PEFT": (with_peft, False), "loralib": (with_loralib, False),
            "full fine-tuning": (full, False), "lora_edu, compiled": (ours, True), "PEFT, compiled": (with_peft, True)}


def one_run(warm_up: int = WARM_UP, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Seconds of the first step and the median of the others, for each variant."""
    torch.set_num_threads(THREADS)
    device = best_device()
    autocast = sixteen_bits(device) if device.type == "cuda" else None
    ids = torch.randint(2048, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0)).to(device)
    batches = [(ids[:, :-1], ids[:, 1:])] * (warm_up + steps)
    loops = {name: train(build().to(device), batches, warm_up + steps, lr=1e-4, autocast=autocast, compile=compiled)
             for name, (build, compiled) in VARIANTS.items()}
    times = {name: [] for name in loops}
    for _ in range(warm_up + steps):
        for name, loop in loops.items():
            began = time.perf_counter()
            next(loop)                      # a step ends with a number read off the device: it has been waited for
            times[name].append(time.perf_counter() - began)
    return {name: {"first": each[0], "step": statistics.median(each[warm_up:])} for name, each in times.items()}


def show(run: dict[str, dict[str, float]], title: str) -> None:
    cells = (f"{name} {1000 * each['step']:.0f} ms ({each['step'] / run['PEFT']['step']:.3f})"
             + (f" after {each['first']:.0f} s" if VARIANTS[name][1] else "") for name, each in run.items())
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
    for one, other in (("lora_edu", "PEFT"), ("lora_edu, compiled", "lora_edu"),
                       ("lora_edu, compiled", "PEFT, compiled")):
        ratios = sorted(run[one]["step"] / run[other]["step"] for run in runs)
        print(f"{one} / {other}: median of {len(ratios)} runs {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to "
              f"{ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
