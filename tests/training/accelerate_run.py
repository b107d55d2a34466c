"""The same training without this library: PEFT on a model of transformers, spread by accelerate. On GPUs its own
command starts it, `accelerate launch`; on a CPU that starts one process only, and torchrun more.

    torchrun --standalone --nproc-per-node 2 tests/training/accelerate_run.py BASE ADAPTER BATCHES.pt OUT.json
"""
import json
import sys

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM


def main(base, adapter, batches, out):
    accelerator = Accelerator(cpu=True)
    rank, size = accelerator.process_index, accelerator.num_processes
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter,
                                      is_trainable=True, autocast_adapter_dtype=False).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    steps, losses = torch.load(batches, weights_only=True), []
    for step, (inputs, targets) in enumerate(steps):
        rising = max(1, len(steps) / 20)                         # a twentieth of the steps up, then down to zero
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min((step + 1) / rising, (len(steps) - step) / (len(steps) - rising))
        logits = model(input_ids=inputs[rank::size]).logits
        mine = F.cross_entropy(logits.flatten(0, 1), targets[rank::size].flatten(), reduction="sum")
        mine = mine / (targets != -100).sum()
        accelerator.backward(mine * size)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(mine.detach(), "sum").item())
    if accelerator.is_main_process:
        with open(out, "w", encoding="utf-8") as file:
            json.dump({"losses": losses, "processes": size}, file)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
