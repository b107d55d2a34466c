"""The explorer of a recorded grid: rank by learning rate, one cell a training, and the path of the cell under the
sliders.

Read `grid_explorer` first. A map of one alpha rule beside that of another answers the notebook's question at a glance:
does the best learning rate of a row move with the rank? The best is chosen on the validation split, whatever the map
shows, so that the tales can be read beside a choice that did not look at them.
"""
import itertools
from html import escape

import ipywidgets
import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from lora_edu.course.figures.spectra import readable_on
from lora_edu.course.page.show import BLACK, GREY, LABELS, look, new_figure
from lora_edu.course.page.widgets import picture_with_controls
from lora_edu.lora.settings import RULES
from lora_edu.training.tasks import TASKS

MEASURES = {"test": "loss on the task", "tales": "loss on the tales", "slots": "slots right"}
TITLES = {"test": "task", "tales": "tales", "slots": "slots"}      # their entries in LABELS
GAP = (np.nan, np.nan)
SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1), (1, -1), GAP]) / 2
CROSS = np.array([(-1, -1), (1, 1), GAP, (-1, 1), (1, -1), GAP, GAP]) / 2


def grid_explorer(record: dict, trainer=None) -> ipywidgets.VBox:
    """Controls for task, alpha rule, measure, rank and learning rate, above the map and the path of the chosen cell.

    Args:
        record: as `load_record("rank_alpha")` gives it: one run for every rank, learning rate, rule and task of its
            settings.
        trainer: what a button hands the chosen setting to, by ``trainer.open(task=, rule=, rank=, alpha=, lr=)``; None:
            no button.

    The brighter a cell, the better; its number is written in it. A dashed frame is a row's best rate, a solid one the
    chosen cell, a cross a training that diverged.

    Raises:
        ValueError: the record is not complete; the sentence names what is missing.
    """
    cells, settings = check_grid(record), record["settings"]
    tasks, rules, ranks, rates = (list(settings[key]) for key in ("tasks", "rules", "ranks", "rates"))
    picture = _Picture(ranks, rates)
    with_slots = {run["task"] for run in record["grid"] if "slots" in run}

    def update(task, rule, measure, rank, lr):
        shown = "test" if measure == "slots" and task not in with_slots else measure
        tables = {each: _table(cells, task, each, ranks, rates, shown) for each in rules}
        best = {r: _best([cells[task, rule, r, rate] for rate in rates]) for r in ranks}
        chosen = cells[task, rule, rank, lr]
        picture.draw_map(tables[rule], _scale(list(tables.values()), shown), shown, list(best.values()), chosen)
        picture.draw_path(chosen, [run for run in cells.values() if run["task"] == task], record)
        note = "" if shown == measure else f"{TASKS.get(task, task)} has no slots: the map shows the loss on the task\n"
        return note + "\n".join(_said(chosen, tables[rule][ranks.index(rank)], rates, shown, best, record))

    wide = {"style": {"button_width": "auto"}}
    controls = dict(   # buttons and sliders, no Dropdown: see spectrum_explorer.py
        task=ipywidgets.ToggleButtons(options=[(TASKS.get(task, task), task) for task in tasks], description="task",
                                      **wide),
        rule=ipywidgets.ToggleButtons(options=[(RULES.get(rule, rule), rule) for rule in rules], description="rule",
                                      **wide),
        measure=ipywidgets.ToggleButtons(options=[(text, name) for name, text in MEASURES.items()],
                                         description="measure", **wide),
        rank=ipywidgets.SelectionSlider(options=ranks, value=ranks[len(ranks) // 2], description="rank r"),
        lr=ipywidgets.SelectionSlider(options=[(f"{rate:g}", rate) for rate in rates], value=rates[len(rates) // 2],
                                      description="rate", style={"description_width": "auto"}))
    box = picture_with_controls(picture.fig, update, **controls)
    if trainer is not None:
        box.children += (_opener(trainer,
                                 lambda: cells[tuple(controls[name].value for name in ("task", "rule", "rank", "lr"))]),
                                 )
    return box


def check_grid(record: dict) -> dict:
    """Every run of the record by (task, rule, rank, learning rate).

    Raises ValueError unless each is there exactly once.
    """
    if absent := [key for key in ("settings", "before", "grid") if key not in record]:
        raise ValueError(f"this record has no {absent[0]!r}: a grid needs 'settings', 'before' and 'grid', as `python "
                         "-m lora_edu.record rank_alpha` makes it.")
    cells = {(run["task"], run["rule"], run["rank"], run["lr"]): run for run in record["grid"]}
    wanted = list(itertools.product(*(record["settings"][key] for key in ("tasks", "rules", "ranks", "rates"))))
    if missing := [key for key in wanted if key not in cells]:
        task, rule, rank, lr = missing[0]
        raise ValueError(f"{len(missing)} of the grid's {len(wanted)} cells are missing, the first of them rank {rank} "
                         f"at learning rate {lr:g}, rule {rule!r}, on {task}: make the record again, with every "
                         "combination of its settings.")
    if len(record["grid"]) != len(wanted):
        raise ValueError(f"the grid has {len(record['grid'])} cells where its settings name {len(wanted)}: leave out "
                         "what is there twice or is not named by the settings.")
    return cells


class _Picture:
    """The map, the path beside it, and the artists whose data a redraw sets."""

    def __init__(self, ranks: list, rates: list):
        self.ranks, self.rates = ranks, rates
        self.fig, (self.map, self.side) = new_figure(width=9.2, height=3.2, columns=2)
        self.fig.set_dpi(90)
        self.map.grid(visible=False)
        self.map.set(xlabel=LABELS["lr"], ylabel=LABELS["rank"])
        self.image = self.map.imshow(np.zeros((len(ranks), len(rates), 3)), aspect="auto", origin="lower",
                                     interpolation="nearest")
        self.map.set_xticks(range(len(rates)), labels=[f"{rate:g}" for rate in rates], fontsize=8)
        self.map.set_yticks(range(len(ranks)), labels=[f"{rank:g}" for rank in ranks])
        self.numbers = {(y, x): self.map.text(x, y, "", ha="center", va="center", fontsize=8)
                        for y in range(len(ranks)) for x in range(len(rates))}
        self.crosses, = self.map.plot([], [], color=GREY, linewidth=1)
        self.best = self._frame(2.6, 1.2, (0, (2.5, 1.5)))
        self.here = self._frame(5.5, 2.5, "-")
        self.map.set_title("\n")
        self.side.set(xlabel=LABELS["step"], ylabel=LABELS["loss"])
        self.side.yaxis.set_major_locator(MaxNLocator(4))
        self.train, = self.side.plot([], [], label="train", **look(1))
        self.valid, = self.side.plot([], [], label="held-out (validation)", **look(0))
        self.before = self.side.axhline(1, color=BLACK, linestyle=":", linewidth=1.2, label="before training")
        self.note = self.side.text(0.5, 0.4, "", transform=self.side.transAxes, ha="center")
        self.side.legend(frameon=False, fontsize=8, loc="upper right")
        self.side.set_title("\n")

    def _frame(self, wide: float, narrow: float, dashes):
        """A white line in a black one: seen on every colour."""
        return [self.map.plot([], [], color=color, linewidth=width, linestyle=style, solid_joinstyle="miter",
                              clip_on=False)[0]
                for color, width, style in ((BLACK, wide, "-"), ("white", narrow, dashes))]

    def draw_map(self, table: np.ndarray, scale: tuple, measure: str, best: list, chosen: dict) -> None:
        low, high = scale
        better = (table - low) / ((high - low) or 1)
        colors = colormaps["cividis"](np.clip(better if measure == "slots" else 1 - better, 0, 1))[..., :3]
        colors[np.isnan(table)] = 1.0
        self.image.set_data(colors)
        for (y, x), value in np.ndenumerate(table):
            self.numbers[y, x].set(text="" if np.isnan(value) else _short(value, measure),
                                   color=readable_on(colors[y, x]))
        self.crosses.set_data(*_strokes(np.argwhere(np.isnan(table)), CROSS))
        for lines, runs, size in ((self.best, best, 0.8), (self.here, [chosen], 1.0)):
            places = [(self.ranks.index(run["rank"]), self.rates.index(run["lr"])) for run in runs if run]
            for line in lines:
                line.set_data(*_strokes(places, size * SQUARE))
        self.map.set_title(f"{_named(chosen)}: brighter is better\n{LABELS[TITLES[measure]]}", fontsize=9)

    def draw_path(self, chosen: dict, runs: list, record: dict) -> None:
        """The axes are those of the whole task, so that paths can be compared while a slider moves."""
        task = chosen["task"]
        start = record["before"]["task"][task]["valid"]
        lowest = min((run["valid"] for run in runs if run["valid"] is not None), default=start)
        room = max(start - lowest, 0.1)
        self.side.set(xlim=(0, 1.04 * record["settings"]["tasks"][task]["steps"]),
                      ylim=(lowest - 0.1 * room, start + 0.4 * room))
        steps, train, valid = np.array(chosen["path"], dtype=float).reshape(-1, 3).T
        self.train.set_data(steps, train)
        self.valid.set_data(steps, valid)
        self.before.set_ydata([start, start])
        self.note.set_text("" if chosen["diverged"] is None else f"diverged at step {chosen['diverged']}")
        self.side.set_title(f"the chosen cell:\nrank {chosen['rank']}, learning rate {chosen['lr']:g}", fontsize=9)


def _table(cells: dict, task: str, rule: str, ranks: list, rates: list, measure: str) -> np.ndarray:
    """(ranks, rates), nan where a run diverged; slots in per cent."""
    found = [[cells[task, rule, rank, lr].get(measure) for lr in rates] for rank in ranks]
    return np.array(found, dtype=float) * (100 if measure == "slots" else 1)


def _scale(tables: list, measure: str) -> tuple[float, float]:
    """Where the colours begin and end: the same for all rules.

    Three tenths of the losses may lie beyond, or they would pale the rest.
    """
    known = np.concatenate([table[~np.isnan(table)] for table in tables])
    if measure == "slots" or not len(known):
        return 0.0, 100.0
    return float(known.min()), float(np.quantile(known, 0.7))


def _best(runs: list) -> dict | None:
    """The run of lowest validation loss; None if all diverged."""
    return min((run for run in runs if run["valid"] is not None), key=lambda run: run["valid"], default=None)


def _named(run: dict) -> str:
    return f"{TASKS.get(run['task'], run['task'])}, {RULES.get(run['rule'], run['rule'])}"


def _strokes(places, shape: np.ndarray) -> np.ndarray:
    """x and y of one line that draws the shape in every (row, column) of `places`."""
    centres = np.array(places, dtype=float).reshape(-1, 1, 2)[..., ::-1]
    return (centres + shape).reshape(-1, 2).T


def _short(value: float, measure: str) -> str:
    return "diverged" if np.isnan(value) else f"{value:.0f}" if measure == "slots" else f"{value:.2f}"


def _said(run: dict, row, rates: list, measure: str, best: dict, record: dict) -> list[str]:
    """What the picture shows, in words: setting, losses, path, the row of the map, and where the best lies."""
    losses = "; ".join(f"step {step:g}: " + " / ".join("-" if loss is None else f"{loss:.2f}" for loss in both)
                       for step, *both in run["path"])
    cells = ", ".join(f"{lr:g}: {_short(value, measure)}" for lr, value in zip(rates, row))
    here, top = (_place(each) for each in (best[run["rank"]], _best([each for each in best.values() if each])))
    return [f"{_named(run)}: rank {run['rank']}, alpha {run['alpha']:g}, scaling {run['scaling']:.4g}, learning rate "
            f"{run['lr']:g}; {run['trainable']:,} trainable numbers, "
            f"an adapter of {4 * run['trainable']:,} bytes in float32",
            _at_the_end(run, record["before"], record["settings"]["tasks"][run["task"]]["steps"]),
            f"path, train / held-out: {losses or 'none'}",
            f"this row, {LABELS[TITLES[measure]]} at each learning rate: {cells}",
            f"best by validation: in this row {here}; in the whole map {top}"]


def _at_the_end(run: dict, before: dict, steps: int) -> str:
    if run["diverged"] is not None:
        return f"diverged at step {run['diverged']} of {steps}: there is no loss to show"
    slots = f"; slots right: {run['slots']:.0%}" if "slots" in run else ""
    return (f"after {steps} steps, nats per token: test {run['test']:.3f} (before "
            f"{before['task'][run['task']]['test']:.2f}), validation {run['valid']:.3f}, tales {run['tales']:.2f} "
            f"(before {before['tales']['its own']:.2f}){slots}")


def _place(run: dict | None) -> str:
    if run is None:
        return "none, every training diverged"
    return f"rank {run['rank']} at learning rate {run['lr']:g}, test {run['test']:.3f}"


def _opener(trainer, chosen) -> ipywidgets.HBox:
    """A button that hands the chosen run's setting to the trainer, and a text that says that it did."""
    button = ipywidgets.Button(description="open this setting in the trainer", layout=ipywidgets.Layout(width="auto"))
    status = ipywidgets.HTML()

    def click(_):
        run = chosen()
        setting = {name: run[name] for name in ("task", "rule", "rank", "alpha", "lr")}
        try:
            trainer.open(**setting)
            said = "in the trainer: " + ", ".join(f"{name} {value}" for name, value in setting.items())
        except Exception as error:     # a callback has no other place to show it
            said = f"the trainer cannot open this setting: {type(error).__name__}: {error}"
        status.value = f'<div role="status">{escape(said)}</div>'

    button.on_click(click)
    return ipywidgets.HBox([button, status])
