"""The merge lab: fold an adapter into the weights, in a dtype and at a strength, and see what arrives.

Two of its pictures are of one matrix: which entries' update was rounded away, and how far off the whole update is. In
the third, lines are the losses with the adapter kept apart, dots those with the weights merged. Both are computed in
float32, the merged weights' values cast up, so what differs is the merge's doing and not that of 16-bit arithmetic.
"""
import functools

import ipywidgets
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from torch import nn

from lora_edu.course.page.show import BLACK, LABELS, look, new_figure
from lora_edu.course.page.widgets import picture_with_controls
from lora_edu.lora.factors import lora_layers, some_lora_layers
from lora_edu.lora.inject import share_weights
from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.merge import Rounding
from lora_edu.lora.targets import shorten
from lora_edu.training.loop import Batch, evaluate

CORNER = 48       # rows and columns of the map
SCALES = {"1": 1.0, "1/3": 1 / 3, "1/10": 0.1, "1/30": 1 / 30, "1/100": 0.01}
STRENGTHS = [round(-1 + 0.1 * i, 1) for i in range(31)]
FACTORS = np.geomspace(5e-4, 2, 20)      # of the update, for the lines of the middle picture


def merge_lab(model: nn.Module, name: str, task: Batch, tales: Batch) -> ipywidgets.VBox:
    """Controls for dtype, strength, and a factor that makes the update smaller, above one matrix, its error and two
    losses.

    Args:
        model: a Llama whose LoRA layers were trained (`load_adapter`); it stays as it is, bit for bit.
        name: of the layer to look at, such as "model.layers.3.mlp.down_proj".
        task, tales: a batch of the new task and one of tales; small, since every move measures both: two rows of 100
            tokens will do.

    Raises:
        ValueError: no LoRA layer of that name, or its update is zero or not finite.
    """
    if name not in dict(some_lora_layers(model)):
        raise ValueError(f"{name!r} is no LoRA layer of this model: choose one of "
                         f"{shorten([each for each, _ in lora_layers(model)])}.")
    twins = {dtype: twin_in(model, getattr(torch, dtype)) for dtype in ("float32", "bfloat16", "float16")}
    lines = {dtype: [_fold(twin.get_submodule(name), factor)[0] for factor in FACTORS] for dtype, twin in twins.items()}
    own = lines["float32"][-1].size / FACTORS[-1]
    if own == 0:
        raise ValueError(f"the update of {name!r} is zero, so a merge has nothing to lose: "
                         "load an adapter, or train one, first.")
    apart = functools.cache(lambda strength: losses_at(twins["float32"], strength, (task, tales), merged=False))
    merged = functools.cache(lambda dtype, strength: losses_at(twins[dtype], strength, (task, tales), merged=True))
    picture = _Picture(lines, [apart(strength) for strength in STRENGTHS])

    def update(dtype, strength, scaled):
        effective = round(strength, 1) * SCALES[scaled]
        found, corner = _fold(twins[dtype].get_submodule(name), effective)
        picture.draw(found, corner, effective, merged(dtype, effective))
        return (f"{dtype}, strength {strength:.1f}"
                + (f" scaled down to {scaled}, {effective:.3g} in effect" if scaled != "1" else "")
                + f": ‖ΔW‖/‖W₀‖ = {found.size:.2g} in {name}; as trained it is {own:.2g}, a smaller one is this "
                  "adapter scaled down by us\n"
                + _in_words(found, corner, apart(0.0), apart(effective), merged(dtype, effective)))
    return picture_with_controls(
        picture.fig, update,
        dtype=ipywidgets.ToggleButtons(options=list(twins), value="bfloat16", description="dtype",
                                       style={"button_width": "auto"}),
        strength=ipywidgets.FloatSlider(value=1.0, min=-1.0, max=2.0, step=0.1, description="strength"),
        scaled=ipywidgets.SelectionSlider(options=list(SCALES), value="1", description="scaled down"))


