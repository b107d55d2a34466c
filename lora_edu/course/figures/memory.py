"""The figures of the memory bill: stacked bars beside the cards that may hold them, and prediction beside
measurement.
"""
from matplotlib.figure import Figure

from lora_edu.course.page.show import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, new_figure
from lora_edu.measure.memory import Bill
from lora_edu.measure.memory_measured import Measured

CARDS = {"T4": 16, "L4": 24, "A100": 40, "A100, H100": 80}        # GB as the makers count, 10⁹ bytes
LOOKS = {"weights": (SKY, ""), "adapter": (BLACK, ""), "gradients": (VERMILLION, "//"),
         "optimizer states": (ORANGE, "\\\\"),
         "activations": (GREEN, ".."), "temporary": (PURPLE, "xx"), "in transit": (BLUE, "--"),
         "allocator (an allowance)": (GREY, "")}
GB = 1e9
AXIS = "GB (10⁹ bytes); dotted: what a card has"


def fits_on(total: float) -> list[str]:
    """The cards with room for so many bytes."""
    return [card for card, size in CARDS.items() if total <= size * GB]


def plot_bills(bills: dict[str, Bill], title: str) -> Figure:
    """One stacked bar a bill, in GB; dotted lines are cards."""
    fig, ax = new_figure(width=7.6, height=2.1 + 0.42 * len(bills), xlabel=AXIS)
    ax.set_title(title, pad=24)                       # above the names of the cards
    stacks(ax, bills)
    fig.legend(frameon=False, fontsize=8, ncols=4, columnspacing=1, loc="outside lower center")
    frame(ax, max(bill.total for bill in bills.values()))
    return fig


def stacks(ax, bills: dict[str, Bill]) -> None:
    """The bars of each category, by its name."""
    left = [0.0] * len(bills)
    for part, (color, hatch) in LOOKS.items():
        if not any(part in bill.parts for bill in bills.values()):
            continue                                      # nothing is in transit in one process
        width = [bill.parts.get(part, 0) / GB for bill in bills.values()]
        ax.barh(list(bills), width, left=left, height=0.6, color=color, hatch=hatch, edgecolor="white", linewidth=0.5,
                label=part)
        left = [a + b for a, b in zip(left, width)]
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def frame(ax, largest: float) -> None:
    """Room for the largest bar, and the cards within it; a name that would cover its right neighbour's is left out."""
    right, last = 1.08 * max(largest / GB, 4), float("inf")
    ax.set_xlim(0, right)
    if right <= min(CARDS.values()):
        ax.set_xlabel(AXIS.split(";")[0])
    for card, size in reversed(CARDS.items()):
        if size < right:
            ax.axvline(size, color=BLACK, linestyle=":", linewidth=1)
            if last - size > 0.033 * right:
                ax.annotate(f"{card}\n{size}", (size, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                            textcoords="offset points",
                            fontsize=7, ha="center", va="bottom")
                last = size


def plot_beside(pairs: dict[str, tuple[Bill, Measured]], title: str) -> Figure:
    """Predicted (filled) beside measured (outlined), MB by category, one panel a model."""
    fig, panels = new_figure(width=3.6 * len(pairs), height=3.2, columns=len(pairs))
    fig.suptitle(title)
    largest = max(size / 1e6 for pair in pairs.values() for parts in (pair[0].parts, pair[1].parts)
                  for part, size in parts.items()
                  if part in pair[1].parts)
    for ax, (name, (bill, measured)) in zip([panels] if len(pairs) == 1 else panels, pairs.items()):
        parts = list(measured.parts)
        rows = range(len(parts))
        ax.barh([row - 0.2 for row in rows], [bill.parts[part] / 1e6 for part in parts], height=0.36, color=BLUE,
                label="predicted")
        ax.barh([row + 0.2 for row in rows], list(size / 1e6 for size in measured.parts.values()), height=0.36,
                color="white",
                edgecolor=BLACK, hatch="///", label="measured")
        ax.set(title=name, xlabel="MB (10⁶ bytes)", xlim=(0, 1.1 * largest))
        ax.set_yticks(rows, labels=parts)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.legend(frameon=False, fontsize=8)
    return fig
