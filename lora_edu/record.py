"""The long experiments, one command each: python -m lora_edu.record NAME [--tales FILE] [--pair FOLDER] [--scratch FOLDER]

    bistro_adapter    the adapter that notebook 00 opens with, into models/fable/bistro_lora
    lora_beside_full  LoRA and full fine-tuning on bistro and python_docs: records/lora_beside_full.json
    lora_rates        one LoRA at seven learning rates: records/lora_rates.json
    placements        the same number of trainable numbers in different matrices: records/placements.json
    spectra           full fine-tunings cut to every rank, and their nulls: records/spectra.json (record_spectra.py)
    published_pair    spectra of a published fine-tune, from --pair FOLDER: records/published_pair.json
    rank_alpha        rank x learning rate x alpha rule x task: records/rank_alpha.json (this one and the next two: record_rank.py)
    rank_seeds        the best rate of each rank with more seeds, and more steps: records/rank_seeds.json (after rank_alpha)
    two_rates         ranks 8 and 64 with alpha and the rate both free: records/two_rates.json (after rank_alpha)
    planted_rank      students of teachers whose rank is known: records/planted_rank.json
    methods           seven methods on restaurants, equal budgets: records/methods.json (this one and the next: record_merge.py)
    latency           what each of them costs in time when it is used: records/latency.json

A record is small JSON with its settings, seeds, device, versions and date; notebooks show it and re-measure a slice.
Rules (the same for every method): the learning rate is chosen on the validation split, from a grid of factor 2 that is
widened until the best is not on its edge; the test split is reported; data order is fixed by the seed. "Full" trains exactly
the matrices that LoRA adapts, embedding and norms frozen.
"""
import argparse
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch

from lora_edu.files import write_whole
from lora_edu.lora.apply import lora_layers
from lora_edu.lora.layer import is_linear
from lora_edu.lora.peft_format import load_adapter, save_adapter
from lora_edu.measure.nulls import BATCH, DOCS, training_batches
from lora_edu.models.pretrained import BISTRO_ADAPTER, best_device, load_pretrained
from lora_edu.page.records import RECORDS
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import evaluate, fit, sixteen_bits, train
from lora_edu.training.methods import prepare, solved_cards

SEEDS = (1, 2, 3)                # reported; seed 0 is for choosing learning rates
SIZES = {"bistro": {"steps": 200, "every": 25}, "python_docs": {"steps": 100, "every": 20}}
FIRST_RATES = {"lora": (4e-3, 8e-3, 1.6e-2), "full": (5e-4, 1e-3, 2e-3)}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLACEMENTS = {"all-linear": (PROJECTIONS, 8), "MLP": (PROJECTIONS[4:], 14), "Q, K, V, O": (PROJECTIONS[:4], 19),
              "Q, V": (("q_proj", "v_proj"), 38)}     # equal budgets on fable, within 2 per cent


def store_record(name: str, content: dict, began: float, options: str = "", products: torch.dtype | None = None) -> None:
    """Write a record with where, when and with what it was made; `products`: the matrix products' dtype, if not `sixteen_bits`."""
    device = best_device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device} ({platform.machine()})"
    made = {"date": time.strftime("%Y-%m-%d"), "device": where,
            "threads": torch.get_num_threads(), "minutes": round((time.time() - began) / 60, 1), "torch": torch.__version__,
            "python": platform.python_version(),
            "products in": str(products or sixteen_bits(device) or torch.float32).removeprefix("torch."),
            "command": f"python -m lora_edu.record {name}{options}"}
    RECORDS.mkdir(exist_ok=True)
    text = json.dumps({"made": made} | content, indent=1)
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)      # a list of numbers on one line
    write_whole(RECORDS / f"{name}.json", lambda part: part.write_text(text + "\n", encoding="utf-8"))