def twin_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model around the same weights, those under LoRA stored in `dtype`; all else, the factors too, in float32
    on the CPU.
    """
    twin = share_weights(model).cpu().float().eval()
    for _, layer in lora_layers(twin):
        layer.merged_weight = None                          # the reader's model may be merged; the twin starts apart
        layer.weight.data = layer.weight.data.to(dtype)
    return twin


def _fold(layer: LoRALinear, strength: float) -> tuple[Rounding, np.ndarray]:
    """`strength` times the trained update, folded: what became of it, and |arrived - ΔW| / |ΔW| in the corner (nan:
    rounded away).
    """
    layer.scaling = strength * layer.alpha / layer.rank
    folded, delta = layer.fold()
    meant, came = (t[:CORNER, :CORNER].double() for t in (delta, folded.double() - layer.weight.double()))
    errors = ((came - meant) / meant).abs().nan_to_num(0.0).masked_fill((came == 0) & (meant != 0), torch.nan)
    return Rounding.of(layer.weight, delta, folded), errors.numpy()


def losses_at(twin: nn.Module, strength: float, batches: tuple[Batch, ...], merged: bool) -> tuple[float, ...]:
    """The mean loss on each batch, nats per token, at a strength of the adapter: merged (the values cast up to
    float32), or apart. The twin is apart afterwards.
    """
    for _, layer in lora_layers(twin):
        layer.scaling = strength * layer.alpha / layer.rank
        layer.merged_weight = layer.folded_weight().float() if merged else None
    losses = tuple(evaluate(twin, [batch]) for batch in batches)
    for _, layer in lora_layers(twin):
        layer.merged_weight = None
    return losses


def _in_words(found: Rounding, corner: np.ndarray, base: tuple, apart: tuple, merged: tuple) -> str:
    lost = np.isnan(corner)
    return "\n".join([
        f"rounded away, W₀'s value stayed: {found.lost:,} of {found.entries:,} entries ({found.rounded_away:.2%}); in "
        f"the corner shown {lost.sum():,} of {corner.size:,}, the others off by "
        f"{0 if lost.all() else np.median(corner[~lost]):.2g} of theirs (median)",
        f"the update that arrived is off by {found.error:.2g} of its size, over the whole matrix",
        *(f"loss on {what}: {b:.4f} nats per token without the adapter, {a:.4f} with it kept apart, {m:.4f} merged "
          f"({m - a:+.4f} by the merge)" for what, b, a, m in zip(("the new task", "the tales"), base, apart, merged))])


class _Picture:
    """The figure and the artists whose data a redraw sets."""

    def __init__(self, lines: dict[str, list[Rounding]], losses: list[tuple[float, float]]):
        self.fig, (corner, middle, right) = new_figure(width=9.4, height=3.4, columns=3)
        self.fig.set_dpi(90)
        # reads without colour
        shades = ListedColormap(colormaps["Blues"](np.linspace(0, 0.65, 64))).with_extremes(bad=BLACK)
        self.image = corner.imshow(np.zeros((CORNER, CORNER)), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        corner.grid(visible=False)
        corner.set(xlabel="column (input)", ylabel="row (output)", title="error of each entry\n(black: rounded away)")
        self.fig.colorbar(self.image, ax=corner, shrink=0.8, ticks=(0, 0.5, 1))
        for i, (dtype, found) in enumerate(lines.items()):
            middle.loglog([each.size for each in found], [each.error for each in found], label=dtype, markevery=4,
                          **look(i))
        middle.set(ylim=(1e-9, 1e2), xlabel=r"$\|\Delta W\| / \|W_0\|$ (no unit)", title="error of the whole update",
                   ylabel=r"$\|$ arrived $-\,\Delta W\| / \|\Delta W\|$ (no unit)")
        middle.minorticks_off()      # ticks are most of what a redraw costs
        for i, (what, values) in enumerate(zip(("the new task", "the tales"), zip(*losses))):
            right.plot(STRENGTHS, values, label=what, markevery=5, **look(i))
        right.set(xlabel="strength in effect", ylabel=LABELS["loss"], title="line: apart, dot: merged")
        self.line = right.axvline(0, color=BLACK, linewidth=0.8)
        dot = dict(color=BLACK, marker="o", markersize=8, linestyle="none", zorder=4)
        self.error, self.measured = middle.plot([], [], **dot)[0], right.plot([], [], **dot)[0]
        for ax, where in ((middle, "upper right"), (right, "upper center")):
            ax.legend(frameon=False, fontsize=8, loc=where)

    def draw(self, found: Rounding, corner: np.ndarray, strength: float, losses: tuple[float, float]) -> None:
        self.image.set(data=corner, extent=(-0.5, corner.shape[1] - 0.5, corner.shape[0] - 0.5, -0.5))
        self.error.set_data([found.size], [found.error if found.delta else np.nan])
        self.measured.set_data([strength] * 2, losses)
        self.line.set_xdata([strength] * 2)
