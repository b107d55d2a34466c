"""The figures of plain matrices: singular values, and a picture compressed to a few ranks."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_edu.course.page.show import BLUE, LABELS, SKY, VERMILLION, look, new_figure


def plot_singular_values(matrices, title: str = "Singular values", log: bool = True) -> Figure:
    """Singular values, largest first. ``matrices``: one 2-D array or tensor, or ``{name: matrix}`` for several."""
    named = matrices if isinstance(matrices, dict) else {"": matrices}
    fig, ax = new_figure(title=title, xlabel=LABELS["index"], ylabel=LABELS["sigma"], yscale="log" if log else "linear")
    for i, (name, matrix) in enumerate(named.items()):
        sigma = np.linalg.svd(as_matrix(matrix), compute_uv=False)
        ax.plot(range(1, len(sigma) + 1), sigma, label=name, markevery=max(1, len(sigma) // 40), **look(i))
    if list(named) != [""]:
        ax.legend(frameon=False)
    return fig


def plot_picture_ranks(picture, ranks=(1, 4, 16), title: str = "Few numbers make a recognisable picture",
                       width: float = 2.1) -> Figure:
    """A grey picture, (height, width), beside its best versions of the given ranks, each with its count of numbers."""
    pixels = as_matrix(picture)
    U, S, Vh = np.linalg.svd(pixels, full_matrices=False)
    fig, parts = new_figure(width=width * (1 + len(ranks)), height=width * pixels.shape[0] / pixels.shape[1] + 0.9,
                            columns=1 + len(ranks))
    fig.suptitle(title)
    for ax, rank in zip(parts, (None, *ranks)):
        ax.imshow(pixels if rank is None else U[:, :rank] * S[:rank] @ Vh[:rank], cmap="gray", vmin=pixels.min(),
                  vmax=pixels.max())
        count = pixels.size if rank is None else rank * sum(pixels.shape)
        ax.set_title(("the picture" if rank is None else f"rank {rank}") + f"\n{count:,} numbers", fontsize=10)
        ax.set_axis_off()
    return fig


def sample_picture(size: int = 256) -> np.ndarray:
    """A grey picture to compress, (size, size), 0 to 1: the portrait of Grace Hopper (US Navy, public domain) that
    matplotlib carries.
    """
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    with get_sample_data("grace_hopper.jpg") as file:
        grey = Image.open(file).convert("L")
        side = min(grey.size)
        return np.asarray(grey.crop((0, 0, side, side)).resize((size, size)), dtype=float) / 255


def plot_block(shapes: dict, title: str, rank: int = 8) -> Figure:
    """The matrices of one block, to one scale, each with the two thin ones of a LoRA beside it (in colour).

    Args:
        shapes: ``{"q_proj": (out, in), ...}``; drawn out tall and in wide.
    """
    fig, ax = new_figure(width=7.6, height=2.7, title=title)
    x, tallest = 0.0, max(out for out, _ in shapes.values())
    for name, (out, wide) in shapes.items():
        ax.add_patch(Rectangle((x, 0), wide, out, facecolor=SKY, edgecolor="white"))
        ax.add_patch(Rectangle((x + wide + rank, 0), rank, out, color=VERMILLION))
        ax.add_patch(Rectangle((x, out + rank), wide, rank, color=BLUE))
        ax.annotate(f"{name}\n{out} × {wide}", (x + wide / 2, -0.02 * tallest), ha="center", va="top", fontsize=8,
                    annotation_clip=False)
        x += max(wide, 300) + 90
    ax.set(xlim=(-20, x), ylim=(-0.28 * tallest, tallest + 40), aspect="equal")
    ax.set_axis_off()
    fig.legend([Rectangle((0, 0), 1, 1, color=color) for color in (SKY, VERMILLION, BLUE)],
               ["W₀, frozen", f"B, {rank} wide", f"A, {rank} high"], loc="outside lower center", ncols=3, frameon=False,
               fontsize=9)
    return fig


def plot_levels(quotients, levels, title: str) -> Figure:
    """How often each quotient of a weight and its block's largest entry occurs, and the levels that it is rounded to.

    Args:
        quotients: numbers from -1 to 1, of any shape. levels: the values that can be stored.
    """
    values = np.asarray(quotients.detach().cpu().float().numpy()).ravel()
    fig, ax = new_figure(title=title, xlabel="weight / largest entry of its block of 64", ylabel="share per unit")
    ax.hist(values, bins=120, range=(-1, 1), density=True, color=SKY, label=f"{values.size:,} weights")
    for i, level in enumerate(levels.tolist()):
        ax.axvline(level, color=VERMILLION, linewidth=1, label=f"the {len(levels)} values of NF4" if not i else None)
    ax.legend(frameon=False, loc="upper right")
    return fig


def as_matrix(matrix) -> np.ndarray:
    """A 2-D float64 array from a tensor (any dtype, any device), an array or a list."""
    values = matrix.detach().cpu().double().numpy() if hasattr(matrix, "detach") else np.asarray(matrix, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"a picture needs a matrix of finite numbers; got shape {tuple(values.shape)}"
                         + ("" if np.isfinite(values).all() else " with nan or inf in it") + ".")
    return values
