"""The live trainer: choose rank, alpha, rate, matrices and task, press play, and a real model learns in front of you.

`Play` is only a clock: each of its ticks gives the run about a fifth of a second of work, and what the page shows is a
function of the steps done (see `live_run.py`). Its clock going back starts the run again. A control that moves
leaves the run so
far as a finished curve and begins a new one, at the next tick: while a slider is dragged, no model is made.
"""
import functools
import threading
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import ipywidgets
from torch import nn

from lora_edu.course.labs.live_run import Lesson, LiveRun
from lora_edu.course.labs.target_picker import target_sizes
from lora_edu.course.labs.trainer_picture import EARLIER, TrainerPicture, words
from lora_edu.course.page.show import png
from lora_edu.lora.settings import RULES, LoRASettings
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training import corpora
from lora_edu.training.tasks import TASKS, Task

RATES = [5e-4 * 2**i for i in range(9)]     # 0.0005 to 0.128
CLOCK = 10**6     # ticks: Play stops at its largest value, and a slow kernel must still be able to finish


class Setting(NamedTuple):
    """What the controls say."""

    task: str
    targets: str
    rule: str
    rank: int
    alpha: int
    lr: float

    @property
    def adapter(self) -> LoRASettings:
        return LoRASettings(self.rank, float(self.alpha), PLACEMENTS[self.targets], self.rule == "rslora", self.lr)

    def __str__(self) -> str:
        return f"{TASKS[self.task]}, {self.targets}, r {self.rank}, alpha {self.alpha} ({self.rule}), lr {self.lr:g}"


def live_trainer(steps: int = 100) -> "Trainer":
    """The trainer on fable; show its ``.box``, and put it to a setting with ``.open(...)``.

    Args:
        steps: length of a run; the learning rate falls to zero over it.

    8 rows a step on a CPU; 32 on a GPU, where more steps fit in a tick.
    """
    device = best_device()
    base, tokenizer = load_pretrained()
    rows = 8 if device.type == "cpu" else 32
    tales = corpora.tales_from(base, tokenizer, n=8, length=128, batch_size=8)

    def lesson(name: str) -> Lesson:
        task = Task(name, tokenizer, n=48, batch_size=8)
        return Lesson(tokenizer, task.prompt, functools.partial(task.batches, rows=rows), task.valid, tales,
                      task.cards[:40])

    place = "a CPU"
    if rows > 8:
        place = f"a GPU ({device.type}), so more rows a step than the 8 on a CPU, and more steps a tick"
    return Trainer(base.to(device), lesson, steps, f"trained on {place}: {rows} rows a step")


