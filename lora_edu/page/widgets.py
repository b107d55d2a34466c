"""Sliders that answer one question: controls, one picture, one text.

The figure is built once; a control's callback changes the data of its lines, and the redrawn PNG goes into an Image
widget. That is all the machinery: no ``Output``, no ``interact``, no pyplot (each fails on one of JupyterLab, Colab
and nbval), and only what ipywidgets 7.7 (Colab) and 8 share.
"""
import threading
from html import escape

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from torch import nn

from .plots import BLUE, GREY, LABELS, new_figure, plot_picture_ranks, plot_two_losses, png

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def picture_with_controls(fig: Figure, update, **controls) -> ipywidgets.VBox:
    """Put controls above a figure and a text; every change of a control redraws both.

    Args:
        fig: drawn once; its layout is computed here and then kept, which saves time in every redraw.
        update: ``update(name=value, ...)`` changes the figure's artists and returns the text, which says in words and
            numbers what the picture shows. An exception becomes the text: a callback has no other place to show it.
        controls: the widgets, by the names that ``update`` takes.

    Returns:
        A VBox of [box of the controls, Image, HTML].
    """
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    width = f"{round(fig.get_figwidth() * fig.dpi)}px"     # its own size: stretched over the page it would push the text out of sight
    image, text = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width=width, max_width="100%")), ipywidgets.HTML()
    one_at_a_time = threading.Lock()   # JupyterLab may run two controls' callbacks in two threads of its own

    def redraw(change=None):
        with one_at_a_time:
            try:
                said = update(**{name: control.value for name, control in controls.items()})
                image.value = png(fig)
            except Exception as error:
                said = f"This setting cannot be drawn: {type(error).__name__}: {error} (The picture is of the setting before.)"
            text.value = f'<div role="status" style="white-space: pre-wrap; line-height: 1.5">{escape(said)}</div>'

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    return ipywidgets.VBox([row, image, text])


def alpha_dial(alphas, task_loss, tales_loss, texts, title: str = "One dial, two losses", alpha: float | None = None) -> ipywidgets.VBox:
    """A slider over the strength of an adapter: the text the model writes there, and the two losses with a marker.

    Args:
        alphas: evenly spaced settings, in rising order, for example 0, 0.05, ..., 1.
        task_loss, tales_loss: one loss for each setting, in nats per token.
        texts: one text for each setting, or a function ``texts(alpha) -> str``.
        alpha: where the dial starts; the largest setting if it is not given.

    Raises:
        ValueError: if the lengths differ, or ``alphas`` is not a rising, evenly spaced list of at least two settings.
    """
    alphas = np.asarray(alphas, dtype=float)
    lengths = {len(alphas), len(task_loss), len(tales_loss), len(alphas) if callable(texts) else len(texts)}
    if len(lengths) > 1 or len(alphas) < 2 or not np.allclose(np.diff(alphas), alphas[1] - alphas[0]) or alphas[1] <= alphas[0]:
        raise ValueError(f"alpha_dial got {len(alphas)} alphas, {len(task_loss)} and {len(tales_loss)} losses"
                         + ("" if callable(texts) else f" and {len(texts)} texts") +
                         ": give at least two evenly spaced rising alphas, and as many of each other.")
    start = alphas[-1] if alpha is None else alpha
    fig = plot_two_losses(alphas, task_loss, tales_loss, title, alpha=start)
    line, markers = (artist for artist in fig.axes[0].lines if artist.get_gid() == "here")

    def update(alpha):
        i = int(np.abs(alphas - alpha).argmin())
        line.set_xdata([alphas[i]] * 2)
        markers.set_data([alphas[i]] * 2, [task_loss[i], tales_loss[i]])
        written = texts(float(alphas[i])) if callable(texts) else texts[i]
        return f"strength {alphas[i]:.2f}: new task {task_loss[i]:.2f}, tales {tales_loss[i]:.2f} nats per token\n{written}"

    dial = ipywidgets.FloatSlider(value=float(start), min=float(alphas[0]), max=float(alphas[-1]),
                                  step=float(round(alphas[1] - alphas[0], 9)), description="strength")
    return picture_with_controls(fig, update, alpha=dial)


