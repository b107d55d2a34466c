"""The records of notebook 04, made by `python -m lora_edu.record NAME`:

    rank_alpha    rank x learning rate x alpha rule x task at a fixed number of steps: the grid that the explorer shows
    rank_seeds    its best rate for each rank, with more seeds, and on restaurants five times the steps with rates of
    their own two_rates     ranks 8 and 64 with alpha and the rate both free, so that B's rate is tuned beside A's
    planted_rank  LoRA of rank 1 to 32 that learns from teachers whose update has rank 2, 6 and 16
"""
import torch

from lora_edu.course.records.runs import SEEDS, before, tales_to_forget
from lora_edu.course.records.stored import load_record
from lora_edu.lora.settings import FIXED_ALPHA, LoRASettings
from lora_edu.lora.stack import LoRAStack
from lora_edu.course import planted
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training import corpora
from lora_edu.training.loop import evaluate, sixteen_bits
from lora_edu.training.stacked import train_stack
from lora_edu.training.sweep import sweep
from lora_edu.course.tasks import Task

ROWS = 8
GRID = {"ranks": (1, 4, 8, 16, 64), "rates": tuple(0.001 * 2**i for i in range(7)), "rules": ("2r", "fixed", "rslora"),
        "tasks": {"bistro": {"steps": 100, "every": 10}, "python_docs": {"steps": 50, "every": 5}}}
GPU_GRID = GRID | {"ranks": (1, 2, 4, 8, 16, 32, 64), "rates": tuple(0.0005 * 2**i for i in range(9))}
PLANTED = {"matrix": "model.layers.3.mlp.down_proj", "planted": (2, 6, 16), "ranks": (1, 2, 4, 6, 8, 12, 16, 24, 32),
           "rates": (0.02, 0.04, 0.08), "steps": 400, "rows": 8, "tokens": 32}


def _scorer(task: Task, tales: dict, prompts: int):
    """What a trained model is judged by: test loss, its tales, and on restaurants the slots of so many prompts."""
    def score(model) -> dict:
        model.cpu()
        found = {"test": round(evaluate(model, task.test), 4), "tales": round(evaluate(model, tales["its own"]), 4)}
        if prompts and task.cards:
            found["slots"] = round(task.slots(model, prompts).slots, 4)
        return found
    return score


def rank_alpha(grid: dict | None = None, seed: int = 0, n: int = 200, prompts: int = 60,
               scratch: str | None = None, known: dict | None = None) -> dict:
    """Every rank with every rate under every rule, on both tasks.

    `scratch`: a folder where finished chunks are kept, to go on from. `known`: a record of the same settings but for
    rules, ranks and rates, whose cells are taken over; at rank 8 all rules are one.
    """
    device = best_device()
    grid = grid or (GPU_GRID if device.type == "cuda" else GRID)
    model, tokenizer = load_pretrained()
    tales = {"its own": tales_to_forget(None)["its own"][:1]}
    tasks = [Task(name, tokenizer, n) for name in grid["tasks"]]
    model.to(device)
    same = {"rows": ROWS, "seed": seed, "prompts": prompts, "tasks": grid["tasks"]}
    if known and any(known["settings"][key] != value for key, value in same.items()):
        raise ValueError("the known record has other settings: make the whole record again.")
    there = {(cell["task"], cell["rank"], cell["scaling"], cell["lr"]): cell for cell in (known or {}).get("grid", ())}
    cells = []
    for task in tasks:
        adapters = {(rule, rank, lr): LoRASettings.by_rule(rule, rank, lr=lr, seed=seed) for rule in grid["rules"]
                    for rank in grid["ranks"] for lr in grid["rates"]}
        old = {key: there.get((task.name, its.rank, round(its.scaling, 6), its.lr)) for key, its in adapters.items()}
        steps, every = (grid["tasks"][task.name][key] for key in ("steps", "every"))
        # at rank 8 the rules are one and the same
        alone = list(dict.fromkeys(its for key, its in adapters.items() if not old[key]))
        by_adapter = dict(zip(alone,
                              _train_all(model, task, alone, steps, _scorer(task, tales, prompts), _first_batch(task),
                                        every=every,
                                        out=f"{scratch}/rank_alpha_{task.name}.json" if scratch else None)))
        cells += [old[key] | {"rule": key[0], "alpha": its.alpha} if old[key] else
                  _cell(task.name, key[0], by_adapter[its], every) for key, its in adapters.items()]
    return {"settings": {key: list(value) if isinstance(value, tuple) else value for key, value in grid.items()} |
            {"rows": ROWS, "fixed alpha": FIXED_ALPHA, "targets": "all-linear", "seed": seed, "prompts": prompts,
             "rules not kept": "one seed; the rate is chosen on the validation split of the same seed; "
                               "few prompts for slots"},
            "before": before(tasks, tales), "grid": cells}


