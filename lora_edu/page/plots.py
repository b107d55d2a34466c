"""Every figure of the course: one function a picture, drawn on a ``Figure`` that it returns.

No pyplot: a slider's callback may run in another thread, and pyplot's "current figure" is shared by all of them.
Lines differ by marker and dash as well as by colour (Okabe-Ito, safe for colour-blind readers); axis labels and their
units come from ``LABELS``, so one quantity has one name everywhere. The caller's title states the finding.
"""
import base64
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"
COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
GREY = "#666666"

LABELS = {
    "step": "optimizer step",
    "loss": "loss (nats per token)",
    "task": "loss on the new task (nats per token)",
    "tales": "loss on the tales (nats per token)",
    "alpha": "strength of the adapter (0: off, 1: full)",
    "rank": "rank r",
    "lr": "learning rate",
    "parameters": "trainable numbers",
    "bytes": "size (bytes)",
    "energy": "energy kept (%)",
    "slots": "slots right (%)",
    "index": "index i of the singular value",
    "sigma": r"singular value $\sigma_i$",
    "change": r"size of the update, $\|\Delta W\| / \|W_0\|$ (no unit)",
    "entry": "value of the entry",
    "rank kept": "rank r kept of the update (log scale, and 0)",
    "kept": "kept of the whole update (%)",
    "kept or right": "kept of the whole update, or slots right (%)",
    "density": r"density (per unit of $\sigma$)",
}


def new_figure(width: float = 6.4, height: float = 3.6, columns: int = 1, **axes):
    """A figure (inches, 100 dots each) and its axes, in the course's style."""
    fig = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")
    parts = fig.subplots(1, columns, squeeze=False)[0]
    for ax in parts:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.set(**axes)
    return fig, parts[0] if columns == 1 else parts


def look(i: int) -> dict:
    """Colour, marker and dash of the i-th line."""
    return dict(color=COLORS[i % 7], marker=MARKERS[i % 7], linestyle=DASHES[i % 7], markersize=5, linewidth=1.6)


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes; the same figure, drawn anew, gives the same bytes."""
    out = io.BytesIO()
    FigureCanvasAgg(fig).print_png(out, metadata={"Software": None})     # `savefig` gives the same picture and draws it twice
    return out.getvalue()


def few_colors(data: bytes) -> bytes:
    """The same picture in its 256 most useful colours: a third of the bytes in a notebook's file."""
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, format="png", optimize=True)
    return out.getvalue()


def title_of(fig: Figure) -> str:
    """The figure's own title, or that of its first axes."""
    return fig.get_suptitle() or (fig.axes[0].get_title() if fig.axes else "") or "untitled"


def show(fig: Figure) -> None:
    """Display the figure's PNG. Its text form is the title, so that a stored output compares equal elsewhere."""
    from IPython.display import display
    title = title_of(fig)
    data = {"image/png": base64.b64encode(few_colors(png(fig))).decode(), "text/plain": f"<figure: {title}>"}
    display(data, metadata={"image/png": {"alt": title}}, raw=True)


