"""How long a step on a real model takes: our Llama with our LoRA, beside transformers' with PEFT's, on SmolLM2-135M.

    python dev.py real && python dev.py python benchmarks/real_step_time.py

Forward and backward of 2 x 64 tokens, rank 8 on every linear layer but the head, float32; the two take turns in one
process, and what is printed is the median of the rounds' ratios with its interval.
"""
import argparse
from collections.abc import Callable

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_edu import apply_lora, best_device, load_pretrained
from lora_edu.course.page.real_model import real_copy
from lora_edu.measure.timing import interleaved
from lora_edu.training.loop import loss_on

RANK, ALPHA, SHAPE = 8, 16, (2, 65)


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    def once() -> None:
        model.zero_grad(set_to_none=True)
        loss_on(model, (ids[:, :-1], ids[:, 1:])).backward()
    return once


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    ours, _ = load_pretrained(real_copy())
    apply_lora(ours, rank=RANK, alpha=ALPHA)
    theirs = AutoModelForCausalLM.from_pretrained(real_copy(), dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    models = {"ours": ours.to(best_device()).train(), "transformers + PEFT": theirs.to(best_device()).train()}
    ids = torch.randint(49_000, SHAPE, generator=torch.Generator().manual_seed(0))
    times = interleaved({name: step(model, ids) for name, model in models.items()}, rounds,
                        threads=torch.get_num_threads(), gradients=True)
    for name in models:
        print(f"{name:20} {times.median(name):.3f} s")
    print("ours / transformers + PEFT:", times.ratio("ours", to="transformers + PEFT").text())


if __name__ == "__main__":
    main()
