"""The live trainer: choose rank, alpha, rate, matrices and task, press play, and a real model learns in front of you.

The page is the clock (`trainer.js`): each of its ticks gives the run about a fifth of a second of work, and what the
page shows is a function of the steps done (see `live_run.py`). A control that moves leaves the run so far as a finished
curve and begins a new one, at the next tick: while a slider is dragged, no model is made.
"""
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import traitlets
from matplotlib.figure import Figure
from torch import nn

from lora_edu.course.figures.curves import plot_loss_curves
from lora_edu.course.labs.lab import Lab, ranks_up_to
from lora_edu.course.labs.live_run import LiveRun, Plan, waiting_interrupt
from lora_edu.course.lessons import Lesson
from lora_edu.course.records.rank import ROWS
from lora_edu.course.records.real import plain_text
from lora_edu.course.records.stored import load_record
from lora_edu.course.tasks import TASKS, Task
from lora_edu.lora.adapter_file import save_adapter
from lora_edu.lora.inject import choose_layers
from lora_edu.lora.layer import features
from lora_edu.lora.settings import FIXED_ALPHA, RULES, LoRASettings
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.models.bridge import ask
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training import bistro
from lora_edu.training.corpora import tales_from
from lora_edu.training.loop import sixteen_bits

RATES = [5e-4 * 2**i for i in range(9)]     # 0.0005 to 0.128
FINER = [rate / 8 for rate in RATES] + [0.032]      # larger models want smaller ones
EARLIER = 5                                  # finished curves that stay
RSLORA_ALPHA = LoRASettings.by_rule("rslora", 8).alpha        # so that the three rules agree at rank 8
BEGIN = {"task": "bistro", "targets": "all-linear", "rule": "2r", "rank": 8, "alpha": 16, "lr": 8e-3, "like": True,
         "hide": False, "guess": 1.0, "drawn": None}


class Setting(NamedTuple):
    """What the controls say; `like`: as in the record."""

    task: str
    targets: str
    rule: str
    rank: int
    alpha: float
    lr: float
    like: bool = False

    @property
    def adapter(self) -> LoRASettings:
        return LoRASettings(self.rank, float(self.alpha), targets_of(self.targets), self.rule == "rslora", self.lr)

    def __str__(self) -> str:
        where = "" if self.targets == "all-linear" else f", {self.targets}"
        return f"r {self.rank}, alpha {self.alpha:g} ({self.rule}), lr {self.lr:g}{where}"


def live_trainer(model: nn.Module | None = None, tokenizer=None, lessons: Sequence[Lesson] = (), *,
                 record: dict | None = None, steps: int | None = None) -> "Trainer":
    """The trainer, on fable or on a model of yours; put it to a setting with ``.put_to(...)``. One that was made before
    in this kernel ends.

    Args:
        model, tokenizer: what `load_pretrained` gives, or a causal language model of transformers; fable by default. It
            trains on the best device here, and its weights stay as they are.
        lessons: what it can be taught, such as ``lessons.orders()`` and ``lessons.from_pairs("my.csv")``.
        record: paths to draw pale, as `recorded_paths` gives them, for a model of which there is a record.
        steps: length of a run that is not as in the record, 100 on fable, 60 on another; the learning rate falls to
            zero over it.

    As in the record: its rows, steps, precision and held-out set, on every device. Otherwise few rows on a CPU (8 on
    fable, 1 on another model), and 32 on a GPU, where more steps fit in a tick.

    Raises:
        ValueError: a model without its tokenizer or without a lesson, or two lessons of one name.
    """
    if model is None:
        return _on_fable(steps or 100)
    if tokenizer is None or not lessons:
        raise ValueError("a model of yours needs its tokenizer and at least one lesson: live_trainer(model, tokenizer, "
                         "[lessons.orders()]).")
    by_name = {lesson.name: lesson for lesson in lessons}
    if len(by_name) < len(lessons):
        names = ", ".join(lesson.name for lesson in lessons)
        raise ValueError(f"two of these lessons have one name ({names}): give one another, from_pairs(file, name=…).")
    device = best_device()
    rows, narrow = 1 if device.type == "cpu" else 32, sixteen_bits(device)

    plain = functools.cache(lambda: plain_text(tokenizer, n=4, length=64))      # late: the page is there first

    def plan(name: str, like: bool) -> Plan:
        its = by_name[name]
        known = like and record and record["settings"]["tasks"].get(name)
        asked = its.test[:12] if its.judge else []
        question = its.valid[0][0]
        return Plan(tokenizer, ask(tokenizer, question) if its.judge else "The",
                    functools.partial(its.batches, tokenizer, rows=record["settings"]["rows"] if known else rows),
                    its.heldout(tokenizer, n=16, rows=2), plain(), [ask(tokenizer, question) for question, _ in asked],
                    its.score, its.judged, 1, question, autocast=narrow, steps=known["steps"] if known else None)

    return Trainer(model.to(device), plan, steps or 60, _where(device, rows), record, plain="plain text",
                   tasks={name: name for name in by_name}, rates=FINER,
                   begin={"task": next(iter(by_name)), "lr": 2e-3})


