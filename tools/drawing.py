"""The drawing that notebook 00 opens with, as an attachment of its first cell: `python dev.py python tools/drawing.py`.

An attachment travels with the notebook, so that the drawing is there offline, in Colab and without a kernel.
"""
import base64
import io
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.links import write  # noqa: E402

GREY, BLUE, VERMILLION = "#d9d9d9", "#0072B2", "#D55E00"
SIDE = 130               # of 256 numbers; a rank of 6, to the same scale
THIN = SIDE * 6 / 256


def draw():
    """A square and, added to it, a tall matrix times a wide one; PNG bytes."""
    fig = Figure(figsize=(7.2, 2.0), facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 720), ylim=(0, 200))
    ax.axis("off")
    for x, y, width, height, colour in ((40, 50, SIDE, SIDE, GREY), (345, 50, THIN, SIDE, VERMILLION),
                                        (370, 180 - THIN, SIDE, THIN, BLUE)):
        ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="#333333",
                               linewidth=0.8 * (width == height)))
    for x, y, text, side in ((105, 122, "$W_0$, frozen", "center"),
                             (105, 98, r"$256 \times 256$", "center"),
                             (105, 28, "what the model knows", "center"),
                             (200, 115, "+", "center"),
                             (266, 115, r"strength $\cdot\ \frac{\alpha}{r}\ \cdot$", "center"),
                             (346, 28, r"$B$, $256 \times 6$", "center"),
                             (435, 156, r"$A$, $6 \times 256$", "center"),
                             (470, 28, "the new trade", "center"), (530, 140, "65,536 numbers stay,", "left"),
                             (530, 112, r"$6 \cdot 512 = 3{,}072$ learn.", "left"),
                             (530, 84, "(Drawn to scale.)", "left")):
        ax.text(x, y, text, ha=side, va="center", fontsize=18 if text == "+" else 11, color="#222222")
    made = io.BytesIO()
    fig.savefig(made, format="png", dpi=130, metadata={"Software": None})
    return made.getvalue()


def main():
    path = next((ROOT / "notebooks").glob("00_*.ipynb"))
    book = json.loads(path.read_text(encoding="utf-8"))
    book["cells"][0]["attachments"] = {"lora.png": {"image/png": base64.b64encode(draw()).decode()}}
    write(path, json.dumps(book, ensure_ascii=False, indent=1, sort_keys=True, separators=(",", ": ")) + "\n")


if __name__ == "__main__":
    main()