def _train_all(model, task: Task, adapters: list[LoRASettings], steps: int, score, valid: list,
               every: int | None = None,
              out: str | None = None) -> list[dict]:
    """`sweep` on a task's own batches. Ends the program where it was stopped: a record of some of its runs is none."""
    runs = sweep(model, adapters, lambda seed: task.batches(steps, seed, rows=ROWS), steps, valid,
                 every=every, score=score, autocast=sixteen_bits(next(model.parameters()).device), out=out)
    if len(runs) < len(adapters):
        raise SystemExit(f"{len(runs)} of {len(adapters)} runs are finished, and no record is written; --scratch "
                         "FOLDER keeps them.")
    return runs


def _first_batch(task: Task) -> list:
    """What the rates of the grid are chosen by: 50 cards, or the few rows of documentation."""
    return task.valid[:1] if task.name == "bistro" else task.valid


def _cell(task: str, rule: str, run: dict, every: int) -> dict:
    """One cell of the map; `path` holds [step, loss of its batch before the update, validation loss after it]."""
    path = [[step, round(run["losses"][step - 1], 4), round(valid, 4)] for step, valid in run["heldout"]]
    measured = {key: run.get(key) for key in ("test", "tales", "slots") if key in run or key != "slots"}
    return {"task": task, "rule": rule, "rank": run["rank"], "alpha": run["alpha"], "scaling": round(run["scaling"], 6),
            "lr": run["lr"],
            "seed": run["seed"], "valid": None if run["diverged"] else path[-1][2]} | measured | {
            "diverged": run["diverged"], "trainable": run["trainable"], "path": path}


def rank_seeds(steps: int = 500, ranks=(1, 8, 64), seeds=SEEDS, n: int = 200, prompts: int = 100,
               scratch: str | None = None) -> dict:
    """Loss over rank at a fixed number of steps and after many: rates chosen on seed 0 and validation, reported on
    other seeds and test.
    """
    grid, (model, tokenizer) = load_record("rank_alpha"), load_pretrained()
    tales = {"its own": tales_to_forget(None)["its own"][:1]}
    tasks = {name: Task(name, tokenizer, n) for name in grid["settings"]["tasks"]}
    model.to(best_device())

    def brief(name: str, adapters: list[LoRASettings], steps: int) -> list[dict]:
        task, first = tasks[name], adapters[0]
        runs = _train_all(model, task, adapters, steps, _scorer(task, tales, prompts), task.valid,
                         out=f"{scratch}/rank_seeds_{name}_{steps}_{len(adapters)}_{first.seed}_{first.lr:g}.json"
                         if scratch else None)
        return [{key: run[key] for key in ("rank", "lr", "seed", "test", "tales", "slots") if key in run} |
                {"valid": None if run["diverged"] else round(run["heldout"][-1][1], 4)} for run in runs]

    short = {}
    for task in tasks:
        best = {rank: best_of(grid["grid"], task, rank)["lr"] for rank in grid["settings"]["ranks"]}
        short[task] = brief(task, _repeated(best, seeds), grid["settings"]["tasks"][task]["steps"])
    first = {rank: best_of(grid["grid"], "bistro", rank)["lr"] for rank in ranks}
    tuning = _until_inside(first, lambda adapters: brief("bistro", adapters, steps))
    best = {rank: min(runs, key=_loss_or_inf)["lr"] for rank, runs in tuning.items()}
    long = {"steps": steps, "tuning": [run for runs in tuning.values() for run in runs],
            "runs": brief("bistro", _repeated(best, seeds), steps)}
    settings = {"rows": ROWS, "rule": "2r", "targets": "all-linear", "seeds": list(seeds), "tuning seed": 0,
                "prompts": prompts,
                "rules not kept": "three seeds; three rates or more for the long runs, "
                                  "which are on one task and three ranks"}
    return {"settings": settings, "short": short, "long": long}


def _repeated(rates: dict[int, float], seeds) -> list[LoRASettings]:
    """Every rank at its rate, with every seed."""
    return [LoRASettings.by_rule("2r", rank, lr=lr, seed=seed) for seed in seeds for rank, lr in rates.items()]


def _until_inside(first: dict[int, float], train) -> dict[int, list[dict]]:
    """Runs of each rank at its first rate, a half and a quarter, and on until no best rate is an edge."""
    open_rates = {rank: [lr / 2**i for i in range(3)] for rank, lr in first.items()}
    tuning: dict[int, list[dict]] = {rank: [] for rank in first}
    while any(open_rates.values()):
        open_runs = [(rank, lr) for rank, rates in open_rates.items() for lr in rates]
        for run in train([LoRASettings.by_rule("2r", rank, lr=lr) for rank, lr in open_runs]):
            tuning[run["rank"]] = sorted([*tuning[run["rank"]], run], key=lambda run: run["lr"])
        open_rates = {rank: beyond_the_edge(runs) for rank, runs in tuning.items()}
    return tuning