def _where(device: torch.device, rows: int) -> str:
    place = "a CPU" if device.type == "cpu" else f"a GPU ({device.type})"
    return f"trained on {place}, {rows} row{'s' * (rows > 1)} a step"


def _on_fable(steps: int) -> "Trainer":
    device, record = best_device(), load_record("rank_alpha")
    base, tokenizer = load_pretrained()
    rows = 8 if device.type == "cpu" else 32
    tales = tales_from(base, tokenizer, n=8, length=128, batch_size=8)

    def plan(name: str, like: bool) -> Plan:
        task = Task(name, tokenizer, n=200, batch_size=10 if name == "bistro" else 16) if like else Task(
            name, tokenizer, n=48, batch_size=8)
        cards = task.cards[:40]
        its = record["settings"]["tasks"][name]
        valid = task.valid[:5] if like and name == "bistro" else task.valid
        how = {"every": its["every"], "steps": its["steps"],
               "autocast": getattr(torch, record["made"]["products in"])} if like else {
            "autocast": sixteen_bits(device) if device.type == "cuda" else None}
        return Plan(tokenizer, task.prompt, functools.partial(task.batches, rows=ROWS if like else rows), valid, tales,
                    [bistro.prompt(card) for card in cards],
                    lambda texts: bistro.slot_accuracy(texts, cards).slots, **how)

    return Trainer(base.to(device), plan, steps, _where(device, rows), for_the_page(record))


