"""Frozen weights in four bits (NF4) or eight (int8): what is stored, and how it becomes a weight again.

Read `nf4_values` first, then `quantize_nf4`. A weight is cut into blocks of 64; each block is divided by its largest
entry, and every quotient becomes the nearest of sixteen values, which lie where a Gaussian has its mass. The largest
entries, one number a block, are stored in eight bits again: "double quantisation". Nothing here is fast: a layer makes
its weight anew in every forward pass, in plain torch. A kernel that does it on the way is what bitsandbytes is for.

Source: Dettmers et al. (2023), "QLoRA", section 3, arXiv:2305.14314; the numbers are those of bitsandbytes.
"""
import functools
import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

BLOCK, GROUP = 64, 256       # entries that share a largest one; largest ones that share a constant
TAIL = 0.9677083             # of the Gaussian: the quantile of the outermost value before all are divided by it
KINDS = ("nf4", "int8")


@functools.cache
def nf4_values() -> torch.Tensor:
    """The sixteen values, (16,), rising from -1 to 1: quantiles of a Gaussian, eight above zero, seven below, and zero
    itself, so that a weight of zero stays zero.

    >>> [round(value, 3) for value in nf4_values()[[0, 7, 8, 15]].tolist()]
    [-1.0, 0.0, 0.08, 1.0]
    """
    quantile = statistics.NormalDist().inv_cdf
    above, below = ([quantile(TAIL + (0.5 - TAIL) * i / n) for i in range(n)] for n in (8, 7))
    values = torch.tensor(sorted([*above, 0.0, *(-value for value in below)]), dtype=torch.float64)
    return (values / values.max()).float()


@functools.cache
def dynamic_values() -> torch.Tensor:
    """The 256 values that the largest entries are stored as, (256,), rising from about -1 to 1: seven decades, each
    with twice as many values as the one below it (Dettmers 2016, "8-bit approximations", arXiv:1511.04561).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**(decade - 6)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


def nearest(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The place of the nearest of the rising values, for every number: uint8, in the numbers' shape."""
    middles = (values[:-1] + values[1:]) / 2
    return torch.bucketize(numbers, middles.to(numbers.device)).to(torch.uint8)


def in_blocks(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks, size), the last one filled up with zeros."""
    flat = numbers.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def quantize_nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored of a weight: its codes, two in a byte, and each block's largest entry.

    Returns:
        codes (ceil(n / 2),) uint8; largest (blocks,) uint8, places in `dynamic_values`; scales (groups,) float32, which
        those are multiplied by; offset () float32, the mean that was taken out of the largest entries.
    """
    blocks = in_blocks(weight.detach().float(), BLOCK)
    largest = blocks.abs().amax(dim=1)
    quotients = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = nearest(quotients, nf4_values()).flatten()[:weight.numel()]
    codes = F.pad(codes, (0, len(codes) % 2))
    offset = largest.mean()
    groups = in_blocks(largest - offset, GROUP)
    scales = groups.abs().amax(dim=1)
    places = nearest(groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], dynamic_values())
    return {"codes": codes[::2] << 4 | codes[1::2], "largest": places.flatten()[:len(largest)], "scales": scales,
            "offset": offset}


def dequantize_nf4(codes: torch.Tensor, largest: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor,
                   shape: tuple[int, ...]) -> torch.Tensor:
    """The weight, float32, in its shape."""
    count, device = torch.Size(shape).numel(), codes.device
    groups = dynamic_values().to(device)[in_blocks(largest, GROUP).long()] * scales[:, None]
    size = groups.flatten()[:len(largest)] + offset
    pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:count]
    return (in_blocks(nf4_values().to(device)[pairs.long()], BLOCK) * size[:, None]).flatten()[:count].view(shape)


def quantize_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every row divided by its largest entry, in 127 steps: codes (out, in) int8, scales (out, 1) float32."""
    weight = weight.detach().float()
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"codes": (weight / scales).round().to(torch.int8), "scales": scales}


class QuantLinear(nn.Module):
    """A frozen linear layer whose weight is stored in four or eight bits; `LoRALinear.wrap` takes it.

    Args:
        layer: the nn.Linear to store; it stays as it is.
        kind: "nf4" (blocks of 64, double quantisation; 4.127 bits a number) or "int8" (a scale for each row).

    `weight` is made anew whenever it is read, in the dtype that the layer had; it cannot be written, so a merge goes
    into a plain layer (`lora.quantized.plain_layer`).

    >>> layer = QuantLinear(nn.Linear(128, 64), "nf4")
    >>> layer.weight.shape, layer.nbytes          # 4,096 + 128 + 4 + 4 for the weight, 256 for the bias
    (torch.Size([64, 128]), 4488)
    """

    few_bits = True          # `lora.quantized` knows the layer by it

    def __init__(self, layer: nn.Linear, kind: str = "nf4"):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: choose one of {', '.join(map(repr, KINDS))}.")
        if not layer.weight.isfinite().all():
            raise ValueError("the weight is not finite, and nan or infinity has no place among sixteen values: load "
                             "the model again.")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        stored = quantize_nf4(layer.weight) if kind == "nf4" else quantize_int8(layer.weight)
        for name, values in stored.items():
            self.register_buffer(name, values)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the layer computes with, (out_features, in_features)."""
        if self.kind == "int8":
            return (self.codes.float() * self.scales).to(self.dtype)
        return dequantize_nf4(self.codes, self.largest, self.scales, self.offset,
                              (self.out_features, self.in_features)).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """What it holds, its bias included."""
        return sum(part.nbytes for part in (*self.buffers(), *self.parameters()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"


def quantize_(model: nn.Module, kind: str = "nf4", keep: Sequence[str] = ()) -> nn.Module:
    """Store every nn.Linear of the model in four or eight bits, in place; all else, embeddings and norms, stays.

    Args:
        keep: names, or their endings, of layers that stay as they are. A head that shares the embedding's weight always
            does: stored anew it would cost more, and not less.

    Returns:
        The model; of a model that is one nn.Linear itself, the layer that stands for it.

    Raises:
        ValueError: no such kind, a name in `keep` that no layer has, a weight that is not finite, a layer under LoRA
            (quantise first); then nothing is changed.

    >>> from lora_edu import load_pretrained
    >>> model = quantize_(load_pretrained()[0], "nf4")
    >>> model.model["layers"][0].mlp.up_proj, type(model.lm_head).__name__
    (QuantLinear(in_features=256, out_features=688, kind='nf4'), 'Linear')
    """
    if isinstance(model, nn.Linear):
        return QuantLinear(model, kind)
    if under := [name for name, _ in model.named_modules() if name.endswith(".base_layer")]:
        raise ValueError(f"{under[0].removesuffix('.base_layer')} is under LoRA already: quantise the model first, and "
                         "call apply_lora after.")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    kept = {name for name in linears if any(("." + name).endswith("." + each) for each in keep)}
    for each in keep:
        if not any(("." + name).endswith("." + each) for name in linears):
            raise ValueError(f"keep={each!r} names no nn.Linear: choose from {', '.join(list(linears)[:8])}, …")
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    made = {name: QuantLinear(layer, kind) for name, layer in linears.items()
            if name not in kept and users[id(layer.weight)] == 1}
    for name, layer in made.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.train(model.get_submodule(name).training))
    return model
