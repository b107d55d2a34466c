"""The spectrum explorer: one update, one layer, one matrix, one rank, and what is left of it.

The left picture is the spectrum, the middle one a corner of ΔW, the right one the same corner of its best rank-r part;
the text gives the numbers, those of the whole model among them. A spectrum alone would tempt to read energy as
learning: the loss beside it is the guard. Everything comes from stored factors, so nothing is decomposed while a slider
moves.
"""
import functools
import re

import ipywidgets
import numpy as np
import torch
from matplotlib.ticker import NullLocator

from lora_edu.course.figures.spectra import color_scale, rising_ranks
from lora_edu.course.page.show import BLACK, BLUE, LABELS, VERMILLION, new_figure
from lora_edu.course.page.widgets import picture_with_controls
from lora_edu.measure.spectra import Spectrum, gaussian_like, spectrum

# rows and columns shown: every entry gets a pixel, where a whole matrix would have to be thinned out or averaged
CORNER = 128
# the spectrum's axis ends at this share of the largest value: what lies below has under a millionth of its energy
DECADES = 1e-3


def spectrum_explorer(factors: dict, ranks, losses: dict, measured_on: dict, rank: int = 8) -> ipywidgets.VBox:
    """Controls for update, layer, matrix and rank kept, above the spectrum, ΔW, its rank-r part, and what they amount
    to.

    Args:
        factors: ``{"restaurants": {"model.layers.0.self_attn.q_proj": (U, S, Vh), ...}, "random targets": ...}``:
            updates of one model, each with the same matrices; U (out, k), S (k,) in falling order, Vh (k, in), k the
            smaller side.
        ranks: the ranks to choose from, rising from 0 to at least the largest k.
        losses: ``{"restaurants": [loss, ...], ...}``, nats per token of the whole model with every matrix cut to each
            of the ranks.
        measured_on: ``{"restaurants": "restaurants", ...}``, the data those losses were measured on.
        rank: where the slider starts.

    The heat maps show the top-left 128 x 128 entries, one pixel or more each, on one scale that is symmetric about 0.
    The spectrum's axes are the same for all matrices; white noise of the same median, and the edge at which that ends,
    are drawn in.

    Raises:
        ValueError: the updates, ranks, losses and names do not fit together; the sentence says which.
    """
    ranks = rising_ranks(ranks)
    names = _check_factors(factors, ranks)
    _check_losses(list(factors), ranks, losses, measured_on)
    energies = {what: _energy_of_all(parts, ranks) for what, parts in factors.items()}
    picture = _Picture(max(S[0].item() for parts in factors.values() for _, S, _ in parts.values()) or 1.0, ranks[-1])

    def update(what, layer, matrix, rank):
        U, S, Vh = (part.detach().cpu() for part in factors[what][names[layer, matrix]])
        found, at = Spectrum(S, (len(U), Vh.shape[1])), ranks.index(rank)
        picture.draw(U, Vh, found, rank)
        energy = found.energy_kept()[:rank + 1][-1].item()
        return "\n".join([f"{what}, layer {layer}, {matrix}: " + _this_matrix(found, rank),
                          f"energy kept: {energy:.1%} of this matrix, "
                          f"{energies[what][at]:.1%} of all {len(names)} together",
                          f"loss on {measured_on[what]}, " + _this_model(losses[what], at, rank)])

    layers, matrices = (list(dict.fromkeys(part)) for part in zip(*names))
    # buttons: in JupyterLab an arrow key on a Dropdown moves to the next cell, and the focus is gone
    return picture_with_controls(
        picture.fig, update,
        what=ipywidgets.ToggleButtons(options=list(factors), description="update", style={"button_width": "auto"}),
        matrix=ipywidgets.ToggleButtons(options=matrices, description="matrix", style={"button_width": "auto"}),
        layer=ipywidgets.SelectionSlider(options=layers, value=layers[0], description="layer"),
        rank=ipywidgets.SelectionSlider(options=ranks, value=min(ranks, key=lambda r: abs(r - rank)),
                                        description="rank kept"))