class Trainer:
    """Controls, a picture and a text around one `LiveRun` at a time.

    Args:
        base: the untouched model, where it is to train.
        lesson: ``lesson("bistro")`` or ``("python_docs")`` says what to learn from; asked once for each.
        steps: length of a run.
        where: a sentence on the device, for the text.

    Attributes:
        box: a VBox of [rows of controls, Image, HTML], to be shown.
        controls: task, targets, rule, rank, alpha, lr by name. play, step_button, reset_button: the other widgets.
    """

    def __init__(self, base: nn.Module, lesson: Callable[[str], Lesson], steps: int, where: str):
        self.base, self.lesson, self.steps, self.where = base, functools.cache(lesson), steps, where
        self.sides = {name: sum(map(sum, sizes)) for name, sizes in target_sizes(base).items()}     # numbers at rank 1
        self.run: LiveRun | None = None
        # (its place in the picture, settings, run), oldest first
        self.earlier: list[tuple[int, Setting, LiveRun]] = []
        self.ended, self.problem = 0, ""
        self.playing = False
        self.lock, self.busy = threading.RLock(), False     # JupyterLab may run two controls' callbacks in two threads
        self._build(min(64, *(min(size) for group in target_sizes(base).values() for size in group)))
        self.setting = self._read()
        self.picture = TrainerPicture(steps)
        self.image = ipywidgets.Image(format="png",
                                      layout=ipywidgets.Layout(width=self.picture.width, max_width="100%"))
        self.text = ipywidgets.HTML()
        self.box = ipywidgets.VBox([self._rows(), self.image, self.text])
        for control in self.controls.values():
            control.observe(self._callback(lambda change: None), "value")     # `_settle` reads what all of them say
        self.play.observe(self._callback(self._tick), "value")
        self.step_button.on_click(self._callback(lambda button: self._work(1)))
        self.reset_button.on_click(self._callback(lambda button: self._reset()))
        self._callback(lambda start: None)(None)

    def open(self, task: str, rule: str, rank: int, alpha: float, lr: float, targets: str = "all-linear") -> None:
        """Put the controls to a setting, in one move; what ran before stays as a finished curve.

        Raises:
            ValueError: a value that a control does not offer, or an alpha that is not 2 rank under the rule "2r".
        """
        wanted = Setting(task, targets, rule, rank, alpha, lr)
        for name, offered in {"task": TASKS, "targets": PLACEMENTS, "rule": RULES, "lr": RATES,
                              "rank": range(1, self.controls["rank"].max + 1),
                              "alpha": range(1, self.controls["alpha"].max + 1)}.items():
            if getattr(wanted, name) not in offered:
                raise ValueError(f"the trainer has no {name}={getattr(wanted, name)!r}: choose {_choices(offered)}.")
        if rule == "2r" and alpha != 2 * rank:
            raise ValueError(f"alpha={alpha:g} at rank {rank} is not 2r: give alpha={2 * rank}, or another rule.")

        def put(_):
            for name, control in self.controls.items():
                control.value = getattr(wanted, name)
        self._callback(put)(None)

    def _build(self, most: int) -> None:
        wide = {"button_width": "auto"}
        self.controls = {
            "task": ipywidgets.ToggleButtons(options=[(name, task) for task, name in TASKS.items()], description="task",
                                             style=wide),
            "targets": ipywidgets.ToggleButtons(options=list(PLACEMENTS), description="matrices", style=wide),
            "rule": ipywidgets.ToggleButtons(options=[(words, rule) for rule, words in RULES.items()],
                                             description="alpha rule", style=wide),
            "rank": ipywidgets.IntSlider(value=min(8, most), min=1, max=most, description="rank r"),
            "alpha": ipywidgets.IntSlider(value=2 * min(8, most), min=1, max=2 * most, description="alpha",
                                          disabled=True),
            "lr": ipywidgets.SelectionSlider(options=[(f"{rate:g}", rate) for rate in RATES], value=8e-3,
                                             description="learning rate",
                                             style={"description_width": "initial"})}
        self.lock_text = ipywidgets.HTML()
        self.play = ipywidgets.Play(value=0, min=0, max=CLOCK, step=1, interval=200)
        self.step_button = ipywidgets.Button(description="one step", layout=ipywidgets.Layout(width="auto"))
        self.reset_button = ipywidgets.Button(description="reset", layout=ipywidgets.Layout(width="auto"))

    def _rows(self) -> ipywidgets.VBox:
        """The controls, sliders first."""
        wrap, c = ipywidgets.Layout(flex_flow="row wrap"), self.controls
        rows = [(c["rank"], c["alpha"], self.lock_text, c["lr"]), (c["rule"], c["targets"]), (c["task"],),
                (self.play, self.step_button, self.reset_button)]
        return ipywidgets.VBox([ipywidgets.HBox(row, layout=wrap) for row in rows])

    def _read(self) -> Setting:
        return Setting(**{name: control.value for name, control in self.controls.items()})

    def _callback(self, act):
        """A callback: one at a time, then what the controls say is followed, and all is drawn once.

        Errors are said in the text.
        """
        def callback(event):
            with self.lock:
                if self.busy:      # a control that another callback has moved
                    return
                self.busy = True
                try:
                    act(event)
                    self._settle()
                except Exception as error:
                    self._stop(f"This run ended with an error: {type(error).__name__}: "
                               f"{error} Press reset, or choose other settings.")
                finally:
                    self.busy = False
                self._show()
        return callback

    def _settle(self) -> None:
        """Alpha follows its rule; new settings end the run, and the next tick begins another."""
        locked, alpha = self.controls["rule"].value == "2r", self.controls["alpha"]
        alpha.disabled = locked
        if locked:
            alpha.value = 2 * self.controls["rank"].value
        self.lock_text.value = "<b>locked</b> to 2r" if locked else "<b>free</b>"
        setting = self._read()
        if setting != self.setting:
            if self.run and self.run.done:
                self.run.close()
                self.earlier = [*self.earlier, (self.ended % EARLIER + 1, self.setting, self.run)][-EARLIER:]
                self.ended += 1
            self.setting = setting
            self._reset()

    def _reset(self) -> None:
        """Back to step 0 of the same settings."""
        self.run, self.problem, self.play.max = None, "", CLOCK

    def _stop(self, problem: str = "") -> None:
        """Nothing more to do: a clock at its end stops, in ipywidgets 7 and 8."""
        self.problem, self.play.max = problem, self.play.value

    def _tick(self, change) -> None:
        playing = getattr(self.play, "playing", getattr(self.play, "_playing", False))     # ipywidgets 8, 7
        # a tick that lay in the page when pause was pressed
        waited, self.playing = self.playing and not playing, playing
        if change.new < change.old:
            self._reset()
        elif not waited:
            self._work(None)

    def _work(self, count: int | None) -> None:
        """Some pieces of work (None), or so many whole steps."""
        if self.problem:
            return self._stop(self.problem)
        if self.run is None:
            self.run = LiveRun(self.base, self.setting.adapter, self.lesson(self.setting.task), self.steps)
        if count is None or self.run.done == self.steps:
            self.run.advance()
        else:
            self.run.advance(self.run.done + count, seconds=float("inf"))
        if self.run.complete:
            self._stop()

    def _show(self) -> None:
        try:
            self.picture.draw(self.setting, self.run, self.earlier)
            self.image.value = png(self.picture.fig)
            count = self.setting.rank * sum(self.sides[name] for name in PLACEMENTS[self.setting.targets])
            said = "\n".join(filter(None,
                                    [self.problem,
                                     *words(self.setting, self.run, self.earlier, self.steps, count, self.where)]))
        except Exception as error:
            said = f"This cannot be drawn: {type(error).__name__}: {error}"
        self.text.value = f'<div role="status" style="white-space: pre-wrap; line-height: 1.5">{escape(said)}</div>'


def _choices(offered) -> str:
    return f"{offered[0]} to {offered[-1]}" if isinstance(offered, range) else " or ".join(map(str, offered))
