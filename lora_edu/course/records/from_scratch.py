"""Does a LoRA that is trained find what full fine-tuning finds? A first answer for notebook 03, on a real model.

    python dev.py real && python -m lora_edu.record from_scratch

The task, the steps and the tuned rates are those of the record real_model: restaurants, 60 steps of four rows, rank 16
and full, two seeds. Here the updates themselves are looked at.
"""
from pathlib import Path

import torch

from lora_edu.checkpoints.deltas import deltas
from lora_edu.course.page.real_model import real_copy
from lora_edu.course.records.published import phi
from lora_edu.course.records.real import SEEDS, Bench
from lora_edu.course.records.stored import load_record, rounded
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.merge import remove_lora
from lora_edu.measure.spectra import Factors, factor

METHODS = ("full", "rank 16")
RANKS = (1, 4, 16, 64)
SHARED = (1, 4, 16)           # directions that are compared; a LoRA of rank 16 has no more


def update(bench: Bench, method: str, lr: float, seed: int) -> tuple[Factors, dict]:
    """One trained model's updates, decomposed, and its losses."""
    model = bench.trained(method, lr, seed)
    losses = bench.losses(model)
    if list(lora_layers(model)):
        remove_lora(model, merge=True)
    parts = factor(deltas(bench.base, model.cpu()))
    return Factors(parts.deltas, {name: (W[:0], U[:, :RANKS[-1]].clone(), S, Vh[:RANKS[-1]].clone())
                                  for name, (W, U, S, Vh) in parts.parts.items()}), losses


def spectra_of(parts: Factors) -> dict:
    """Of all matrices together, and of the median matrix: energy at each rank, and the rank for 90 %."""
    ranks = [int((S.double().square().cumsum(0) < 0.9 * S.double().square().sum()).sum()) + 1
             for _, _, S, _ in parts.parts.values()]
    return {"energy": rounded(parts.energy_kept(rank) for rank in RANKS),
            "rank 90": int(torch.tensor(ranks).median())}


def shared(one: Factors, other: Factors) -> dict[str, list[float]]:
    """phi of k leading directions (Hu et al. 2021, section 7.2), mean over the matrices, on the output and the input
    side, and what two random subspaces share: one number for each of `SHARED`.
    """
    found: dict[str, list] = {"out": [], "in": [], "chance out": [], "chance in": []}
    for k in SHARED:
        rows = []
        for name, (_, U, S, Vh) in one.parts.items():
            _, V, _, Wh = other.parts[name]
            rows.append((phi(U[:, :k], V[:, :k]), phi(Vh[:k].T, Wh[:k].T), k / len(U), k / Vh.shape[1]))
        for what, column in zip(found, zip(*rows)):
            found[what] += rounded([sum(column) / len(column)])
    return found


def of_a_model(name: str, where: str | Path, sizes: dict | None, rates: dict) -> dict:
    bench = Bench(name, where, None, sizes)
    kept, runs = {}, []
    for method in METHODS:
        for seed in SEEDS:
            kept[method, seed], losses = update(bench, method, rates[method], seed)
            runs.append({"method": method, "lr": rates[method], "seed": seed} | losses | spectra_of(kept[method, seed]))
            print(name, runs[-1], flush=True)
    first, second = SEEDS
    pairs = {"full and rank 16": (("full", first), ("rank 16", first)),
             "full, two seeds": (("full", first), ("full", second)),
             "rank 16, two seeds": (("rank 16", first), ("rank 16", second))}
    return {"matrices": len(kept["full", first].parts), "runs": runs,
            "shared": {said: shared(kept[one], kept[other]) for said, (one, other) in pairs.items()}}


def from_scratch(sizes: dict | None = None, models: dict | None = None) -> dict:
    """Both models: records/from_scratch.json.

    Raises:
        FileNotFoundError: `python dev.py real` has not been run.
    """
    before, found = load_record("real_model"), {}
    for name, where in (models or {"fable": "fable", "SmolLM2": real_copy()}).items():
        rates = {method: before.runs(model=name, method=method)[0]["lr"] for method in METHODS}
        found[name] = of_a_model(name, where, sizes, rates)
    settings = {key: value for key, value in before["settings"].items() if key not in ("rules not kept", "every")}
    return {"settings": settings | {"ranks": list(RANKS), "directions": list(SHARED), "rules not kept":
                                              "two seeds in place of five; rates chosen by the record real_model"},
            "models": found}