class _Picture:
    """The figure and the artists whose data a redraw sets."""

    def __init__(self, largest: float, last: int):
        self.fig, (left, *maps) = new_figure(width=9.2, height=3.1, columns=3)
        self.fig.set_dpi(90)
        self.fig.set_layout_engine("compressed")
        left.set(xscale="log", yscale="log", xlim=(0.8, 1.3 * last), ylim=(DECADES * largest, 1.5 * largest),
                 box_aspect=1,
                 xlabel=LABELS["index"], ylabel=LABELS["sigma"], title="spectrum")
        _plain_ticks(left, last)
        dots = dict(linestyle="none", marker="o", markersize=4)
        self.gaussian, = left.plot([], [], color=VERMILLION, linestyle="--", linewidth=1.4,
                                   label="white noise, same median")
        self.edge = left.axhline(largest, color=BLACK, linestyle=":", linewidth=1.4, label="its edge")
        self.dropped, = left.plot([], [], **dots, color="#9CC3DC", markerfacecolor="white", label="dropped")
        self.kept, = left.plot([], [], **dots, color=BLUE, label="kept")
        left.legend(frameon=False, loc="lower left", fontsize=8)
        self.maps, self.images = maps, [_empty_map(ax) for ax in maps]
        maps[0].set(ylabel="row (output)", yticks=(0, CORNER - 1))
        self.bar = self.fig.colorbar(self.images[0], ax=maps, label=LABELS["entry"], extend="both")
        # the layout is computed once: with the widest text there may be
        self.bar.set_ticks([-1, 0, 1], labels=["-0.00000"] * 3)

    def draw(self, U, Vh, found: Spectrum, rank: int) -> None:
        """Show this update at this rank."""
        sigma, edge = found.values.double().numpy(), found.noise_edge().item()
        index = np.arange(1, len(sigma) + 1)
        self.kept.set_data(index[:rank], sigma[:rank])
        self.dropped.set_data(index[rank:], sigma[rank:])
        self.gaussian.set_data(index, _noise_values(found.shape) * np.median(sigma))
        self.edge.set_ydata([edge, edge])
        corners = [_corner(U, found.values, Vh, keep) for keep in (len(sigma), rank)]
        scale, (height, width) = color_scale(corners[0]), corners[0].shape
        where = "" if (height, width) == found.shape else f", top-left {height} × {width}"
        for ax, image, corner, name in zip(self.maps, self.images, corners, ("ΔW" + where, f"its rank-{rank} part")):
            image.set(data=corner, clim=(-scale, scale), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            ax.set(title=name, xticks=(0, width - 1), yticks=(0, height - 1) if ax is self.maps[0] else ())
        self.bar.set_ticks([-scale, 0, scale], labels=[f"{-scale:.2g}", "0", f"{scale:.2g}"])


def _plain_ticks(ax, last: int) -> None:
    """Few ticks, and numbers in place of powers: on log axes they are most of what a redraw costs."""
    ax.set_xticks([4**i for i in range(9) if 4**i <= last])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def _empty_map(ax):
    ax.grid(visible=False)
    ax.set(xlabel="column (input)", title="ΔW", xticks=(0, CORNER - 1), yticks=())
    return ax.imshow(np.zeros((CORNER, CORNER)), cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")


def _corner(U, S, Vh, keep: int) -> np.ndarray:
    """The top-left entries of the best rank-``keep`` part; no other entry of it is computed."""
    return ((U[:CORNER, :keep] * S[:keep]) @ Vh[:keep, :CORNER]).double().numpy()


@functools.cache
def _noise_values(shape: tuple[int, int]) -> np.ndarray:
    """Singular values of a Gaussian matrix whose median singular value is 1, once for each shape."""
    values = spectrum(gaussian_like(torch.ones(shape))).values.numpy()
    return values / np.median(values)


def _energy_of_all(parts: dict, ranks: list) -> list[float]:
    """Share of the squared change of all matrices together, for each rank."""
    squares = [S.detach().cpu().double().square() for _, S, _ in parts.values()]
    total = sum(s.sum().item() for s in squares)
    return [sum(s[:rank].sum().item() for s in squares) / (total or 1.0) for rank in ranks]


def _this_matrix(found: Spectrum, rank: int) -> str:
    (out, into), kept = found.shape, min(rank, len(found.values))
    count = kept * (out + into)
    return (f"{out} × {into}, rank {kept} of {len(found.values)}: {count:,} numbers in two factors, {out * into:,} in "
            f"the matrix ({count / (out * into):.1%}); singular values above the edge of white noise: "
            f"{found.above_edge().item()}")


def _this_model(losses, at: int, rank: int) -> str:
    """The loss in words.

    There may be no improvement to have a share of: a null learns something else, and a cut may do harm.
    """
    base, now, whole = losses[0], losses[at], losses[-1]
    said = f"every matrix cut to rank {rank}: {now:.2f} nats per token (base {base:.2f}, whole update {whole:.2f})"
    if at == 0:
        return said + ", the base itself"
    if now > base:
        return said + f", {now - base:.2f} worse than the base"
    if whole >= base:
        return said + f", {base - now:.2f} better than the base, though the whole update is no better"
    return said + f", {(base - now) / (base - whole):.0%} of the improvement"


def _check_factors(factors: dict, ranks: list) -> dict[tuple[int, str], str]:
    """``{(layer, matrix): name}`` of the matrices, by rising layer; a ValueError where the updates do not fit
    together.
    """
    if not factors or not all(factors.values()):
        raise ValueError('spectrum_explorer needs at least one update with at least one matrix: {"restaurants": {name: '
                         '(U, S, Vh), ...}}.')
    first, *others = factors
    for what in others:
        if odd := sorted(factors[first].keys() ^ factors[what].keys()):
            raise ValueError(f"{odd[0]!r} is in only one of {first!r} and {what!r}: "
                             "every update needs the same matrices.")
    for what, parts in factors.items():
        for name, (U, S, Vh) in parts.items():
            shape = (len(factors[first][name][0]), factors[first][name][2].shape[1])
            if S.ndim != 1 or len(S) != min(shape) or U.shape != (shape[0], len(S)) or Vh.shape != (len(S), shape[1]):
                raise ValueError(f"{name!r} of {what!r} has factors {tuple(U.shape)}, {tuple(S.shape)}, "
                                 f"{tuple(Vh.shape)}: they should be {(shape[0], min(shape))}, {(min(shape),)}, "
                                 f"{(min(shape), shape[1])}, as torch.linalg.svd(delta, "
                                 "full_matrices=False) gives them.")
            if len(S) > ranks[-1]:
                raise ValueError(f"the ranks end at {ranks[-1]}, and {name!r} has {len(S)} singular values: let them "
                                 f"end at {len(S)} or above, so that the last loss is the whole update's.")
    return _places(list(factors[first]))


def _places(names: list[str]) -> dict[tuple[int, str], str]:
    """Layer and matrix of each name, which must form a full table: the controls offer every pair."""
    places = {}
    for name in names:
        found = re.search(r"(?:^|\.)(\d+)\.(?:.*\.)?([^.]+)$", name)
        if not found:
            raise ValueError(f"{name!r} does not say its layer: names must look like "
                             "'model.layers.0.self_attn.q_proj'.")
        place = int(found[1]), found[2]
        if place in places:
            raise ValueError(f"{places[place]!r} and {name!r} are both {place[1]} of layer {place[0]}: "
                             "leave one of them out.")
        places[place] = name
    layers, matrices = sorted({layer for layer, _ in places}), list(dict.fromkeys(matrix for _, matrix in places))
    missing = [f"{matrix} in layer {layer}" for layer in layers for matrix in matrices if (layer, matrix) not in places]
    if missing:
        raise ValueError(f"there is no {missing[0]}: every layer needs the same matrices, here {', '.join(matrices)}.")
    return {(layer, matrix): places[layer, matrix] for layer in layers for matrix in matrices}


def _check_losses(whats: list[str], ranks: list, losses: dict, measured_on: dict) -> None:
    for what in whats:
        if what not in losses or what not in measured_on:
            raise ValueError(f"{'losses' if what not in losses else 'measured_on'} has no entry for {what!r}: give one "
                             f"for each of {', '.join(whats)}.")
        if len(losses[what]) != len(ranks) or not np.isfinite(np.asarray(losses[what], dtype=float)).all():
            raise ValueError(f"losses[{what!r}] has {len(losses[what])} numbers: give {len(ranks)} finite ones, one "
                             f"for each of the ranks {', '.join(map(str, ranks))}.")
