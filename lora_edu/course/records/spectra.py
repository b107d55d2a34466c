"""The records of notebook 03: updates cut to rank r, beside trained nulls, and the spectra of a published pair.

    python -m lora_edu.record spectra
    python -m lora_edu.record published_pair --pair FOLDER

The rules are those of `command.py`. Each full fine-tuning has the steps and the learning rate of the record
lora_beside_full, the nulls those of the task they stand beside.
"""
from pathlib import Path

from lora_edu.checkpoints.deltas import ChangeReport, deltas
from lora_edu.course.records.runs import SEEDS, tales_to_forget
from lora_edu.course.records.stored import load_record, rounded
from lora_edu.files import checksum
from lora_edu.measure.spectra import Factors, Spectrum, factor, spectrum, truncate
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training.loop import evaluate
from lora_edu.course.tasks import BATCH, Task, full_fine_tune

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
SLICE = 40                       # steps of the slice that the notebook trains again
SHOWN = "model.layers.1."        # the block whose singular values are kept
# task, null, what trains; nulls are scored at fewer ranks, to stay within half an hour
WHAT = (("bistro", None, "matrices"), ("bistro", "random_targets", "matrices"), ("bistro", "mismatched", "matrices"),
        ("bistro", "more_of_the_same", "matrices"), ("bistro", None, "everything"),
        ("python_docs", None, "matrices"), ("python_docs", "random_targets", "matrices"))


def _matrices_of(factors: Factors) -> dict[str, dict]:
    """Each matrix: size of its change against W₀, rank for 90 % of its energy, effective and stable rank, values
    above the noise.
    """
    found = {}
    for name, (weight, U, S, Vh) in factors.parts.items():
        its = Spectrum(S, tuple(weight.shape))
        found[name] = {"change": rounded([S.norm() / weight.norm()])[0], "rank 90": int(its.rank_for(0.9)),
                       "effective rank": rounded([its.effective_rank()])[0],
                       "stable rank": rounded([its.stable_rank()])[0],
                       "above edge": int(its.above_edge())}
    return found


def _scores(model, factors: Factors, task: Task, tales, ranks, rest: str, slots: bool) -> dict:
    """Losses (nats per token) and slots (share) of the model that keeps the best rank-r part of each update, for
    each rank.
    """
    found = {"ranks": list(ranks), "rest": rest, "test": [], "tales": []} | ({"slots": []} if slots else {})
    for rank in ranks:
        cut = truncate(model, factors, rank, rest=rest)
        found["test"].append(round(evaluate(cut, task.test), 4))
        found["tales"].append(round(evaluate(cut, tales["its own"]), 4))
        if slots:
            found["slots"].append(round(task.slots(cut).slots, 4))
    return found


def shares(report: ChangeReport) -> dict[str, float]:
    """Squared change of the matrices, of the embedding and of the norms."""
    def of(kind):
        return sum(other.squared for other in report.others if other.kind == kind)

    return dict(zip(("matrices", "embedding", "norms"), rounded([report.squared, of("embedding"), of("norm")])))


def one(task: Task, null: str | None, trains: str, seed: int, steps: int, lr: float, tales: dict) -> dict:
    """One full fine-tuning, its updates' spectra, and the scores of its truncations."""
    base = load_pretrained()[0]
    tuned = full_fine_tune(task.name, steps, lr, seed=seed, null=null, trains=trains)
    factors = factor(deltas(base, tuned))
    real = null is None
    ranks, rests = RANKS if real else (0, 8, 256), ("base",) if trains == "matrices" else ("base", "tuned")
    slots = task.name == "bistro" and trains == "matrices" and null in (None, "mismatched")
    found = {"task": task.name, "null": null, "trains": trains, "seed": seed, "steps": steps, "lr": lr,
             "energy": rounded(factors.energy_kept(rank) for rank in RANKS),
             "matrices": _matrices_of(factors),
             "cut": [_scores(base, factors, task, tales, ranks, rest, slots) for rest in rests]}
    if trains == "everything":
        found["squared change"] = shares(factors.deltas.report())
    if seed == SEEDS[0]:
        found["sigma"] = {name: rounded(S) for name, (_, _, S, _) in factors.parts.items() if name.startswith(SHOWN)}
    print(f"{task.name} {null or trains} seed {seed}: energy at 8 {found['energy'][RANKS.index(8)]:.3f}, test "
          f"{found['cut'][0]['test']}", flush=True)
    return found