class Trainer(Lab):
    """Controls, pictures and a text around one `LiveRun` at a time.

    Args:
        base: the untouched model, where it is to train.
        plan: ``plan("bistro", like_the_record)`` says what to learn from; asked once for each.
        steps: length of a run.
        where: a sentence on the device, for the text.
        record: whose curves are drawn pale (`for_the_page`); None: none.
        tasks: how the pages call each task. plain: the text that may be forgotten. rates: those to choose from.
        begin: where the controls stand, if not as on fable.

    Attributes:
        state: what the controls say. runs: what the page draws: {"now": run or None, "earlier": [run, ...], "problem":
            sentence, "ended": bool}, each run with its losses, points, sample and name. run: the `LiveRun` of now.
    """

    runs = traitlets.Dict().tag(sync=True)
    former: "weakref.ref | None" = None

    def __init__(self, base: nn.Module, plan: Callable[[str, bool], Plan], steps: int, where: str,
                 record: dict | None = None, tasks: dict[str, str] = TASKS, plain: str = "tales",
                 rates: Sequence[float] = RATES, begin: dict | None = None):
        if Trainer.former and (other := Trainer.former()):
            other.end()
        Trainer.former = weakref.ref(self)
        self.base, self.plan, self.steps = base, functools.cache(plan), steps
        self.run: LiveRun | None = None
        self.earlier: list[dict] = []
        self.looks: dict[str, int] = {}            # one colour a setting
        self.problem, self.ended = "", False
        self.lock = threading.RLock()              # JupyterLab may run two callbacks in two threads
        counts, most = adaptable(base)
        data = {"title": "live trainer", "tasks": tasks, "rules": RULES, "rates": list(rates), "steps": steps,
                "fixed": FIXED_ALPHA, "rslora": RSLORA_ALPHA, "counts": counts, "ranks": (ranks := ranks_up_to(most)),
                "alphas": sorted({1, 2, 4, FIXED_ALPHA, RSLORA_ALPHA} | {2 * rank for rank in ranks}),
                "record": record,
                "plain": plain,
                "place": {"own": where, "like": f"{record['settings']['rows'] if record else ''} rows a step and the "
                          "precision of the record"}}
        state = BEGIN | {"rank": min(8, most), "alpha": 2 * min(8, most), "like": record is not None} | (begin or {})
        self.setting = setting_of(state)
        super().__init__("trainer", data, state, *without_a_page(data, state, self.setting))
        self.observe(self._moved, "state")
        self.on_msg(self._asked)
        self._tell()

    def put_to(self, task: str, rule: str, rank: int, alpha: float, lr: float, targets: str = "all-linear") -> None:
        """Put the controls to a setting, in one move; what ran before stays as a finished curve.

        Raises:
            ValueError: a value that a control does not offer, an alpha that is not 2 rank under the rule "2r", or a
                trainer that has ended.
        """
        if self.ended:
            raise ValueError("this trainer has ended, because its cell was run again: run this cell again, too.")
        wanted = {"task": task, "targets": targets, "rule": rule, "rank": rank, "alpha": alpha, "lr": lr}
        for name, offered in {"task": self.data["tasks"], "targets": self.data["counts"], "rule": RULES,
                              "lr": self.data["rates"], "rank": self.data["ranks"],
                              "alpha": self.data["alphas"]}.items():
            if wanted[name] not in offered:
                raise ValueError(f"the trainer has no {name}={wanted[name]!r}: choose "
                                 f"{' or '.join(map(str, offered))}.")
        if rule == "2r" and alpha != 2 * rank:
            raise ValueError(f"alpha={alpha:g} at rank {rank} is not 2r: give alpha={2 * rank}, or another rule.")
        self.state = self.state | wanted

    def work(self, steps: int | None = None) -> bool:
        """Some pieces of work (None), or so many whole steps; True if it did not end well: interrupted, or an error.

        An interruption waits for the end of the piece, so the run can go on from there.
        """
        with self.lock, waiting_interrupt() as interrupted:
            try:
                if self.run is None:
                    self.problem = ""
                    plan = self.plan(self.setting.task, self.setting.like)
                    self.run = LiveRun(self.base, self.setting.adapter, plan, plan.steps or self.steps)
                target = None if steps is None or self.run.done == self.run.steps else self.run.done + steps
                self.run.advance(target, 0.2 if steps is None else float("inf"), interrupted)
            except Exception as error:
                self.run, self.problem = None, (f"This run ended with an error: {type(error).__name__}: {error} "
                                                "Press New run, or choose other settings.")
            if interrupted():
                self.problem = f"interrupted at step {self.run.done if self.run else 0}; press Play to go on"
            self._tell()
            went_wrong, self.problem = bool(self.problem), "" if self.run else self.problem      # said once
            return went_wrong

    def new_run(self) -> None:
        """The run of now becomes a finished curve; the next tick begins another of what the controls say."""
        with self.lock:
            if self.run and self.run.done:
                self.run.close()
                self.earlier = [*self.earlier, self._told(self.run)][-EARLIER:]
            self.run, self.problem = None, ""
            self._tell()

    def save(self, folder: str) -> None:
        """Write the adapter of the run of now as a PEFT folder.

        Raises:
            ValueError: nothing has been trained yet.
        """
        if self.run is None or self.run.model is None or not self.run.done:
            raise ValueError("there is no run to save: press Play or Step first.")
        save_adapter(self.run.model, folder)

    def end(self) -> None:
        """Free the models; what was found stays on the page."""
        self.new_run()
        self.ended, self.base = True, None
        self._tell()

    def _moved(self, change) -> None:
        """New settings end the run; another task is another comparison, and the curves go."""
        setting = setting_of(self.state)
        if setting == self.setting:
            return
        with self.lock:
            self.new_run()
            if setting.task != self.setting.task:
                self.earlier, self.looks = [], {}
            self.setting = setting
            self._tell()

    def _asked(self, _, message: dict, buffers) -> None:
        stop = self.ended
        if not stop and message["do"] == "new":
            self.new_run()
        elif not stop:
            stop = self.work(1 if message["do"] == "step" else None)
        self.send({"done": message["do"], "stop": stop})

    def _tell(self) -> None:
        self.runs = {"now": self._told(self.run) if self.run else None, "earlier": self.earlier,
                     "problem": self.problem, "ended": self.ended}

    def _told(self, run: LiveRun) -> dict:
        name = str(self.setting) + ("" if self.setting.like or not self.data["record"] else ", not as in the record")
        look = self.looks.setdefault(name, len(self.looks))
        return {"name": name, "look": look, "done": run.done, "steps": run.steps,
                "losses": list(run.losses), "points": [list(vars(point).values()) for point in run.points],
                "sigma": run.sigma, "watched": run.watched, "sample": run.samples[-1] if run.samples else None,
                "prompt": (run.plan.shown or run.plan.prompt).rstrip("=>").strip(), "score": run.score,
                "judged": run.plan.judged, "asked": len(run.plan.questions),
                "diverged": run.diverged, "complete": run.complete, "skipped": run.skipped}


