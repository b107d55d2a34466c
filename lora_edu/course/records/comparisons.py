"""The records of notebooks 00 and 02: LoRA beside full fine-tuning, learning rates, placements, and the adapter that
is shipped.
"""
from pathlib import Path

import torch

from lora_edu.course.records.runs import SEEDS, before, run, said, tales_to_forget, tuned_and_repeated
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.models.pretrained import BISTRO_ADAPTER, best_device, load_pretrained
from lora_edu.rivals.methods import prepare
from lora_edu.training.loop import evaluate, fit, sixteen_bits
from lora_edu.course.tasks import BATCH, Task

SIZES = {"bistro": {"steps": 200, "every": 25}, "python_docs": {"steps": 100, "every": 20}}
# the same number of trainable numbers in different matrices: the rank at which each placement has the budget of rank 8
# everywhere, on fable, within 2 per cent
EQUAL_RANKS = {"all-linear": 8, "MLP": 14, "Q, K, V, O": 19, "Q, V": 38}


def lora_beside_full(tales_file: str | None = None, sizes: dict = SIZES, seeds=SEEDS, n: int = 400) -> dict:
    """Both tasks, both methods at their own best rate; and LoRA once more at a quarter of it with four times the
    steps.
    """
    tales = tales_to_forget(tales_file)
    tasks = [Task(name, load_pretrained()[1], n) for name in sizes]
    found = {"settings": {"rank": 8, "alpha": 16, "targets": "all-linear", "batch": BATCH, "sizes": sizes,
                          "seeds": list(seeds), "tuning seed": 0,
                          "rules not kept": f"{len(seeds)} seeds in place of five, "
                                            "to stay within half an hour on a CPU"},
             "before": before(tasks, tales),
             "tasks": {task.name: {method: tuned_and_repeated(task, method, tales, seeds, **sizes[task.name])
                                   for method in ("lora", "full")} for task in tasks}}
    # is it the rate or the steps? LoRA again, a quarter of its rate and four times the steps
    patient = {key: 4 * value for key, value in sizes[tasks[0].name].items()}
    lr = found["tasks"][tasks[0].name]["lora"]["lr"] / 4
    found["patient"] = said(run(tasks[0], "lora", lr, seeds[0], tales, slots=True, **patient), tasks[0], "lora")
    return found


def placements(tales_file: str | None = None, steps: int = 120, seeds=SEEDS, n: int = 400) -> dict:
    """The same number of trainable numbers in different matrices, each placement at its own best rate."""
    tales, task = tales_to_forget(tales_file), Task("bistro", load_pretrained()[1], n)
    return {"settings": {"task": "bistro", "alpha": "2 rank", "batch": BATCH, "steps": steps, "seeds": list(seeds),
                         "tuning seed": 0,
                         "rules not kept": f"{len(seeds)} seeds in place of five, "
                                           "to stay within half an hour on a CPU; one task"},
            "before": before([task], tales),
            "placements": {name: {"targets": list(PLACEMENTS[name]), "rank": rank} |
                           tuned_and_repeated(task, "lora", tales, seeds, steps=steps, every=steps,
                                              targets=PLACEMENTS[name], rank=rank)
                           for name, rank in EQUAL_RANKS.items()}}


def lora_rates(tales_file: str | None = None, steps: int = 100, n: int = 400,
               rates=tuple(5e-4 * 2**i for i in range(7))) -> dict:
    """One LoRA at seven learning rates."""
    tales, task = tales_to_forget(tales_file), Task("bistro", load_pretrained()[1], n)
    return {"settings": {"task": "bistro", "rank": 8, "alpha": 16, "targets": "all-linear", "batch": BATCH,
                         "steps": steps, "seeds": [0]},
            "before": before([task], tales),
            "runs": [said(run(task, "lora", lr, 0, tales, steps=steps, every=steps // 10), task, "lora")
                     for lr in rates]}


def bistro_adapter(tales_file: str | None = None, steps: int = 1200, lr: float = 6e-3, rank: int = 6, seed: int = 0,
                   out: Path = BISTRO_ADAPTER, n: int = 400) -> dict:
    """Train and save the shipped adapter; its recipe and scores lie beside it."""
    device = best_device()
    model, tokenizer = load_pretrained()
    task, tales = Task("bistro", tokenizer, n), tales_to_forget(tales_file)
    report = {"before": before([task], tales)}
    model.to(device)
    trainable = prepare(model, "lora", rank=rank, seed=seed)
    fit(model, task.batches(steps, seed), steps, lr, autocast=sixteen_bits(device))
    model.cpu()
    size = save_adapter(model, out, dtype=torch.bfloat16, base_name="fable")
    shipped = load_pretrained()[0]
    load_adapter(shipped, out)              # what is scored is the file, rounded to 16 bits
    score = task.slots(shipped)
    report["after"] = {"slots": round(score.slots, 4), "all_slots": round(score.all_slots, 4),
                       "per_slot": {slot: round(share, 4) for slot, share in score.per_slot.items()},
                       "test": round(evaluate(shipped, task.test), 4),
                       "tales": {name: round(evaluate(shipped, some), 4) for name, some in tales.items()}}
    return {"settings": {"rank": rank, "alpha": 2 * rank, "targets": "all-linear", "steps": steps, "lr": lr,
                         "batch": BATCH, "seed": seed,
                         "trainable": trainable, "bytes": size}} | report
