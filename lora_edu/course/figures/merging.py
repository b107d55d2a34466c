"""The figures of notebook 06: what each way of adapting costs in time, and where each one ends on the learn/forget
plane.
"""
from itertools import product

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from lora_edu.course.figures.curves import plot_loss_curves
from lora_edu.course.page.show import BLACK, BLUE, COLORS, GREY, LABELS, MARKERS, VERMILLION, new_figure
from lora_edu.measure.timing import Ratio

# Hu et al. (2021), table 1, GPT-2 medium on one RTX 8000: time over that of the merged model, by batch × length,
# (AdapterL, AdapterH)
PAPER = {"32×512": (1.022, 1.030), "16×256": (1.050, 1.084), "1×128": (1.207, 1.303)}
TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10)
DIRECTIONS = ((1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1))


def plot_latency(times: dict, title: str) -> Figure:
    """Time over the base's, one panel a shape and one row a variant, and the paper's own ratios in the last panel,
    hollow.

    Args:
        times: ``{"1×16": {"LoRA": Ratio, ...}, ...}``, the same variants for each shape: a `Ratio`, or value and
            ends of its interval; None, or a `Ratio` that says so, is "too noisy" and is drawn as that.
    """
    times = {shape: {name: _clear(at) for name, at in found.items()} for shape, found in times.items()}
    rows = list(next(iter(times.values())))
    for shape, found in times.items():
        if list(found) != rows:
            raise ValueError(f"{shape} has the variants {', '.join(found)}: give {', '.join(rows)}, and None where a "
                             "time is too noisy.")
    fig, panels = new_figure(width=2.3 + 1.6 * (len(times) + 1), height=1.2 + 0.34 * len(rows), columns=len(times) + 1)
    fig.suptitle(title)
    fig.supxlabel("time, as a multiple of the base's (log scale, no unit)", fontsize=9)
    shown = [1.0, *sum(PAPER.values(), ())] + [end for found in times.values() for at in found.values() if at
                                               for end in at]
    ticks = [tick for tick in TICKS if min(shown) / 1.1 < tick < max(shown) * 1.1]
    for ax, (shape, found) in zip(panels, times.items()):
        ax.set_title(f"batch × length\n{shape}", fontsize=9)
        for y, at in enumerate(found.values()):
            _interval(ax, y, at)
    _paper(panels[-1], rows)
    for ax in panels:
        ax.axvline(1, color=BLACK, linewidth=0.9, linestyle=":")
        ax.set(xscale="log", xlim=(min(shown) / 1.08, max(shown) * 1.08), ylim=(len(rows) - 0.5, -0.5))
        ax.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks], fontsize=8)
        ax.set_yticks(range(len(rows)), labels=rows if ax is panels[0] else [], fontsize=9)
        ax.minorticks_off()
    return fig