class Task:
    """What to learn: training batches by seed, and held-out batches to choose by (valid) and to report (test)."""

    def __init__(self, name: str, tokenizer, n: int = 400):
        self.name, self.tokenizer = name, tokenizer
        if name == "bistro":
            self.valid, self.test = (bistro.heldout(tokenizer, n // 2, split="valid"), bistro.heldout(tokenizer, n, split="test"))
            self.records = bistro.records("test", n)
        else:
            docs = {split: corpora.tokenize(tokenizer, corpora.python_docs(split)) for split in ("valid", "test")}
            self.valid, self.test = (corpora.windows(tokens, DOCS)[:n // 32] for tokens in docs.values())

    def batches(self, steps: int, seed: int):
        return training_batches(self.tokenizer, self.name, steps, seed)


def size_of_change(model, base) -> dict[str, float]:
    """How far the matrices moved: ||ΔW|| / ||W₀||, Frobenius over all of them and the mean of the spectral ratios; no unit."""
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
    return {"frobenius": round((moved / were).sqrt().item(), 4), "spectral": round(torch.stack(spectral).mean().item(), 4)}


def run(task: Task, method: str, lr: float, seed: int, tales: dict, steps: int, every: int, targets="all-linear", rank: int = 8,
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
            path.append([step.step, round(evaluate(model, task.valid[:2]), 4), round(evaluate(model, tales["its own"][:1]), 4)])
    model.cpu()
    result = {"lr": lr, "seed": seed, "trainable": trainable, "valid": round(evaluate(model, task.valid), 4), "path": path,
              "tales": {name: round(evaluate(model, some), 4) for name, some in tales.items()}}
    if method in ("lora", "full"):
        result |= {"change": size_of_change(model, base)}
    if slots:
        score = bistro.slot_accuracy(bistro.write(model, task.tokenizer, task.records), task.records)
        result |= {"slots": round(score.slots, 4), "all_slots": round(score.all_slots, 4), "shares": [round(s, 3) for s in score.shares]}
    return result | {"test": round(evaluate(model, task.test), 4)}


def tune(rates: tuple[float, ...], one_run) -> list[dict]:
    """Runs over a grid of factor 2, widened until the best validation loss is not on its edge (or six more were tried)."""
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
    repeats = [said(run(task, method, lr, seed, tales, slots=task.name == "bistro", **how), task, method) for seed in seeds]
    return {"lr": lr, "tuning": tuning, "runs": repeats, "mean test": round(statistics.mean(r["test"] for r in repeats), 4)}


def said(result: dict, task: Task, method: str) -> dict:
    print(f"{task.name} {method}: lr {result['lr']:.2g} seed {result['seed']}: valid {result['valid']:.3f}, test {result['test']:.3f}, "
          f"tales {result['tales']['its own']:.3f}, change {result.get('change', '-')}, slots {result.get('slots', '-')}", flush=True)
    return result


def before(tasks: list[Task], tales: dict) -> dict:
    """Losses and slot accuracy of the untouched base, and the floor of a fluent sentence that ignores its input."""
    model, tokenizer = load_pretrained()
    found = {"tales": {name: round(evaluate(model, some), 4) for name, some in tales.items()},
             "task": {task.name: {split: round(evaluate(model, getattr(task, split)), 4) for split in ("valid", "test")} for task in tasks}}
    if tasks[0].name == "bistro":
        records = tasks[0].records
        floor = bistro.floor(records)
        found |= {"slots": round(bistro.slot_accuracy(bistro.write(model, tokenizer, records), records).slots, 4),
                  "floor": {name: round(score.slots, 4) for name, score in floor.items()}, "prompts": len(records)}
    return found


def lora_beside_full(tales_file: str | None = None, sizes: dict = SIZES, seeds=SEEDS, n: int = 400) -> dict:
    tales = tales_to_forget(tales_file)
    tasks = [Task(name, load_pretrained()[1], n) for name in sizes]
    found = {"settings": {"rank": 8, "alpha": 16, "targets": "all-linear", "batch": BATCH, "sizes": sizes,
                          "seeds": list(seeds), "tuning seed": 0,
                          "rules not kept": f"{len(seeds)} seeds in place of five, to stay within half an hour on a CPU"},
             "before": before(tasks, tales),
             "tasks": {task.name: {method: tuned_and_repeated(task, method, tales, seeds, **sizes[task.name])
                                   for method in ("lora", "full")} for task in tasks}}
    # is it the rate or the steps? LoRA again, a quarter of its rate and four times the steps
    patient = {key: 4 * value for key, value in sizes[tasks[0].name].items()}
    lr = found["tasks"][tasks[0].name]["lora"]["lr"] / 4
    found["patient"] = said(run(tasks[0], "lora", lr, seeds[0], tales, slots=True, **patient), tasks[0], "lora")
    return found


def placements(tales_file: str | None = None, steps: int = 120, seeds=SEEDS, n: int = 400) -> dict:
    tales, task = tales_to_forget(tales_file), Task("bistro", load_pretrained()[1], n)
    return {"settings": {"task": "bistro", "alpha": "2 rank", "batch": BATCH, "steps": steps, "seeds": list(seeds), "tuning seed": 0,
                         "rules not kept": f"{len(seeds)} seeds in place of five, to stay within half an hour on a CPU; one task"},
            "before": before([task], tales),
            "placements": {name: {"targets": list(targets), "rank": rank} |
                           tuned_and_repeated(task, "lora", tales, seeds, steps=steps, every=steps, targets=targets, rank=rank)
                           for name, (targets, rank) in PLACEMENTS.items()}}


def lora_rates(tales_file: str | None = None, steps: int = 100, n: int = 400, rates=tuple(5e-4 * 2**i for i in range(7))) -> dict:
    tales, task = tales_to_forget(tales_file), Task("bistro", load_pretrained()[1], n)
    return {"settings": {"task": "bistro", "rank": 8, "alpha": 16, "targets": "all-linear", "batch": BATCH, "steps": steps, "seeds": [0]},
            "before": before([task], tales),
            "runs": [said(run(task, "lora", lr, 0, tales, steps=steps, every=steps // 10), task, "lora") for lr in rates]}


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
    score = bistro.slot_accuracy(bistro.write(shipped, tokenizer, task.records), task.records)
    report["after"] = {"slots": round(score.slots, 4), "all_slots": round(score.all_slots, 4),
                       "per_slot": {slot: round(share, 4) for slot, share in score.per_slot.items()},
                       "test": round(evaluate(shipped, task.test), 4),
                       "tales": {name: round(evaluate(shipped, some), 4) for name, some in tales.items()}}
    return {"settings": {"rank": rank, "alpha": 2 * rank, "targets": "all-linear", "steps": steps, "lr": lr, "batch": BATCH, "seed": seed,
                         "trainable": trainable, "bytes": size}} | report


EXPERIMENTS = {"bistro_adapter": bistro_adapter, "lora_beside_full": lora_beside_full, "lora_rates": lora_rates, "placements": placements}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lora_edu.record", description="Make one of the course's records again.")
    from lora_edu import record_merge, record_rank, record_spectra      # here, because they build on this module
    parser.add_argument("name", choices=[*EXPERIMENTS, "spectra", "published_pair", "rank_alpha", "rank_seeds", "two_rates",
                                         "planted_rank", "methods", "latency"])
    parser.add_argument("--tales", metavar="FILE", help="a held-out text of tales, to measure forgetting on as well")
    parser.add_argument("--pair", metavar="FOLDER", help="published_pair: where base.safetensors and ft_*.safetensors are")
    parser.add_argument("--scratch", metavar="FOLDER", help="rank_alpha, rank_seeds, two_rates, methods: keep finished runs, to go on")
    args = parser.parse_args()
    if args.scratch:
        Path(args.scratch).mkdir(parents=True, exist_ok=True)
    began = time.time()
    if args.name in EXPERIMENTS:
        content = EXPERIMENTS[args.name](args.tales)
    elif args.name in ("rank_alpha", "rank_seeds", "two_rates"):
        content = getattr(record_rank, args.name)(scratch=args.scratch)
    elif args.name == "methods":
        content = record_merge.methods(args.tales, scratch=args.scratch)
    else:
        content = {"spectra": record_spectra.spectra, "planted_rank": record_rank.planted_rank, "latency": record_merge.latency,
                   "published_pair": lambda: record_spectra.published_pair(args.pair)}[args.name]()
    store_record(args.name, content, began, options=" --pair FOLDER" if args.pair else "",
                 products=torch.float32 if args.name in ("planted_rank", "latency") else None)
    print(f"stored {args.name} after {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
