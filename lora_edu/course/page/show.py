"""How every figure of the course looks, and how a cell shows one.

No pyplot: a slider's callback may run in another thread, and pyplot's "current figure" is shared by all of them.
Lines differ by marker and dash as well as by colour (Okabe-Ito, safe for colour-blind readers); axis labels and their
units come from ``LABELS``, so one quantity has one name everywhere. The caller's title states the finding.
"""
import base64
import io
import os
from html import escape

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
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
    # `savefig` gives the same picture and draws it twice
    FigureCanvasAgg(fig).print_png(out, metadata={"Software": None})
    return out.getvalue()


def _few_colors(data: bytes) -> bytes:
    """The same picture in its 256 most useful colours: a third of the bytes in a notebook's file."""
    from PIL import Image
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(out, format="png", optimize=True)
    return out.getvalue()


def title_of(fig: Figure) -> str:
    """The figure's own title, or that of its first axes."""
    return fig.get_suptitle() or (fig.axes[0].get_title() if fig.axes else "") or "untitled"


def texts_cut(fig: Figure) -> list[str]:
    """Titles, and names in legends, that reach beyond the figure, which `png` has drawn: a reader sees them cut."""
    texts = [title for ax in fig.axes for title in (ax.title, ax._left_title, ax._right_title)]
    texts += [fig._suptitle] if fig._suptitle else []
    legends = [*fig.legends, *filter(None, (ax.get_legend() for ax in fig.axes))]
    texts += [text for legend in legends for text in legend.get_texts()]
    room = fig.bbox.expanded(1 + 2 / fig.bbox.width, 1 + 2 / fig.bbox.height)      # a pixel is no cut
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [text for text, box in boxes if not (room.contains(box.x0, box.y0) and room.contains(box.x1, box.y1))]


def picture_html(fig: Figure, alt: str | None = None, caption: str = "") -> str:
    """The figure as HTML that reads without a kernel: its PNG with a text for those who do not see it, and a caption.

    HTML, because JupyterLab shows an image/png without its alt text.
    """
    data = base64.b64encode(_few_colors(png(fig))).decode()
    if os.environ.get("LORA_EDU_CLAIMS") == "raise" and (cut := texts_cut(fig)):      # tests, and what is stored
        raise ValueError(f"{cut[0]!r} reaches beyond its figure: shorten it, or make the figure larger.")
    picture = (f'<img alt="{escape(alt or title_of(fig))}" width="{round(fig.get_figwidth() * fig.dpi)}" '
               f'src="data:image/png;base64,{data}">')
    return picture + (f"<p>{escape(caption)}</p>" if caption else "")


def show(fig: Figure, alt: str | None = None) -> None:
    """Display the figure. Its text form is its title, so that a stored output compares equal elsewhere.

    Args:
        alt: what the picture shows, for a reader who does not see it; its title, if nothing is given.
    """
    from IPython.display import display
    display({"text/html": picture_html(fig, alt), "text/plain": f"<figure: {title_of(fig)}>"}, raw=True)
