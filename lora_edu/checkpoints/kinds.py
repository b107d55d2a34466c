"""What a tensor of a model is: a matrix that a LoRA can change, or one of the others.

Told by the module that holds it where there is one, and by its name and shape where there are only files.
"""
import math
import re
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_edu.lora.layer import is_conv1d, is_linear, is_plain_conv

LINEAR, CONV1D, CONVOLUTION, LOOSE = "linear", "Conv1D", "convolution", "matrix outside a linear layer"
BARE = "convolution in a bare file, which does not tell stride and groups"
CARRIED = (LINEAR, CONV1D, CONVOLUTION)             # what an adapter can change
EMBEDDING = re.compile(r"(\w+_)?(embeddings?|embed|emb)|embed_(tokens|positions|in)|wte|wpe|shared")
NORM = re.compile(r"(.*_)?(ln|\w*norm)(_?\w{1,2})?", re.IGNORECASE)
GPT2_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


def kind_of(name: str, shape: tuple[int, ...], layer: nn.Module | None, conv1d: bool) -> str:
    """One of `CARRIED`, `LOOSE` (a matrix, but no adapter reaches it), or what to call it in the table of the others.

    Args:
        layer: the module that holds the tensor, if there is one to ask.
        conv1d: do these files store GPT-2's matrices transposed? See `stores_conv1d`.
    """
    holder, _, last = name.rpartition(".")
    holder = holder.rpartition(".")[2]
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 1)
    if "bias" in last:
        return "bias"
    if _is_embedding(holder, last, shape, layer):
        return "embedding"
    if min(rows, columns) < 2:
        return "norm" if NORM.fullmatch(holder) or "Norm" in type(layer).__name__ else "vector"
    if last != "weight" or not holder:
        return LOOSE if len(shape) == 2 else f"stack of matrices ({len(shape)} axes)"
    if layer is not None:
        return _kind_of_layer(layer, len(shape))
    if len(shape) > 2:
        return BARE
    return CONV1D if conv1d and holder in GPT2_NAMES else LINEAR


def _is_embedding(holder: str, last: str, shape: tuple[int, ...], layer: nn.Module | None) -> bool:
    if len(shape) < 2 or isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return len(shape) > 1
    # a loose tensor: "position_embedding", "embedding.embeddings"
    if last != "weight":
        return bool(EMBEDDING.fullmatch(last))
    return layer is None and len(shape) == 2 and bool(EMBEDDING.fullmatch(holder))


def _kind_of_layer(layer: nn.Module, axes: int) -> str:
    if is_conv1d(layer):
        return CONV1D
    if isinstance(layer, _ConvTransposeNd):
        return "transposed convolution"
    if isinstance(layer, _ConvNd):
        return CONVOLUTION if is_plain_conv(layer) else "convolution with groups, dilation or padding of its own"
    # the latter is in nn.MultiheadAttention, which reads its weight and goes past its forward
    if is_linear(layer) and not isinstance(layer, NonDynamicallyQuantizableLinear):
        return LINEAR
    return LOOSE if axes == 2 else f"stack of matrices ({axes} axes)"


def stores_conv1d(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Are GPT-2's matrices stored (in, out) here?

    Its c_attn and c_fc widen, so (in, out) is wider than tall and (out, in) is not.
    """
    return any(shape[0] < shape[1] for name, shape in shapes.items()
               if name.endswith(("c_attn.weight", "c_fc.weight")) and len(shape) == 2)