def setting_of(state: dict) -> Setting:
    return Setting(**{name: state[name] for name in Setting._fields})


def targets_of(placement: str) -> tuple[str, ...] | str:
    """What `apply_lora` takes for a placement; all linear layers but the head, whatever a model calls them."""
    return placement if placement == "all-linear" else PLACEMENTS[placement]


def adaptable(model: nn.Module) -> tuple[dict[str, int], int]:
    """Which of the placements this model has, each with its trainable numbers at rank 1; and the highest rank, at most
    64, that fits all its matrices.
    """
    counts, most = {}, 64
    for name in PLACEMENTS:
        try:
            layers = choose_layers(model, targets_of(name), 1, 1.0)
        except ValueError:                         # other names than a Llama's
            continue
        counts[name] = sum(sum(features(layer)) for layer in layers.values())
        most = min(most, *(min(features(layer)) for layer in layers.values()))
    return counts, most


def for_the_page(record: dict) -> dict:
    """Of the grid, what the trainer draws pale: the path of each setting."""
    settings, wanted = record["settings"], ("task", "rule", "rank", "alpha", "lr", "path")
    return {"settings": {"rows": settings["rows"], "tasks": settings["tasks"]}, "tasks": settings["tasks"],
            "ranks": settings["ranks"], "rates": settings["rates"],
            "before": {task: its["valid"] for task, its in record["before"]["task"].items()},
            "grid": [{name: run[name] for name in wanted} for run in record["grid"]]}


def without_a_page(data: dict, state: dict, setting: Setting) -> tuple[str, Figure | None]:
    """Where the trainer starts, in words, and its recorded curve; None without a record."""
    said = f"{data['tasks'][setting.task]}, {setting}: press Play, and it trains in front of you."
    grid = data["record"]["grid"] if data["record"] else []
    found = [run["path"] for run in grid if all(run[name] == state[name] for name in ("task", "rule", "rank", "lr"))]
    if not found:
        return said, None
    curves = {"batches": [point[:2] for point in found[0]], "held-out": [(step, valid) for step, _, valid in found[0]]}
    step, batch, valid = found[0][-1]
    return (f"{said} As recorded, at step {step}: batch {batch:.3f}, held-out {valid:.3f} nats per token.",
            plot_loss_curves(curves, f"As recorded: {data['tasks'][setting.task]}, rank {setting.rank}, rate "
                             f"{setting.lr:g}"))
