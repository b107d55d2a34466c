"""The figures of training: losses over steps, the learn/forget plane, bars with intervals, points by group.

No pyplot; the caller's title states the finding. Lines differ by marker and dash as well as by colour.
"""
import numpy as np
from matplotlib.figure import Figure

from lora_edu.course.page.show import BLACK, BLUE, COLORS, GREY, LABELS, MARKERS, SKY, look, new_figure


GRAMMAR = "entropy of the grammar: no model can be lower"

def plot_loss_curves(curves: dict, title: str, ylabel: str = "loss", xlabel: str = "step") -> Figure:
    """Lines of (x, y) points: ``{"LoRA": [(step, loss), ...]}``; about ten markers a line, however long it is."""
    fig, ax = new_figure(title=title, xlabel=LABELS.get(xlabel, xlabel), ylabel=LABELS.get(ylabel, ylabel))
    for i, (name, points) in enumerate(curves.items()):
        x, y = zip(*points)
        ax.plot(x, y, label=name, markevery=max(1, len(x) // 10), **look(i))
    ax.legend(frameon=False)
    return fig


def plot_bands(bands: dict, title: str, ylabel: str = "loss", xlabel: str = "step",
               floor: float | None = None) -> Figure:
    """Lines with an interval around each: ``{"LoRA": (x, mean, low, high)}``; `floor`: the least that there is."""
    fig, ax = new_figure(title=title, xlabel=LABELS.get(xlabel, xlabel), ylabel=LABELS.get(ylabel, ylabel))
    for i, (name, (x, mean, low, high)) in enumerate(bands.items()):
        ax.plot(x, mean, label=name, markevery=max(1, len(x) // 10), **look(i))
        ax.fill_between(x, low, high, color=COLORS[i % 7], alpha=0.15, linewidth=0)
    if floor is not None:
        ax.axhline(floor, color=GREY, linestyle=":", linewidth=1.4, label=GRAMMAR)
        ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return fig


def learn_forget_plane(paths: dict, base: tuple[float, float], title: str, floor: float | None = None) -> Figure:
    """What was learned against what was forgotten, one path a method; down is better, right is worse.

    Args:
        paths: ``{"LoRA": [(tales_loss, task_loss), ...]}`` in the order of training, in nats per token.
        base: the same pair before training.
        floor: task loss of a fluent model that ignores its input.
    """
    fig, ax = new_figure(height=4.2, title=title, xlabel=LABELS["tales"] + ": forgetting →",
                         ylabel="← learning: " + LABELS["task"])
    for i, (name, points) in enumerate(paths.items()):
        tales, task = zip(base, *points)
        ax.plot(tales, task, label=name, markevery=range(1, len(tales)), **look(i))
        ax.plot(tales[-1:], task[-1:], color=COLORS[i % 7], marker=MARKERS[i % 7], markersize=11)
    ax.plot(*base, color=BLACK, marker="*", markersize=14, linestyle="none", label="before training")
    if floor is not None:
        ax.axhline(floor, color=GREY, linestyle=":", linewidth=1.2, label="ignores its input")
    ax.legend(frameon=False)
    return fig


def plot_bars(bars: dict, title: str, xlabel: str = "loss", floor: float | None = None) -> Figure:
    """One bar a name with its number, and its interval if it has one: ``{"all-linear": (mean, low, high), "q": 3.2}``,
    first on top.

    ``floor`` is the score of a fluent model that ignores its input.
    """
    note = "" if floor is None else "; dotted: ignores its input"
    fig, ax = new_figure(height=1.3 + 0.42 * len(bars), title=title, xlabel=LABELS.get(xlabel, xlabel) + note)
    names, (mean, low, high) = list(bars), np.array([np.broadcast_to(bar, 3) for bar in bars.values()], dtype=float).T
    ax.barh(names, mean, color=SKY, edgecolor=BLUE, height=0.6)
    sure = low == high                                # a count, or a single run: no whisker of no length
    ax.errorbar(np.where(sure, np.nan, mean), range(len(names)), xerr=(mean - low, high - mean), fmt="none",
                color=BLACK, capsize=3)
    for i, value in enumerate(mean):
        said = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        ax.annotate(said, (high[i], i), xytext=(6, 0), textcoords="offset points", va="center",
                    bbox=dict(facecolor="white", edgecolor="none", pad=1))
    if floor is not None:
        ax.axvline(floor, color=GREY, linestyle=":", linewidth=1.4)
    ax.set_xlim(0, 1.12 * max(high.max(), floor or 0.0))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return fig


def plot_points(groups: dict, title: str, xlabel: str, ylabel: str, texts: bool = True,
                floor: float | None = None) -> Figure:
    """Points by group, ``{"LoRA": [(x, y, "text beside it"), ...]}``, joined in the order given; `floor` as in
    `plot_bands`.
    """
    fig, ax = new_figure(title=title, xlabel=LABELS.get(xlabel, xlabel), ylabel=LABELS.get(ylabel, ylabel))
    for i, (name, points) in enumerate(groups.items()):
        x, y, beside = zip(*points)
        ax.plot(x, y, label=name, **look(i))
        for at, text in zip(zip(x, y), beside if texts else ()):
            ax.annotate(text, at, xytext=(6, -11), textcoords="offset points", fontsize=8, color=COLORS[i % 7])
    ax.margins(0.1)     # room for the texts
    if floor is not None:
        ax.axhline(floor, color=GREY, linestyle=":", linewidth=1.4, label=GRAMMAR)
    ax.legend(frameon=False)
    return fig


def plot_two_losses(alphas, task_loss, tales_loss, title: str, alpha: float | None = None) -> Figure:
    """Two losses over alpha; with ``alpha``, a black marker on each line there."""
    fig, ax = new_figure(title=title, xlabel=LABELS["alpha"], ylabel=LABELS["loss"])
    ax.plot(alphas, task_loss, label="the new task", markevery=max(1, len(alphas) // 10), **look(0))
    ax.plot(alphas, tales_loss, label="the tales", markevery=max(1, len(alphas) // 10), **look(1))
    if alpha is not None:
        here = int(np.abs(np.asarray(alphas) - alpha).argmin())
        ax.axvline(alphas[here], color=GREY, linewidth=1)
        ax.plot([alphas[here]] * 2, [task_loss[here], tales_loss[here]], color=BLACK, marker="o", markersize=9,
                linestyle="none")
    ax.legend(frameon=False)
    return fig