def rank_picture(image, rank: int = 8, title: str = "Few numbers make a recognisable picture") -> ipywidgets.VBox:
    """A slider over the rank of a compressed grey picture, (height, width), drawn beside the original."""
    pixels = np.asarray(image, dtype=float)
    fig = plot_picture_ranks(pixels, ranks=(rank,), title=title, width=3.1)
    U, S, Vh = np.linalg.svd(pixels, full_matrices=False)
    part, full = fig.axes[1], np.linalg.norm(pixels)

    def update(rank):
        part.images[0].set_data(U[:, :rank] * S[:rank] @ Vh[:rank])
        count = rank * sum(pixels.shape)
        part.set_title(f"rank {rank}\n{count:,} numbers", fontsize=10)
        error = np.linalg.norm(S[rank:]) / full
        return (f"rank {rank}: {rank} × ({pixels.shape[0]} + {pixels.shape[1]}) = {count:,} numbers in place of {pixels.size:,} "
                f"({count / pixels.size:.0%}); error {error:.1%} of the picture's size (Frobenius norm)")

    return picture_with_controls(fig, update, rank=ipywidgets.IntSlider(value=rank, min=1, max=len(S), description="rank r"))


def target_sizes(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """The linear layers LoRA may adapt, by name ending: ``{"q_proj": [(out, in), ...]}``, in the order of ``TARGETS``."""
    found = {name: [] for name in TARGETS}
    for name, module in model.named_modules():
        ending = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and ending in found:
            found[ending].append((module.out_features, module.in_features))
    if not any(found.values()):
        raise ValueError(f"target_picker found no nn.Linear named {', '.join(TARGETS)} in this {type(model).__name__}: "
                         "give a Llama-like model before apply_lora wraps its layers.")
    return {name: sizes for name, sizes in found.items() if sizes}


def target_picker(model: nn.Module, rank: int = 8, chosen=("q_proj", "v_proj")) -> ipywidgets.VBox:
    """Tick the layers that get an adapter and choose its rank: what would be trained, counted from the layers' sizes."""
    sizes = target_sizes(model)
    frozen = sum(p.numel() for p in model.parameters())
    most = min(64, *(min(size) for group in sizes.values() for size in group))
    sides = {name: sum(out + into for out, into in group) for name, group in sizes.items()}   # numbers at rank 1
    fig, ax = new_figure(height=3.2, title="What each kind of layer costs", xlabel=LABELS["parameters"])
    bars = ax.barh(list(sizes), [rank * side for side in sides.values()], height=0.6)
    ax.set_xlim(0, 1.02 * most * max(sides.values()))   # fixed, so that bars grow with the rank
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)

    def update(rank, **ticked):
        for name, bar in zip(sizes, bars):
            bar.set_width(rank * sides[name])
            bar.set(facecolor=BLUE if ticked[name] else "white", edgecolor=BLUE if ticked[name] else GREY,
                    linestyle="-" if ticked[name] else "--")
        count = rank * sum(side for name, side in sides.items() if ticked[name])
        names = ", ".join(name for name in sizes if ticked[name]) or "nothing"
        return (f"rank {rank} on {names}: {count:,} trainable numbers, {count / (frozen + count):.2%} of {frozen + count:,}; "
                f"the adapter is {4 * count:,} bytes in float32")

    ticks = {name: ipywidgets.Checkbox(value=name in chosen, description=name, indent=False, layout=ipywidgets.Layout(width="auto"))
             for name in sizes}
    slider = ipywidgets.IntSlider(value=rank, min=1, max=most, description="rank r")
    return picture_with_controls(fig, update, rank=slider, **ticks)
