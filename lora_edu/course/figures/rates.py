"""The figures about rank, learning rate and alpha: log axes whose ticks are plain numbers.

As in ``curves.py``, which draws the lines: no pyplot, and the caller's title states the finding.
"""
import math

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from lora_edu.course.figures.curves import plot_bands, plot_loss_curves
from lora_edu.course.page.show import BLACK, COLORS, LABELS, MARKERS, new_figure


def plot_rank_curves(curves: dict, title: str, planted=(), ylabel: str = "loss", floor: float | None = None) -> Figure:
    """Something over the rank, with an interval around each line: ``{"one task": (ranks, mean, low, high)}``; `floor`
    as in `plot_bands`.

    ``planted`` are ranks known beforehand: the i-th gets a dotted line and "k = ..." in the colour of the i-th curve.
    """
    fig = plot_bands(curves, title, ylabel=ylabel, xlabel="rank", floor=floor)
    ax = fig.axes[0]
    _plain_log(ax, [rank for ranks, *_ in curves.values() for rank in ranks])
    for i, k in enumerate(planted):
        ax.axvline(k, color=COLORS[i % 7], linestyle=":", linewidth=1.6)
        ax.annotate(f"k = {k:g}", (k, 1.01), xycoords=("data", "axes fraction"), ha="center", color=COLORS[i % 7],
                    fontsize=9)
    ax.set_title(title, pad=20 if planted else None)
    return fig


def plot_rates(curves: dict, title: str, ylabel: str = "loss") -> Figure:
    """Loss over learning rate, one line a rank, ``{rank: [(lr, loss), ...]}``, and a ring around the lowest point of
    each.

    The larger the rank, the lighter its line. A loss that is None or nan is left out.
    """
    fig, ax = new_figure(title=title, xlabel=LABELS["lr"], ylabel=LABELS.get(ylabel, ylabel))
    shades = colormaps["viridis"]([0.85 * i / max(1, len(curves) - 1) for i in range(len(curves))])
    for i, (rank, points) in enumerate(sorted(curves.items())):
        known = sorted((lr, loss) for lr, loss in points if loss is not None and math.isfinite(loss))
        if not known:
            raise ValueError(f"rank {rank} has no finite loss at any of its {len(points)} learning rates: "
                             "leave it out and say so.")
        ax.plot(*zip(*known), label=f"rank {rank}", color=shades[i], marker=MARKERS[i % 7], markersize=5, linewidth=1.6)
        ax.plot(*min(known, key=lambda point: point[1]), marker="o", markersize=12, markerfacecolor="none",
                markeredgecolor=BLACK,
                linestyle="none", label="best rate of its rank" if i == len(curves) - 1 else "_")
    _plain_log(ax, [lr for points in curves.values() for lr, _ in points])
    ax.legend(frameon=False, fontsize=8.5)
    return fig


def plot_update_sizes(curves: dict, title: str, ylabel: str = "change") -> Figure:
    """Size of the update over the rank, one line an alpha rule, both axes in powers: ``{"alpha = 2r": [(rank, size),
    ...]}``.
    """
    fig = plot_loss_curves(curves, title, ylabel=ylabel, xlabel="rank")
    ax = fig.axes[0]
    _plain_log(ax, [rank for points in curves.values() for rank, _ in points])
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    return fig


def _plain_log(ax, values) -> None:
    """A horizontal axis in powers of two whose ticks are the values that occur, written out; fewer of them if they
    are many.
    """
    values = sorted(set(values))
    ax.set_xscale("log", base=2)
    shown = values[::math.ceil(len(values) / 9)]
    ax.set_xticks(shown, labels=[f"{value:g}" for value in shown])
    ax.xaxis.set_minor_locator(NullLocator())
