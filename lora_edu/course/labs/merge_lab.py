"""The merge lab: fold an adapter into the weights, in a dtype and at a strength, and see what arrives.

Two of its pictures are of one matrix: which entries' update was rounded away, and how far off the whole update is. In
the third, lines are the losses with the adapter kept apart, dots those with the weights merged. Both are computed in
float32, the merged weights' values cast up, so what differs is the merge's doing and not that of 16-bit arithmetic.
Everything is measured when the lab is made; moving it needs no kernel.
"""
import base64

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from lora_edu.course.figures.curves import plot_two_losses
from lora_edu.course.labs.lab import Lab
from lora_edu.lora.factors import lora_layers, some_lora_layers
from lora_edu.lora.inject import share_weights
from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.merge import Rounding
from lora_edu.lora.targets import shorten
from lora_edu.training.loop import Batch, evaluate

CORNER = 48       # rows and columns of the map
SCALES = {"1": 1.0, "1/3": 1 / 3, "1/10": 0.1, "1/30": 1 / 30, "1/100": 0.01}
STRENGTHS = [round(-1 + 0.25 * i, 2) for i in range(13)]
FACTORS = np.geomspace(5e-4, 2, 20)      # of the update, for the lines of the middle picture
DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("the new task", "the tales")


def merge_lab(model: nn.Module, name: str, task: Batch, tales: Batch, samples: dict[float, str] | None = None) -> Lab:
    """Controls for dtype, strength, and a factor that makes the update smaller, above one matrix, its error and two
    losses.

    Args:
        model: a Llama whose LoRA layers were trained (`load_adapter`); it stays as it is, bit for bit.
        name: of the layer to look at, such as "model.layers.3.mlp.down_proj".
        task, tales: a batch of the new task and one of tales; small, since both are measured at every strength: two
            rows of 100 tokens will do.
        samples: ``{strength: what the model writes there}``.

    Raises:
        ValueError: no LoRA layer of that name, or its update is zero or not finite.
    """
    if name not in dict(some_lora_layers(model)):
        raise ValueError(f"{name!r} is no LoRA layer of this model: choose one of "
                         f"{shorten([each for each, _ in lora_layers(model)])}.")
    twins = {dtype: twin_in(model, getattr(torch, dtype)) for dtype in DTYPES}
    layers = {dtype: twin.get_submodule(name) for dtype, twin in twins.items()}
    lines = {dtype: [fold(layer, factor) for factor in FACTORS] for dtype, layer in layers.items()}
    own = lines["float32"][-1].size / FACTORS[-1]
    if own == 0:
        raise ValueError(f"the update of {name!r} is zero, so a merge has nothing to lose: "
                         "load an adapter, or train one, first.")
    batches = (task, tales)
    data = {"title": "what a merge loses", "name": name, "own": own, "entries": layers["float32"].weight.numel(),
            "dtypes": DTYPES, "strengths": STRENGTHS, "scales": SCALES, "tasks": TASKS,
            "lines": {dtype: [(each.size, each.error) for each in found] for dtype, found in lines.items()},
            "corner": corner_of(layers["float32"]), "samples": sorted((samples or {}).items()) or None,
            "base": losses_at(twins["float32"], 0.0, batches, merged=False),
            "apart": over_all(lambda strength: losses_at(twins["float32"], strength, batches, merged=False)),
            "measured": {dtype: over_all(lambda strength: measured(twins[dtype], layers[dtype], strength, batches))
                         for dtype in DTYPES}}
    state = {"dtype": "bfloat16", "strength": 1.0, "scaled": "1"}
    return Lab("merge_lab", data, state, in_words(data, state), picture(data))


def over_all(measure) -> list:
    """`measure` at every strength in effect: [strength][scale]."""
    return [[measure(strength * factor) for factor in SCALES.values()] for strength in STRENGTHS]


def twin_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model around the same weights, those under LoRA stored in `dtype`; all else, the factors too, in float32
    on the CPU.
    """
    twin = share_weights(model).cpu().float().eval()
    for _, layer in lora_layers(twin):
        layer.merged_weight = None                          # the reader's model may be merged; the twin starts apart
        layer.weight.data = layer.weight.data.to(dtype)
    return twin


def fold(layer: LoRALinear, strength: float) -> Rounding:
    """`strength` times the trained update, folded: what became of it."""
    layer.scaling = strength * layer.alpha / layer.rank
    folded, delta = layer.fold()
    return Rounding.of(layer.weight, delta, folded)


def corner_of(layer: LoRALinear) -> dict:
    """W₀ and the update as trained, their top-left entries as float32, row after row, for the page."""
    layer.scaling = layer.alpha / layer.rank
    parts = {"weight": layer.weight, "delta": layer.fold()[1]}
    cut = {name: part.detach()[:CORNER, :CORNER].float().numpy() for name, part in parts.items()}
    packed = {name: base64.b64encode(part.astype("<f4").tobytes()).decode() for name, part in cut.items()}
    return packed | dict(zip(("height", "width"), cut["weight"].shape))


def measured(twin: nn.Module, layer: LoRALinear, strength: float, batches: tuple[Batch, ...]) -> dict:
    found = fold(layer, strength)
    return {"size": found.size, "error": found.error, "lost": found.lost, "away": found.rounded_away,
            "merged": losses_at(twin, strength, batches, merged=True)}


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


def at(data: dict, state: dict) -> tuple[dict, tuple[float, ...]]:
    """What was measured merged, and the losses apart, at a state."""
    i, k = STRENGTHS.index(state["strength"]), list(SCALES).index(state["scaled"])
    return data["measured"][state["dtype"]][i][k], data["apart"][i][k]


def in_words(data: dict, state: dict) -> str:
    found, apart = at(data, state)
    return "\n".join([
        f"{state['dtype']}, strength {state['strength']:.2f}: ‖ΔW‖/‖W₀‖ = {found['size']:.2g} in {data['name']}; "
        f"rounded away {found['lost']:,} of {data['entries']:,} entries ({found['away']:.2%}); the update that arrived "
        f"is off by {found['error']:.2g} of its size",
        *(f"loss on {what}: {base:.3f} nats per token without the adapter, {kept:.3f} with it kept apart, {merged:.3f} "
          "merged" for what, base, kept, merged in zip(TASKS, data["base"], apart, found["merged"]))])


def picture(data: dict) -> Figure:
    apart = [each[0] for each in data["apart"]]
    return plot_two_losses(STRENGTHS, *zip(*apart), "Two losses over the strength of the adapter", alpha=1.0)
