"""The target picker: tick the matrices that get an adapter, choose its rank, and see what it costs."""
from matplotlib.figure import Figure
from torch import nn

from lora_edu.course.figures.curves import plot_bars
from lora_edu.course.labs.lab import Lab, ranks_up_to
from lora_edu.lora.targets import PROJECTIONS

MLP = ("gate_proj", "up_proj", "down_proj")


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


def target_picker(model: nn.Module, rank: int = 8, chosen=("q_proj", "v_proj"),
                  title: str = "Attention and MLP: what an adapter on each costs") -> Lab:
    """Tick the matrices that get an adapter and choose its rank: what would be trained, counted from the layers'
    sizes.
    """
    sizes = target_sizes(model)
    most = min(64, *(min(size) for group in sizes.values() for size in group))
    groups = {"attention": [name for name in sizes if name not in MLP], "MLP": [name for name in sizes if name in MLP]}
    data = {"title": title, "groups": {group: names for group, names in groups.items() if names},
            "sides": {name: sum(out + into for out, into in group) for name, group in sizes.items()},   # at rank 1
            "frozen": sum(p.numel() for p in model.parameters()),
            "ranks": ranks_up_to(most, rank)}
    state = {"rank": rank, "chosen": [name for name in sizes if name in chosen]}
    return Lab("target_picker", data, state, in_words(data, **state), picture(data, rank))


def in_words(data: dict, rank: int, chosen: list[str]) -> str:
    count = rank * sum(data["sides"][name] for name in chosen)
    total = data["frozen"] + count
    return (f"rank {rank} on {', '.join(chosen) or 'nothing'}: {count:,} trainable numbers, {count / total:.2%} of "
            f"{total:,}; the adapter is {4 * count:,} bytes in float32")


def picture(data: dict, rank: int) -> Figure:
    bars = {name: rank * side for name, side in data["sides"].items()}
    return plot_bars(bars, data["title"], xlabel="parameters")
