"""One training of a record, its search for a learning rate, and what it is compared with; the rules stand in
`command.py`.
"""
import statistics

import torch

from lora_edu.lora.factors import lora_layers
from lora_edu.lora.layer import is_linear
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.rivals.methods import prepare, solved_cards
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import evaluate, sixteen_bits, train
from lora_edu.course.tasks import Task

SEEDS = (1, 2, 3)                # reported; seed 0 is for choosing learning rates
FIRST_RATES = {"lora": (4e-3, 8e-3, 1.6e-2), "full": (5e-4, 1e-3, 2e-3)}


def size_of_change(model, base) -> dict[str, float]:
    """How far the matrices moved: ||ΔW|| / ||W₀||, Frobenius over all of them and the mean of the spectral ratios;
    no unit.
    """
    plain, lora = dict(base.named_modules()), dict(lora_layers(model))
    pairs = []
    for name, module in model.named_modules():
        if name in lora:
            pairs.append((lora[name].delta_weight(), plain[name].weight))
        elif is_linear(module) and module.weight.requires_grad:
            pairs.append((module.weight - plain[name].weight, plain[name].weight))
    with torch.no_grad():
        moved, were = (sum(m[i].float().pow(2).sum() for m in pairs) for i in (0, 1))
        spectral = [torch.linalg.matrix_norm(d.float(), 2) / torch.linalg.matrix_norm(w.float(), 2) for d, w in pairs]
    return {"frobenius": round((moved / were).sqrt().item(), 4),
            "spectral": round(torch.stack(spectral).mean().item(), 4)}


def run(task: Task, method: str, lr: float, seed: int, tales: dict, steps: int, every: int, targets="all-linear",
        rank: int = 8,
        slots: bool = False) -> dict:
    """One training from the untouched base; losses are nats per token, measured in float32."""
    device = best_device()
    base, _ = load_pretrained()
    model = load_pretrained()[0].to(device)
    start = solved_cards(task.tokenizer, seed=seed).to(device) if method in ("prefix", "prompt") else None
    trainable = prepare(model, method, targets, rank, seed, start)
    path = []
    for step in train(model, task.batches(steps, seed), steps, lr, autocast=sixteen_bits(device)):
        if step.step % every == 0 or step.step == steps:
            path.append([step.step, round(evaluate(model, task.valid[:2]), 4),
                         round(evaluate(model, tales["its own"][:1]), 4)])
    model.cpu()
    result = {"lr": lr, "seed": seed, "trainable": trainable, "valid": round(evaluate(model, task.valid), 4),
              "path": path,
              "tales": {name: round(evaluate(model, some), 4) for name, some in tales.items()}}
    if method in ("lora", "full"):
        result |= {"change": size_of_change(model, base)}
    if slots:
        score = task.slots(model)
        result |= {"slots": round(score.slots, 4), "all_slots": round(score.all_slots, 4),
                   "shares": [round(s, 3) for s in score.shares]}
    return result | {"test": round(evaluate(model, task.test), 4)}


def tune(rates: tuple[float, ...], one_run) -> list[dict]:
    """Runs over a grid of factor 2, widened until the best validation loss is not on its edge (or six more were
    tried).
    """
    runs = [one_run(lr) for lr in rates]
    for _ in range(6):
        runs.sort(key=lambda r: r["lr"])
        best = min(range(len(runs)), key=lambda i: runs[i]["valid"])
        if 0 < best < len(runs) - 1:
            break
        runs.append(one_run(runs[0]["lr"] / 2 if best == 0 else runs[-1]["lr"] * 2))
    return sorted(runs, key=lambda r: r["lr"])


def best_rate(runs: list[dict]) -> float:
    return min(runs, key=lambda r: r["valid"])["lr"]


def tales_to_forget(file: str | None) -> dict:
    """Batches of tales: fable's own (sampled from it) and, where a held-out text is given, tales that people wrote."""
    model, tokenizer = load_pretrained()
    tales = {"its own": corpora.tales_from(model, tokenizer, n=32, length=256)}
    if file:
        tales["held-out"] = corpora.windows(corpora.tokenize(tokenizer, corpora.read_text(file)), 256)[:4]
    return tales


def tuned_and_repeated(task: Task, method: str, tales: dict, seeds=SEEDS, rates: tuple[float, ...] = (), **how) -> dict:
    """Choose the rate on seed 0, from `rates` on (by default FIRST_RATES), then repeat with the reported seeds."""
    tuning = tune(rates or FIRST_RATES[method], lambda lr: said(run(task, method, lr, 0, tales, **how), task, method))
    lr = best_rate(tuning)
    repeats = [said(run(task, method, lr, seed, tales, slots=task.name == "bistro", **how), task, method)
               for seed in seeds]
    return {"lr": lr, "tuning": tuning, "runs": repeats,
            "mean test": round(statistics.mean(r["test"] for r in repeats), 4)}


def said(result: dict, task: Task, method: str) -> dict:
    print(f"{task.name} {method}: lr {result['lr']:.2g} seed {result['seed']}: valid {result['valid']:.3f}, test "
          f"{result['test']:.3f}, tales {result['tales']['its own']:.3f}, change {result.get('change', '-')}, slots "
          f"{result.get('slots', '-')}", flush=True)
    return result


def before(tasks: list[Task], tales: dict) -> dict:
    """Losses and slot accuracy of the untouched base, and the floor of a fluent sentence that ignores its input."""
    model, _ = load_pretrained()
    found = {"tales": {name: round(evaluate(model, some), 4) for name, some in tales.items()},
             "task": {task.name: {split: round(evaluate(model, getattr(task, split)), 4) for split in ("valid", "test")}
                      for task in tasks}}
    if tasks[0].name == "bistro":
        cards, floor = tasks[0].cards, bistro.floor(tasks[0].cards)
        found |= {"slots": round(tasks[0].slots(model).slots, 4),
                  "floor": {name: round(score.slots, 4) for name, score in floor.items()}, "prompts": len(cards)}
    return found
