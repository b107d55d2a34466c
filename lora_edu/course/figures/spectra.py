"""The figures about the spectrum of an update: what is in it, what a rank keeps of it, where it sits.

As in ``curves.py``: one function a picture, no pyplot, and the caller's title states the finding. Read
`plot_what_is_kept`
first: it is the figure that the course's argument rests on.
"""
from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_edu.course.figures.matrices import as_matrix
from lora_edu.course.page.show import (
    BLACK,
    BLUE,
    COLORS,
    GREY,
    LABELS,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    look,
    new_figure,
)

MANY = 7          # more lines than this cannot be told apart
# a log axis of singular values ends at this share of the largest: what lies below adds nothing to the energy
LOWEST = 1e-4
NULL_COLORS = (ORANGE, PURPLE, SKY, BLACK, GREY, "#8C6D31", "#5E3C99")
NULL_DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 1)), (0, (6, 2, 1, 2, 1, 2)), (0, (8, 3)),
               (0, (3, 3)))


def plot_spectra(curves: dict, title: str, edge: float | None = None, log: bool = True) -> Figure:
    """Singular values over their index, largest first: ``{"ΔW": sigma, ...}``, one sequence of falling numbers a line.

    More than seven are drawn as thin grey lines with a median for each length, of the seven most frequent: a median
    over unlike lengths would jump wherever one of them ends. ``edge`` is where the singular values of white noise would
    end. A log axis shows four powers of ten.
    """
    sigmas = {name: _numbers(sigma, f"the spectrum {name!r}") for name, sigma in curves.items()}
    if not sigmas:
        raise ValueError("plot_spectra got no spectrum: give at least one, {name: singular values}.")
    fig, ax = new_figure(title=title, xlabel=LABELS["index"], ylabel=LABELS["sigma"], yscale="log" if log else "linear")
    if len(sigmas) > MANY:
        _crowd(ax, list(sigmas.values()))
    else:
        for i, (name, sigma) in enumerate(sigmas.items()):
            ax.plot(range(1, len(sigma) + 1), sigma, label=name, markevery=max(1, len(sigma) // 20), **look(i))
    if edge is not None:
        ax.axhline(edge, color=BLACK, linestyle=":", linewidth=1.4, label="edge of white noise")
    top = max(sigma.max() for sigma in sigmas.values())
    if log and top > 0:
        ax.set_ylim(bottom=max(ax.get_ylim()[0], LOWEST * top))
    ax.legend(frameon=False)
    return fig


def _crowd(ax, sigmas: list) -> None:
    """All lines thin and grey, and the median of those of one length."""
    for i, sigma in enumerate(sigmas):
        ax.plot(range(1, len(sigma) + 1), sigma, color="#999999", linewidth=0.5, alpha=0.6,
                label="_" if i else f"each of {len(sigmas)} matrices")
    lengths = Counter(map(len, sigmas))
    for i, (length, count) in enumerate(lengths.most_common(MANY)):
        median = np.median([sigma for sigma in sigmas if len(sigma) == length], axis=0)
        said = "their median" if len(lengths) == 1 else f"median of the {count} with {length} values"
        line = look(i) | {"linewidth": 2.2}
        ax.plot(range(1, length + 1), median, label=said, markevery=max(1, length // 20), **line)


def plot_what_is_kept(ranks, energy, loss, task, nulls: dict, title: str) -> Figure:
    """What is left of an update that is cut to rank r: of its energy, of what it improved, of what it can do.

    Args:
        ranks: the ranks kept, rising from 0; on a log axis on which 0 has its place.
        energy: share of the squared Frobenius norm kept.
        loss: share of the improvement in loss kept.
        task: share of the slots right, or None where the task has no slots.
        nulls: ``{"random targets": energy, ...}``, the energy kept of updates that learned something else, or nothing.
        title: the finding.

    Each is one number for each rank, or three such sequences, (mean, low, high), which draw a band. All are shares, 1
    being everything (the axis shows per cent); None or nan is a point that was not measured.
    """
    ranks = rising_ranks(ranks)
    fig, ax = new_figure(width=7.5, height=4.2, title=title, xlabel=LABELS["rank kept"],
                         ylabel=LABELS["kept"] if task is None else LABELS["kept or right"])
    bold = {"energy of ΔW": energy, "improvement in loss": loss, "slots right": task}
    real = [_bold_line(ax, i, ranks, name, given) for i, (name, given) in enumerate(bold.items()) if given is not None]
    thin = [_thin_line(ax, i, ranks, name, given) for i, (name, given) in enumerate(nulls.items())]
    _show_ranks(ax, ranks)
    low, high = ax.get_ylim()
    ax.set(ylim=(min(-3, low), max(103, high)), yticks=range(0, 101, 20))
    _grouped_legend(fig, {"the real update": real, "energy of other updates": thin})
    return fig


def _grouped_legend(fig: Figure, groups: dict) -> None:
    """One legend to the right of the axes, in which each group of lines stands under a bold heading."""
    headings = {heading: Line2D([], [], linestyle="none", label=("\n" if i else "") + heading)
                for i, heading in enumerate(groups)}
    lines = [line for heading, group in groups.items() if group for line in (headings[heading], *group)]
    legend = fig.legend(handles=lines, loc="outside right upper", frameon=False, handlelength=3.2, fontsize=9.5)
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text().strip() in groups else "normal")


def _bold_line(ax, i: int, ranks, name: str, given):
    mean, low, high = 100 * _shares(given, len(ranks), name)
    ax.fill_between(ranks, low, high, color=COLORS[i], alpha=0.2, linewidth=0)
    return ax.plot(ranks, mean, label=name, zorder=3, **look(i) | {"linewidth": 2.6, "markersize": 6.5})[0]


def _thin_line(ax, i: int, ranks, name: str, given):
    mean = 100 * _shares(given, len(ranks), name)[0]
    return ax.plot(ranks, mean, label=name, color=NULL_COLORS[i % 7], linestyle=NULL_DASHES[i % 7], linewidth=1.2,
                   # above: one may lie on a bold line
                   marker=MARKERS[(i + 3) % 7], markersize=4.5, markerfacecolor="white", zorder=4)[0]


def _show_ranks(ax, ranks) -> None:
    """Powers of two stand evenly, and 0 as far before 1 as 1 before 2."""
    ax.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    ax.set_xticks(ranks, labels=[f"{rank:g}" for rank in ranks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(-0.3, 1.25 * ranks[-1])


def plot_shares_of_rank(energy: dict, way: dict, chance: dict, title: str) -> Figure:
    """Models of different widths on one axis: the rank kept as a share of all directions, against the energy (left) and
    against how far the model so cut has come (right).

    Args:
        energy, way, chance: ``{"fable": (shares of the rank, shares kept), ...}``, all from 0 to 1, one line each;
            those of `chance` are drawn thin, beside the energy. A model has one look in both panels.
    """
    fig, axes = new_figure(width=9.5, height=4.2, columns=2, xlabel="rank kept, as a share of all directions")
    fig.suptitle(title)
    looks = {name: look(i) | {"linewidth": 2, "markersize": 5} for i, name in enumerate({**energy, **way})}
    least = min(x for shares, _ in energy.values() for x in shares if x > 0)
    # 0 is drawn as far before the first share as that before its double
    for ax, lines, ylabel in ((axes[0], energy, "energy kept (%)"), (axes[1], way, "way to the whole fine-tune (%)")):
        for name, (shares, values) in lines.items():
            ax.plot([max(x, least / 2) for x in shares], [100 * y for y in values], label=name, **looks[name])
        ax.set_xscale("log", base=2)
        ax.set(ylabel=ylabel, ylim=(-3, 103), yticks=range(0, 101, 20))
        ax.set_xticks([least / 2, *(4.0**-i for i in range(4, -1, -1))],
                      labels=["0", *(f"1/{4**i}" for i in range(4, 0, -1)), "1"])
        ax.set_xticks([], minor=True)
    for i, (name, (shares, values)) in enumerate(chance.items()):
        axes[0].plot([max(x, least / 2) for x in shares], [100 * y for y in values], label=name,
                     color=NULL_COLORS[3 + i], linestyle=NULL_DASHES[i], linewidth=1.3)
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return fig


def plot_density(values, shape: tuple[int, int], std: float, title: str, density) -> Figure:
    """How often each size of singular value occurs, beside the law of white noise and its edge.

    Args:
        values: the singular values of a matrix of shape (out_features, in_features).
        std: standard deviation of the noise's entries; its singular values end at std (sqrt(out) + sqrt(in)).
        density: (x, y) of the Marchenko-Pastur law of such noise; area 1, as the histogram's.
    """
    values = _numbers(values, "the spectrum")
    x, y = (_numbers(part, "the density") for part in density)
    edge = std * sum(side**0.5 for side in shape)
    above = values[values > edge]
    fig, ax = new_figure(title=title, xlabel=LABELS["sigma"], ylabel=LABELS["density"])
    ax.hist(values, bins=min(60, max(10, len(values) // 4)), density=True, color=SKY, edgecolor="white", linewidth=0.5,
            label=f"{len(values)} singular values, {shape[0]} × {shape[1]}")
    ax.plot(x, y, color=VERMILLION, linewidth=2, label="white noise (Marchenko-Pastur)")
    ax.axvline(edge, color=BLACK, linestyle=":", linewidth=1.4, label="edge of white noise")
    if len(above):   # one value in 256 is a bar too low to see: each gets a mark on the axis
        ax.plot(above, np.zeros(len(above)), color=BLUE, marker="|", markersize=9, markeredgewidth=1.2,
                linestyle="none", clip_on=False,
                label=f"{len(above)} beyond the edge")
    ax.legend(frameon=False)
    return fig


def plot_layers(table: dict, title: str, label: str) -> Figure:
    """One number for each matrix of each layer, ``{(layer, "q_proj"): number}``: a heat map with the numbers written
    in.

    Layers go down, matrices across, in the order of their first appearance; a pair that is missing stays white.
    """
    layers, matrices = sorted({layer for layer, _ in table}), list(dict.fromkeys(matrix for _, matrix in table))
    values = np.array([[table.get((layer, matrix), np.nan) for matrix in matrices] for layer in layers], dtype=float)
    if not table or not np.isfinite(list(table.values())).all():
        raise ValueError(f"plot_layers got {len(table)} numbers{' with nan or inf among them' if table else ''}: "
                         'give finite ones, {(0, "q_proj"): 1.5, ...}.')
    fig, ax = new_figure(width=1.9 + 0.75 * max(len(matrices), 4), height=1.3 + 0.36 * len(layers), title=title,
                         xlabel="matrix", ylabel="layer")
    ax.grid(visible=False)
    image = ax.imshow(values, cmap="cividis", aspect="auto", interpolation="nearest")
    fig.colorbar(image, label=LABELS.get(label, label), aspect=10 + 2 * len(layers))
    ax.set_xticks(range(len(matrices)), labels=matrices)
    ax.set_yticks(range(len(layers)), labels=[str(layer) for layer in layers])
    for row, column in np.argwhere(np.isfinite(values)):
        ax.text(column, row, f"{values[row, column]:.3g}", ha="center", va="center", fontsize=9,
                color=readable_on(image.to_rgba(values[row, column])))
    return fig


def readable_on(rgba) -> str:
    """Black or white, whichever contrasts more with the colour (WCAG 2: the two are equal at a luminance of 0.179)."""
    luminance = np.dot(np.asarray(rgba[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
    return "white" if luminance < 0.179 else "black"


def plot_parts(whole, part, title: str, titles=("the whole update", "its low-rank part")) -> Figure:
    """Two matrices of one shape beside each other on one colour scale: white is 0, orange above it, purple below.

    The scale ends where 99.5 % of the whole's entries do (one large entry would pale the rest), which the colour bar's
    arrows say.
    """
    whole, part = as_matrix(whole), as_matrix(part)
    if whole.shape != part.shape:
        raise ValueError(f"plot_parts got matrices of {whole.shape} and {part.shape}: they must have one shape.")
    tall = min(1.5, max(0.4, whole.shape[0] / whole.shape[1]))
    fig, axes = new_figure(width=7.5, height=1.2 + 2.7 * tall, columns=2, xlabel="column (input)")
    fig.set_layout_engine("compressed")
    fig.suptitle(title)
    scale = color_scale(whole)
    for ax, matrix, name in zip(axes, (whole, part), titles):
        ax.grid(visible=False)
        ax.set_title(name, fontsize=10)
        image = ax.imshow(matrix, cmap="PuOr_r", vmin=-scale, vmax=scale, interpolation="nearest")
    axes[0].set_ylabel("row (output)")
    fig.colorbar(image, ax=list(axes), label=LABELS["entry"], extend="both")
    return fig


def color_scale(matrix: np.ndarray) -> float:
    """The size that 99.5 % of the entries stay below, in the matrix's unit; 1 for zeros."""
    return float(np.quantile(np.abs(matrix), 0.995)) or float(np.abs(matrix).max()) or 1.0


def rising_ranks(ranks) -> list:
    ranks = list(ranks)
    if len(ranks) < 2 or ranks[0] != 0 or any(b <= a for a, b in zip(ranks, ranks[1:])):
        raise ValueError(f"the ranks kept are {ranks}: give at least two, rising from 0, for example 0, 1, 2, 4, 8.")
    return ranks


def _shares(given, count: int, name: str) -> np.ndarray:
    """(mean, low, high), each of ``count`` shares; a single sequence is all three."""
    rows = [given] * 3 if all(np.ndim(part) == 0 for part in given) else given
    if len(rows) != 3 or any(np.shape(row) != (count,) for row in rows):
        raise ValueError(f"{name!r} does not fit: give {count} shares, one for each rank, or three such sequences, "
                         "(mean, low, high).")
    values = np.stack([np.asarray(row, dtype=float) for row in rows])
    if np.nanmax(np.abs(values), initial=0) > 2:
        largest = values.flat[np.nanargmax(np.abs(values))]
        raise ValueError(f"{name!r} holds {largest:.3g}: give shares, where 1 is everything, and not per cent.")
    return values


def _numbers(values, what: str) -> np.ndarray:
    """A 1-D float64 array from a tensor, an array or a list; finite and not empty."""
    values = values.detach().cpu().double().numpy() if hasattr(values, "detach") else np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{what} has shape {tuple(values.shape)}"
                         + ("" if np.isfinite(values).all() else " with nan or inf in it")
                         + ": give one sequence of finite numbers.")
    return values