def two_rates(alphas: dict | None = None, rates=(0.002, 0.004, 0.008), seed: int = 0, n: int = 200,
              scratch: str | None = None) -> dict:
    """Is it the rank, or B's rate? Alphas that the grid does not have for these ranks; the same numbers of steps."""
    alphas = alphas or {8: (32, 64, 128), 64: (64, 256)}
    settings, (model, tokenizer) = load_record("rank_alpha")["settings"], load_pretrained()
    tales = {"its own": tales_to_forget(None)["its own"][:1]}
    model.to(best_device())
    found = []
    for name, how in settings["tasks"].items():
        task = Task(name, tokenizer, n)
        adapters = [LoRASettings(rank, alpha, lr=lr, seed=seed) for rank, some in alphas.items() for alpha in some
                    for lr in rates]
        runs = _train_all(model, task, adapters, how["steps"], _scorer(task, tales, 0), _first_batch(task),
                         out=f"{scratch}/two_rates_{name}.json" if scratch else None)
        found += [_cell(name, "free", run, how["steps"]) for run in runs]
    return {"settings": {"alphas": alphas, "rates": list(rates), "seed": seed, "rows": ROWS, "tasks": settings["tasks"],
                         "rules not kept": "one seed; three rates, and the best may lie on their edge"}, "runs": found}


def _loss_or_inf(run: dict) -> float:
    return float("inf") if run["valid"] is None else run["valid"]


def best_of(cells: list[dict], task: str, rank: int, rule: str = "2r") -> dict:
    """The cell of the lowest validation loss in a row of the map."""
    return min((c for c in cells if (c["task"], c["rule"], c["rank"]) == (task, rule, rank)), key=_loss_or_inf)


def beyond_the_edge(runs: list[dict]) -> list[float]:
    """The rate to try next: half the smallest or twice the largest where that one was best; [] where the best lies
    inside.
    """
    best = min(range(len(runs)), key=lambda i: _loss_or_inf(runs[i]))
    return [runs[0]["lr"] / 2] if best == 0 else [runs[-1]["lr"] * 2] if best == len(runs) - 1 else []


def planted_rank(settings: dict = PLANTED, seeds=SEEDS[:2], n: int = 512) -> dict:
    """Held-out divergence of every student; its rate is chosen on seed 0, and each seed has its own teachers, texts
    and start.
    """
    model, tokenizer = load_pretrained()
    texts = torch.cat([ids for ids, _ in corpora.tales_from(model, tokenizer, n=n, length=settings["tokens"], seed=5)])
    pairs = [(k, rank) for k in settings["planted"] for rank in settings["ranks"]]
    tuning = {lr: _divergence_of_each(model, texts, settings, {pair: lr for pair in pairs}, 0)
              for lr in settings["rates"]}
    best = {pair: min(tuning, key=lambda lr: tuning[lr][pair]) for pair in pairs}
    found = {seed: _divergence_of_each(model, texts, settings, best, seed) for seed in seeds}
    with torch.no_grad():
        untrained = {k: planted.heldout_divergence(model, [planted.plant(model, settings["matrix"], k)], texts[:32])
                     for k in settings["planted"]}
    return {"settings": settings | {"seeds": list(seeds), "tuning seed": 0,
                                    "rules not kept": "two seeds; three rates, and the best may lie on their edge"},
            "untrained": {k: round(each[0], 4) for k, each in untrained.items()},
            "students": [{"planted": k, "rank": rank, "lr": best[k, rank],
                          "tuning": {lr: round(each[k, rank], 5) for lr, each in tuning.items()},
                          "divergence": [round(found[seed][k, rank], 5) for seed in seeds]} for k, rank in pairs]}


def _divergence_of_each(model, texts: torch.Tensor, settings: dict, rates: dict[tuple[int, int], float],
                       seed: int) -> dict:
    """Held-out divergence, nats per token, of one student for each (planted rank, rank), all trained in one stack."""
    teachers = [planted.plant(model, settings["matrix"], k, seed) for k in settings["planted"]]
    stack = LoRAStack(model,
                      [LoRASettings(rank, 2 * rank, (settings["matrix"],), lr=lr, seed=seed) for (_, rank),
                       lr in rates.items()])
    try:
        students, steps = len(settings["ranks"]), settings["steps"]
        for step in train_stack(stack, planted.lessons(teachers, texts[32:], steps, students, settings["rows"], seed),
                                steps,
                                losses_of=planted.divergences):
            if step.step % 100 == 0:
                print(f"planted_rank seed {seed}, step {step.step}", flush=True)
        return dict(zip(rates, planted.heldout_divergence(model, teachers, texts[:32], students)))
    finally:
        stack.remove()
