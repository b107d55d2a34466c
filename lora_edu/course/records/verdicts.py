"""The records that keep a verdict of notebooks 02 and 03 from being one about 200 steps, one task or one optimizer.

    plateau       LoRA and full fine-tuning on restaurants until neither gains; whole updates made smaller, two ways
    placements_docs   the same placements on documentation, and attention alone at the rank of all linear layers
    optimizers    full fine-tuning by SGD with momentum: is its update as spread as AdamW's?

The rules are those of `command.py`; `scratch` keeps what is finished, to go on from.
"""
from pathlib import Path

import torch

from lora_edu.checkpoints.deltas import deltas
from lora_edu.course.records.comparisons import EQUAL_RANKS
from lora_edu.course.records.runs import SEEDS, before, best_rate, tales_to_forget, tune, tuned_and_repeated
from lora_edu.course.records.spectra import RANKS
from lora_edu.course.records.stored import load_record, rounded
from lora_edu.course.tasks import BATCH, Task, full_fine_tune
from lora_edu.files import once
from lora_edu.lora.inject import unfreeze_matrices
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.measure.spectra import Factors, Spectrum, factor, truncate
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training.loop import evaluate, fit, sixteen_bits

LONG = {"lora": (2e-3, 4e-3, 8e-3), "full": (2.5e-4, 5e-4, 1e-3)}
SCALES, CUTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (4, 8, 16, 32, 64, 128, 256)
THREE_SEEDS = f"{len(SEEDS)} seeds in place of five, to stay within half an hour on a CPU"


def _kept(scratch: str | None, name: str, make):
    return once(Path(scratch, f"{name}.json") if scratch else None, make)


def made_smaller(task: Task, tales: dict, seed: int, lr: float, steps: int = 200) -> list[dict]:
    """One full fine-tuning's update, times a number below 1 and cut to its best rank-r parts: losses of both, nats per
    token. At one loss of the task, which has lost less of the tales?
    """
    base = load_pretrained()[0]
    parts = factor(deltas(base, full_fine_tune(task.name, steps, lr, seed=seed)))

    def scores(how: str, value: float, factors: Factors, rank: int) -> dict:
        model = truncate(base, factors, rank, rest="base")
        return {"seed": seed, "how": how, "value": value, "test": round(evaluate(model, task.test), 4),
                "tales": round(evaluate(model, tales["its own"]), 4)}
    scaled = [scores("scaled", scale, Factors(parts.deltas, {name: (W, U, scale * S, Vh) for name, (W, U, S, Vh)
                                                             in parts.parts.items()}), RANKS[-1]) for scale in SCALES]
    return scaled + [scores("cut", rank, parts, rank) for rank in CUTS]


def plateau(tales_file: str | None = None, steps: int = 800, seeds=SEEDS, n: int = 400, scratch: str | None = None,
            rates: dict = LONG) -> dict:
    """Four times the steps of lora_beside_full, rates chosen anew."""
    tales, task = tales_to_forget(tales_file), Task("bistro", load_pretrained()[1], n)
    found = {method: _kept(scratch, f"plateau {method}", lambda: tuned_and_repeated(
        task, method, tales, seeds, rates=rates[method], steps=steps, every=max(1, steps // 8))) for method in rates}
    lr = load_record("lora_beside_full")["tasks"]["bistro"]["full"]["lr"]
    smaller = [row for seed in seeds for row in _kept(scratch, f"smaller {seed}", lambda: made_smaller(
        task, tales, seed, lr, steps // 4))]
    return {"settings": {"task": "bistro", "rank": 8, "alpha": 16, "targets": "all-linear", "batch": BATCH,
                         "steps": steps, "seeds": list(seeds), "tuning seed": 0, "rules not kept": THREE_SEEDS,
                         "smaller": f"the update of {steps // 4} steps of full fine-tuning, as in lora_beside_full"},
            "floor": round(task.floor(), 4), "before": before([task], tales), "tasks": {"bistro": found},
            "smaller": smaller}


def placements_docs(steps: int = 100, short: int = 120, seeds=SEEDS, n: int = 400, scratch: str | None = None,
                    rates: tuple = ()) -> dict:
    """Equal budgets on documentation; and Q, K, V, O at rank 8, the rank of all linear layers, on both tasks."""
    tokenizer, tales = load_pretrained()[1], tales_to_forget(None)
    tasks = {name: Task(name, tokenizer, n) for name in ("python_docs", "bistro")}
    what = [("python_docs", name, rank) for name, rank in EQUAL_RANKS.items()]
    what += [(task, "Q, K, V, O", EQUAL_RANKS["all-linear"]) for task in tasks]
    found: dict[str, dict] = {task: {} for task in tasks}
    for task, name, rank in what:
        length = steps if task == "python_docs" else short
        key = name if rank == EQUAL_RANKS[name] else f"{name}, rank {rank}"
        found[task][key] = {"targets": list(PLACEMENTS[name]), "rank": rank} | _kept(
            scratch, f"placements {task} {key}", lambda: tuned_and_repeated(
                tasks[task], "lora", tales, seeds, rates=rates, steps=length, every=length, targets=PLACEMENTS[name],
                rank=rank))
    return {"settings": {"alpha": "2 rank", "batch": BATCH, "steps": {"python_docs": steps, "bistro": short},
                         "seeds": list(seeds), "tuning seed": 0, "rules not kept": THREE_SEEDS},
            "before": before(list(tasks.values())[::-1], tales), "tasks": found}


def by_sgd(task: Task, steps: int, lr: float, seed: int) -> dict:
    """Full fine-tuning of the matrices by SGD with momentum 0.9: losses, and the spectrum of what it changed."""
    device, (model, _) = best_device(), load_pretrained()
    unfreeze_matrices(model.to(device).requires_grad_(True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    fit(model, task.batches(steps, seed), steps, lr, optimizer=optimizer, autocast=sixteen_bits(device))
    model.cpu()
    parts = factor(deltas(load_pretrained()[0], model))
    ranks = [int(Spectrum(S, tuple(W.shape)).rank_for(0.9)) for W, _, S, _ in parts.parts.values()]
    found = {"optimizer": "SGD, momentum 0.9", "lr": lr, "seed": seed, "valid": round(evaluate(model, task.valid), 4),
             "test": round(evaluate(model, task.test), 4), "rank 90": round(sum(ranks) / len(ranks), 1),
             "energy": rounded(parts.energy_kept(rank) for rank in RANKS)}
    print(found, flush=True)
    return found


def optimizers(steps: int = 200, seeds=SEEDS, n: int = 400, rates: tuple = (0.05, 0.1, 0.2),
               scratch: str | None = None) -> dict:
    """AdamW's side is the record spectra's."""
    task = Task("bistro", load_pretrained()[1], n)
    tuning = _kept(scratch, "sgd tuning", lambda: tune(rates, lambda lr: by_sgd(task, steps, lr, 0)))
    lr = best_rate(tuning)
    return {"settings": {"task": "bistro", "steps": steps, "batch": BATCH, "ranks": list(RANKS), "seeds": list(seeds),
                         "rules not kept": THREE_SEEDS},
            "tuning": tuning, "runs": [_kept(scratch, f"sgd {seed}", lambda: by_sgd(task, steps, lr, seed))
                                       for seed in seeds]}
