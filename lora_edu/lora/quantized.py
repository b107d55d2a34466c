"""Linear layers whose weight is stored in few bits, and the two things LoRA wants of them: the weight as numbers, and a
plain layer to merge into.

`models.quantize.QuantLinear` is known by its `few_bits`, bitsandbytes' Linear4bit and Linear8bitLt by their names, so
that this package need import neither.
"""
import copy

import torch
from torch import nn


def is_quantized(layer: nn.Module) -> bool:
    """Is its weight stored in few bits, and made anew when it is read?"""
    return getattr(type(layer), "few_bits", False) or of_bitsandbytes(layer)


def of_bitsandbytes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and any(
        cls.__module__.startswith("bitsandbytes.") and cls.__name__ in ("Linear4bit", "Linear8bitLt")
        for cls in type(layer).__mro__)


def base_weight(layer: nn.Module) -> torch.Tensor:
    """W₀ as floating numbers, laid out as the layer stores it: its weight, or what is made of the few bits."""
    weight = layer.weight
    if not of_bitsandbytes(layer) or weight.is_floating_point():     # bitsandbytes quantises on the way to a device
        return weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit  # whoever has such a layer has it
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            layer = copy.deepcopy(layer)    # an eval pass on a CPU packed it otherwise; saving unpacks, and rounds
            layer.state_dict()
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
    return weight.data.float() * scales[:, None].float() / 127


def packed_away(model: nn.Module) -> int:
    """How many numbers its quantised layers stand for and do not hold as parameters, or hold two in one."""
    held = [(layer, layer._parameters.get("weight")) for layer in model.modules() if is_quantized(layer)]
    return sum(layer.in_features * layer.out_features - (0 if own is None else own.numel()) for layer, own in held)


@torch.no_grad()
def plain_layer(layer: nn.Module) -> nn.Linear:
    """A plain frozen layer with the weight that a quantised one computes with: what few bits took stays lost."""
    weight = base_weight(layer)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=weight.dtype,
                      device=weight.device).requires_grad_(False)
    plain.weight.copy_(weight)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain.train(layer.training)