def plot_loss_curves(curves: dict, title: str, ylabel: str = "loss", xlabel: str = "step") -> Figure:
    """Lines of (x, y) points: ``{"LoRA": [(step, loss), ...]}``; about ten markers a line, however long it is."""
    fig, ax = new_figure(title=title, xlabel=LABELS.get(xlabel, xlabel), ylabel=LABELS.get(ylabel, ylabel))
    for i, (name, points) in enumerate(curves.items()):
        x, y = zip(*points)
        ax.plot(x, y, label=name, markevery=max(1, len(x) // 10), **look(i))
    ax.legend(frameon=False)
    return fig


def plot_bands(bands: dict, title: str, ylabel: str = "loss", xlabel: str = "step") -> Figure:
    """Lines with an interval around each: ``{"LoRA": (x, mean, low, high)}``."""
    fig, ax = new_figure(title=title, xlabel=LABELS.get(xlabel, xlabel), ylabel=LABELS.get(ylabel, ylabel))
    for i, (name, (x, mean, low, high)) in enumerate(bands.items()):
        ax.plot(x, mean, label=name, markevery=max(1, len(x) // 10), **look(i))
        ax.fill_between(x, low, high, color=COLORS[i % 7], alpha=0.15, linewidth=0)
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
    """One bar a name with its interval and its number: ``{"all-linear": (mean, low, high)}``, first on top.

    ``floor`` is the score of a fluent model that ignores its input.
    """
    note = "" if floor is None else "; dotted: ignores its input"
    fig, ax = new_figure(height=1.3 + 0.42 * len(bars), title=title, xlabel=LABELS.get(xlabel, xlabel) + note)
    names, (mean, low, high) = list(bars), np.array(list(bars.values()), dtype=float).T
    ax.barh(names, mean, color=SKY, edgecolor=BLUE, height=0.6)
    ax.errorbar(mean, names, xerr=(mean - low, high - mean), fmt="none", color=BLACK, capsize=3)
    for i, value in enumerate(mean):
        ax.annotate(f"{value:.3g}", (high[i], i), xytext=(6, 0), textcoords="offset points", va="center",
                    bbox=dict(facecolor="white", edgecolor="none", pad=1))
    if floor is not None:
        ax.axvline(floor, color=GREY, linestyle=":", linewidth=1.4)
    ax.set_xlim(0, 1.12 * max(high.max(), floor or 0.0))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return fig


def plot_singular_values(matrices, title: str = "Singular values", log: bool = True) -> Figure:
    """Singular values, largest first. ``matrices``: one 2-D array or tensor, or ``{name: matrix}`` for several."""
    named = matrices if isinstance(matrices, dict) else {"": matrices}
    fig, ax = new_figure(title=title, xlabel=LABELS["index"], ylabel=LABELS["sigma"], yscale="log" if log else "linear")
    for i, (name, matrix) in enumerate(named.items()):
        sigma = np.linalg.svd(_array(matrix), compute_uv=False)
        ax.plot(range(1, len(sigma) + 1), sigma, label=name, markevery=max(1, len(sigma) // 40), **look(i))
    if list(named) != [""]:
        ax.legend(frameon=False)
    return fig


def plot_matrix(matrix, title: str, label: str = "entry") -> Figure:
    """A heat map of a matrix (rows down, columns across), with its colour bar."""
    fig, ax = new_figure(title=title, xlabel="column (input)", ylabel="row (output)")
    ax.grid(visible=False)
    fig.colorbar(ax.imshow(_array(matrix), cmap="viridis", interpolation="nearest"), label=LABELS.get(label, label))
    return fig


def plot_picture_ranks(picture, ranks=(1, 4, 16), title: str = "Few numbers make a recognisable picture", width: float = 2.1) -> Figure:
    """A grey picture, (height, width), beside its best versions of the given ranks, each with its count of numbers."""
    pixels = _array(picture)
    U, S, Vh = np.linalg.svd(pixels, full_matrices=False)
    fig, parts = new_figure(width=width * (1 + len(ranks)), height=width * pixels.shape[0] / pixels.shape[1] + 0.9, columns=1 + len(ranks))
    fig.suptitle(title)
    for ax, rank in zip(parts, (None, *ranks)):
        ax.imshow(pixels if rank is None else U[:, :rank] * S[:rank] @ Vh[:rank], cmap="gray", vmin=pixels.min(), vmax=pixels.max())
        count = pixels.size if rank is None else rank * sum(pixels.shape)
        ax.set_title(("the picture" if rank is None else f"rank {rank}") + f"\n{count:,} numbers", fontsize=10)
        ax.set_axis_off()
    return fig


def sample_picture(size: int = 256) -> np.ndarray:
    """A grey picture to compress, (size, size), 0 to 1: the portrait of Grace Hopper (US Navy, public domain) that matplotlib carries."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    with get_sample_data("grace_hopper.jpg") as file:
        grey = Image.open(file).convert("L")
        side = min(grey.size)
        return np.asarray(grey.crop((0, 0, side, side)).resize((size, size)), dtype=float) / 255


def plot_points(groups: dict, title: str, xlabel: str, ylabel: str, texts: bool = True) -> Figure:
    """Points by group, ``{"LoRA": [(x, y, "text beside it"), ...]}``, joined in the order given."""
    fig, ax = new_figure(title=title, xlabel=LABELS.get(xlabel, xlabel), ylabel=LABELS.get(ylabel, ylabel))
    for i, (name, points) in enumerate(groups.items()):
        x, y, beside = zip(*points)
        ax.plot(x, y, label=name, **look(i))
        for at, text in zip(zip(x, y), beside if texts else ()):
            ax.annotate(text, at, xytext=(6, -11), textcoords="offset points", fontsize=8, color=COLORS[i % 7])
    ax.margins(0.1)     # room for the texts
    ax.legend(frameon=False)
    return fig


def plot_two_losses(alphas, task_loss, tales_loss, title: str, alpha: float | None = None) -> Figure:
    """Two losses over alpha; with ``alpha``, a black marker on each line there. A slider moves these: see ``widgets.py``."""
    fig, ax = new_figure(title=title, xlabel=LABELS["alpha"], ylabel=LABELS["loss"])
    ax.plot(alphas, task_loss, label="the new task", markevery=max(1, len(alphas) // 10), **look(0))
    ax.plot(alphas, tales_loss, label="the tales", markevery=max(1, len(alphas) // 10), **look(1))
    if alpha is not None:
        here = int(np.abs(np.asarray(alphas) - alpha).argmin())
        ax.axvline(alphas[here], color=GREY, linewidth=1, gid="here")
        ax.plot([alphas[here]] * 2, [task_loss[here], tales_loss[here]], color=BLACK, marker="o", markersize=9,
                linestyle="none", gid="here")
    ax.legend(frameon=False)
    return fig


def _array(matrix) -> np.ndarray:
    """A 2-D float64 array from a tensor (any dtype, any device), an array or a list."""
    values = matrix.detach().cpu().double().numpy() if hasattr(matrix, "detach") else np.asarray(matrix, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"a picture needs a matrix of finite numbers; got shape {tuple(values.shape)}"
                         + ("" if np.isfinite(values).all() else " with nan or inf in it") + ".")
    return values
