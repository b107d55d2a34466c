"""The map of a recorded grid: rank by learning rate, one cell a training, and the path of the cell that is chosen.

A map of one alpha rule beside that of another answers the notebook's question at a glance: does the best learning rate
of a row move with the rank? The best is chosen on the validation split, whatever the map shows, so that the tales can
be read beside a choice that did not look at them.
"""
import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_edu.course.figures.spectra import readable_on
from lora_edu.course.labs.lab import Lab
from lora_edu.course.page.show import BLACK, LABELS, new_figure
from lora_edu.course.records.rank import best_of
from lora_edu.lora.settings import RULES
from lora_edu.course.tasks import TASKS

MEASURES = {"test": "loss on the task", "tales": "loss on the tales", "slots": "slots right"}


def grid_explorer(record: dict, trainer=None) -> Lab:
    """A map for each alpha rule, whose cells can be chosen, and the path of the chosen one.

    Args:
        record: as `load_record("rank_alpha")` gives it: one run for every rank, learning rate, rule and task of its
            settings.
        trainer: what a button hands the chosen setting to, by ``trainer.put_to(task=, rule=, rank=, alpha=, lr=)``;
            None: no button.

    The brighter a cell, the better; its number is written in it. A dashed frame is a row's best rate, a solid one the
    chosen cell, a cross a training that diverged.

    Raises:
        ValueError: the record is not complete; the sentence names what is missing.
    """
    cells, settings = check_grid(record), record["settings"]
    tasks = {task: {"words": TASKS.get(task, task), "steps": its["steps"]} for task, its in settings["tasks"].items()}
    ranks, rates = list(settings["ranks"]), list(settings["rates"])
    data = {"title": "rank and learning rate, for each alpha rule", "tasks": tasks, "measures": MEASURES,
            "rules": {rule: RULES.get(rule, rule) for rule in settings["rules"]}, "ranks": ranks, "rates": rates,
            "before": record["before"], "grid": list(cells.values()), "trains": trainer is not None}
    state = {"task": next(iter(tasks)), "measure": "test", "rule": next(iter(data["rules"])),
             "rank": ranks[len(ranks) // 2], "lr": rates[len(rates) // 2]}
    lab = Lab("rank_alpha_map", data, state, in_words(data, state), picture(data, state, cells))
    if trainer is not None:
        lab.on_msg(lambda _, asked, buffers: lab.send({"said": opened(trainer, asked["open"])}))
    return lab


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


def opened(trainer, setting: dict) -> str:
    """What the trainer did with a setting; a callback has no other place to show an error."""
    try:
        trainer.put_to(**setting)
    except Exception as error:
        return f"the trainer cannot open this setting: {type(error).__name__}: {error}"
    said = setting | {"task": TASKS.get(setting["task"], setting["task"])}
    return "in the trainer: " + ", ".join(f"{name} {value}" for name, value in said.items())


def in_words(data: dict, state: dict) -> str:
    """The best of each row by validation, for each rule: what the maps show at a glance."""
    lines = []
    for task in (state["task"], *(other for other in data["tasks"] if other != state["task"])):
        lines.append(f"{data['tasks'][task]['words']}, the best learning rate of each rank, chosen on validation "
                     "(test loss in nats per token)")
        for rule, words in data["rules"].items():
            best = [best_of(data["grid"], task, rank, rule) for rank in data["ranks"]]
            lines.append(f"{words}: " + ", ".join(
                f"rank {run['rank']}: " + ("none" if run["valid"] is None else f"{run['lr']:g} ({run['test']:.3f})")
                for run in best))
    return "\n".join(lines)


def picture(data: dict, state: dict, cells: dict) -> Figure:
    """The maps without a page: test loss, the brighter the better."""
    ranks, rates = data["ranks"], data["rates"]
    fig, parts = new_figure(width=4.4 * len(data["rules"]), height=3.2, columns=len(data["rules"]),
                            xlabel=LABELS["lr"], ylabel=LABELS["rank"])
    fig.suptitle(f"{data['tasks'][state['task']]['words'].capitalize()}, test loss: brighter is better, a frame is a "
                 "row's best by validation")
    for ax, (rule, words) in zip(np.atleast_1d(parts), data["rules"].items()):
        table = np.array([[cells[state["task"], rule, rank, rate]["test"] for rate in rates] for rank in ranks], float)
        image = ax.imshow(-table, cmap="cividis", vmin=-np.nanquantile(table, 0.7), aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(table):
            ax.text(x, y, "✕" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=7,
                    color=readable_on(image.cmap(image.norm(-value))[:3]))
        for y, rank in enumerate(ranks):
            best = best_of(data["grid"], state["task"], rank, rule)
            if best["valid"] is not None:
                ax.add_patch(Rectangle((rates.index(best["lr"]) - 0.46, y - 0.44), 0.92, 0.88, fill=False,
                                       edgecolor=BLACK, linestyle="--", linewidth=1.5))
        ax.set(title=words, xticks=range(len(rates)), yticks=range(len(ranks)), yticklabels=ranks)
        ax.set_xticklabels([f"{rate:g}" for rate in rates], fontsize=7)
        ax.grid(visible=False)
    return fig
