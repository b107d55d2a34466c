"""The target picker: tick the layers that get an adapter, choose its rank, and see what it costs."""
import ipywidgets
from torch import nn

from lora_edu.course.page.show import BLUE, GREY, LABELS, new_figure
from lora_edu.course.page.widgets import picture_with_controls
from lora_edu.lora.targets import PROJECTIONS


def target_sizes(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """The linear layers LoRA may adapt, by name ending: ``{"q_proj": [(out, in), ...]}``, in the order of
    ``PROJECTIONS``.
    """
    found = {name: [] for name in PROJECTIONS}
    for name, module in model.named_modules():
        ending = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and ending in found:
            found[ending].append((module.out_features, module.in_features))
    if not any(found.values()):
        raise ValueError(f"target_picker found no nn.Linear named {', '.join(PROJECTIONS)} in this "
                         f"{type(model).__name__}: give a Llama-like model before apply_lora wraps its layers.")
    return {name: sizes for name, sizes in found.items() if sizes}


def target_picker(model: nn.Module, rank: int = 8, chosen=("q_proj", "v_proj")) -> ipywidgets.VBox:
    """Tick the layers that get an adapter and choose its rank: what would be trained, counted from the layers'
    sizes.
    """
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
        return (f"rank {rank} on {names}: {count:,} trainable numbers, {count / (frozen + count):.2%} of "
                f"{frozen + count:,}; the adapter is {4 * count:,} bytes in float32")

    ticks = {name: ipywidgets.Checkbox(value=name in chosen, description=name, indent=False,
                                       layout=ipywidgets.Layout(width="auto"))
             for name in sizes}
    slider = ipywidgets.IntSlider(value=rank, min=1, max=most, description="rank r")
    return picture_with_controls(fig, update, rank=slider, **ticks)