def _clear(at: Ratio | tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    return (None if at.noisy() else (at.value, at.low, at.high)) if isinstance(at, Ratio) else at


def _interval(ax, y: int, at: tuple[float, float, float] | None) -> None:
    if at is None:
        ax.axhspan(y - 0.32, y + 0.32, color="#dddddd", linewidth=0)
        ax.annotate("too noisy", (0.5, y), xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=8,
                    color=GREY)
        return
    ax.plot(at[1:], [y, y], color=BLUE, linewidth=2)
    ax.plot(at[:1], [y], color=BLUE, marker="o", markersize=5)


def _paper(ax, rows: list[str]) -> None:
    """Its AdapterL and AdapterH, in the rows of the two kinds of adapter."""
    ax.set_title("Hu et al., table 1\n(one RTX 8000)", fontsize=9)
    for marker, (shape, ratios) in zip("sD^", PAPER.items()):
        known = {row: ratio for row, ratio in zip(("adapters (one a block)", "adapters (two a block)"), ratios)
                 if row in rows}
        ax.plot(list(known.values()), [rows.index(row) for row in known], color=VERMILLION, marker=marker,
                markerfacecolor="none",
                linestyle="none", label=shape)
    ax.legend(frameon=False, fontsize=7, loc="upper right", handletextpad=0.1)


def plot_methods_plane(points: dict, base: tuple[float, float], title: str, floor: float | None = None,
                       floor_is: str = "ignores its input") -> Figure:
    """Where each method ends: what it learned (down is better, log scale) against what it forgot (right is worse).

    Args:
        points: ``{"LoRA": [(tales_loss, task_loss), ...]}``, one pair a seed, nats per token: drawn as their mean and a
            cross that reaches from the smallest to the largest on both axes.
        base: the same pair before training.
        floor: task loss of a fluent model that ignores its input, or of what `floor_is` says.
    """
    fig, ax = new_figure(width=7.4, height=4.6, title=title, xlabel=LABELS["tales"] + ": forgetting →",
                         ylabel="← learning: " + LABELS["task"], yscale="log")
    ax.plot(*base, color=BLACK, marker="*", markersize=14, linestyle="none")
    means = {"before training": base}
    for i, (name, seeds) in enumerate(points.items()):
        tales, task = zip(*seeds)
        x, y = means[name] = sum(tales) / len(tales), sum(task) / len(task)
        ax.plot([min(tales), max(tales)], [y, y], [x, x], [min(task), max(task)], color=COLORS[i % 7], linewidth=1.4)
        ax.plot([x], [y], color=COLORS[i % 7], marker=MARKERS[i % 7], markersize=8, linestyle="none", label=name,
                markerfacecolor=COLORS[i] if i < 7 else "white")      # the eighth method is not the first again
    if floor is not None:
        ax.axhline(floor, color=GREY, linestyle=":", linewidth=1.2)
        ax.text(0.01, floor, floor_is, transform=ax.get_yaxis_transform(), ha="left", va="bottom",
                color=GREY, fontsize=8)
    ax.margins(0.12)
    ax.minorticks_off()
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"))
    _name(ax, means)
    return fig


def plot_gain_kept(curves: dict, marks: dict, title: str) -> Figure:
    """What of an adapter's gain a merge leaves, over the size of its update (log scale): ``{"bfloat16": [(size, share),
    ...]}``; `marks` are sizes of updates that somebody trained, dotted, by name.
    """
    fig = plot_loss_curves(curves, title, ylabel="share of the gain kept (no unit)", xlabel="‖ΔW‖ / ‖W₀‖, log scale")
    ax = fig.axes[0]
    ax.set(xscale="log", ylim=(-0.05, 1.1))
    for name, size in marks.items():
        ax.axvline(size, color=GREY, linestyle=":", linewidth=1.2)
        ax.annotate(name, (size, 0.02), xytext=(2, 0), textcoords="offset points", rotation=90, fontsize=8,
                    color=BLACK, va="bottom")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.2, 0))
    return fig


def _name(ax, at: dict) -> None:
    """Write each name at the nearest place that covers nothing and is not beside another point; a thin line leads to
    a distant one.
    """
    ax.figure.draw_without_rendering()
    taken = [artist.get_window_extent() for artist in (*ax.lines, *ax.texts)]
    near = {name: Bbox.from_bounds(*ax.transData.transform(point) - 18, 36, 36) for name, point in at.items()}
    for name, point in at.items():
        full = taken + [box for other, box in near.items() if other != name]
        for away, (dx, dy) in product((11, 20, 32, 46), DIRECTIONS):
            spot = dict(xy=point, xytext=(away * dx, away * dy), textcoords="offset points")
            text = ax.annotate(name, va="center", ha={1: "left", 0: "center", -1: "right"}[round(dx)], fontsize=9,
                               **spot)
            box = text.get_window_extent()
            if not box.count_overlaps(full) and ax.bbox.fully_containsx(box.x0) and ax.bbox.fully_containsx(box.x1):
                break
            text.remove()
        taken.append(box)
        if away > 12:
            ax.annotate("", arrowprops=dict(arrowstyle="-", color=GREY, linewidth=0.6), **spot)