def _slices(tasks: dict[str, Task], rates: dict[str, float], steps: int, what) -> list[dict]:
    """What the notebook trains again: the first seed, few steps, energy and loss on the first validation batches."""
    base, found = load_pretrained()[0], []
    for name, null, trains in what:
        if trains == "matrices" and (name == "bistro" or null is None):
            factors = factor(deltas(base, full_fine_tune(name, steps, rates[name], seed=SEEDS[0], null=null)))
            loss = [round(evaluate(truncate(base, factors, rank, rest="base"), tasks[name].valid[:2]), 4)
                    for rank in (0, 8, 256)]
            found.append({"task": name, "null": null, "seed": SEEDS[0], "steps": steps, "lr": rates[name],
                          "energy": rounded(factors.energy_kept(rank) for rank in RANKS), "ranks": [0, 8, 256],
                          "valid": loss})
            print("slice", name, null, found[-1]["energy"][RANKS.index(8)], loss, flush=True)
    return found


def spectra(seeds=SEEDS, n: int = 400, what=WHAT, slice_steps: int = SLICE, sizes: dict | None = None) -> dict:
    """Full fine-tunings and their nulls at every rank: records/spectra.json."""
    beside = load_record("lora_beside_full")
    sizes = sizes or beside["settings"]["sizes"]
    tales, tokenizer = tales_to_forget(None), load_pretrained()[1]
    tasks = {name: Task(name, tokenizer, n) for name in dict.fromkeys(name for name, _, _ in what)}
    rates = {name: beside["tasks"][name]["full"]["lr"] for name in tasks}
    return {"settings": {"ranks": list(RANKS), "seeds": list(seeds), "batch": BATCH, "rates": rates,
                         "slice steps": slice_steps,
                         "rules not kept": f"{len(seeds)} seeds in place of five; the rates of nulls and of training "
                                           "everything are those tuned for the task and the matrices; nulls are "
                                           "scored at three ranks"},
            "slices": _slices(tasks, rates, slice_steps, what),
            "runs": [one(tasks[name], null, trains, seed, sizes[name]["steps"], rates[name], tales)
                     for seed in seeds for name, null, trains in what]}


def published_pair(pair: str | None) -> dict:
    """Singular values of the updates of a folder's base.safetensors and its ft_*.safetensors:
    records/published_pair.json.
    """
    folder = Path(pair or "")
    files = [folder / "base.safetensors", *sorted(folder.glob("ft_*.safetensors"))]
    if not pair or len(files) < 2 or not files[0].is_file():
        raise ValueError(f"--pair {pair}: give a folder with base.safetensors and at least one ft_*.safetensors.")
    checksums = {file.name: checksum(file) for file in files}
    found = {}
    for file in files[1:]:
        changes = deltas(files[0], file)
        found[file.stem] = {"matrices": {name: {"shape": list(weight.shape),
                                                "change": rounded([delta.norm() / weight.norm()])[0],
                                                "sigma": rounded(spectrum(delta).values)} for name, weight,
                                         delta in changes},
                            "others": [[o.name, o.kind, rounded([o.squared])[0] if o.squared else o.squared]
                                       for o in changes.others]}
    return {"source": {"repository": "minimaxir/textgenrnn", "commit": "ee8b9e806d109c25566581f358a4a72b6f03929a",
                       "licence": "MIT", "sha256": checksums,
                       "what": "a character language model of two LSTM layers; "
                               "four full fine-tunes, 500 epochs on 2,000 lines each"},
            "settings": {"layout": "Keras: (in, out), so a matrix here is the transpose of what torch stores; singular "
                                   "values do not care"},
            "pairs": found}
