"""The memory calculator: choose a model, a method and a batch, and see the bill and the cards it fits on."""
import ipywidgets

from lora_edu.course.figures.memory import AXIS, CARDS, GB, fits_on, frame, stacks
from lora_edu.course.page.show import new_figure
from lora_edu.course.page.widgets import picture_with_controls
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.measure.memory import OPTIMIZERS, RECIPES, bill
from lora_edu.models.sizes import PRESETS

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
WHERE = {"all linear layers": "all-linear", "queries and values": "Q, V", "attention": "Q, K, V, O"}
TARGETS = {"llama": PLACEMENTS,      # GPT-2 keeps q, k and v in one matrix
           "gpt2": {"all-linear": "all-linear", "Q, V": ("attn.c_attn",), "Q, K, V, O": ("attn.c_attn", "attn.c_proj")}}


def memory_calculator(model: str = "llama-3.1-8b") -> ipywidgets.VBox:
    """Controls above one stacked bar; the text gives every part in bytes and the cards that have room."""
    fig, ax = new_figure(width=8.6, height=3.1, xlabel=AXIS)
    fig.get_layout_engine().set(w_pad=0.2, h_pad=0.15)            # the last tick's number stands out on the right
    fig.set_dpi(90)
    ax.set_title("where the memory goes", pad=24)
    ax.set_yticks([])
    stacks(ax, {"": bill(model, length=128)})         # a place holder: the controls draw the first bill

    def update(model, method, rank, targets, recipe, optimizer, batch, length, checkpointing):
        sizes = PRESETS[model]
        said = bill(model, method, rank, TARGETS[sizes.kind][WHERE[targets]], recipe, optimizer, batch,
                    min(length, sizes.context),
                    checkpointing)
        ax.clear()
        ax.set_xlabel(AXIS)
        ax.set_title(f"{model}: {said.total / GB:,.1f} GB", pad=24)
        stacks(ax, {"": said})
        ax.set_yticks([])
        frame(ax, max(said.total, 20 * GB))
        room = [f"{card} ({CARDS[card]} GB)" for card in fits_on(said.total)]
        times = f"fits on none of these cards: {said.total / (80 * GB):.1f} times an 80 GB card"
        parts = ", ".join(f"{name} {value / GB:,.2f}" for name, value in said.parts.items() if value)
        cut = f" (length {sizes.context}, the whole context)" if length > sizes.context else ""
        return (f"{said.summary()}{cut}\nGB: {parts}; total {said.total / GB:,.2f} GB = {said.total:,.0f} bytes\n"
                + (f"fits on: {', '.join(room)}" if room else times))

    wide = {"layout": ipywidgets.Layout(width="250px")}
    return picture_with_controls(
        fig, update,
        model=ipywidgets.Dropdown(options=list(PRESETS), value=model, description="model", **wide),
        method=ipywidgets.ToggleButtons(options=["lora", "full"], value="lora", description="method",
                                        style={"button_width": "auto"}),
        rank=ipywidgets.SelectionSlider(options=RANKS, value=8, description="rank r"),
        targets=ipywidgets.Dropdown(options=list(WHERE), value="all linear layers", description="targets", **wide),
        recipe=ipywidgets.Dropdown(options=list(RECIPES), value="bf16-mixed", description="recipe", **wide),
        optimizer=ipywidgets.Dropdown(options=list(OPTIMIZERS), value="adam", description="optimizer", **wide),
        batch=ipywidgets.IntSlider(value=1, min=1, max=64, description="batch"),
        length=ipywidgets.SelectionSlider(options=LENGTHS, value=2048, description="length"),
        checkpointing=ipywidgets.Checkbox(value=False, description="checkpointing", indent=False))
