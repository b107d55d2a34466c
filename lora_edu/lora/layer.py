"""A linear layer that learns a low-rank update to frozen weights.

Notebook 01 builds this class line by line; everything else in the course wraps a model with it.
Read `LoRALinear.forward` first: its docstring is the whole idea.

Source: Hu et al. (2021), "LoRA", section 4.1, arXiv:2106.09685.
"""
import functools

import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.lora.quantized import base_weight, is_quantized
from lora_edu.lora.settings import check_settings, scaling_of
from lora_edu.numbers import real

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
         "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored (in_features, out_features).

    Known by its name and shape, so that this package need not import transformers.
    """
    named = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")      # first: a weight may be computed when read
    return named and getattr(getattr(layer, "weight", None), "ndim", 0) == 2


def is_linear(layer: nn.Module) -> bool:
    """Can `LoRALinear.wrap` take this layer?"""
    return isinstance(layer, nn.Linear) or is_quantized(layer) or is_conv1d(layer)


def is_plain_conv(layer: nn.Module) -> bool:
    """Is it a convolution that two smaller ones can stand beside? PEFT's know kernel, stride and padding, no more."""
    plain = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1 and set(layer.dilation) == {1}
    return plain and layer.padding_mode == "zeros"


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a layer that `is_linear`; of a convolution, seen as a matrix over patches."""
    if is_quantized(layer):                            # without making its weight
        return layer.in_features, layer.out_features
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    return (rows, columns) if is_conv1d(layer) else (columns, rows)


def check_weight(layer: nn.Module) -> None:
    """Raise ValueError unless the weight of a layer that `is_linear` is a plain tensor of floating numbers, with
    values, and kept by the layer itself; or, of a quantised layer, made anew from what it keeps.
    """
    if is_quantized(layer):
        return
    weight = layer._parameters.get("weight", layer._buffers.get("weight"))
    if weight is None:
        raise ValueError("its weight is computed (by weight_norm, spectral_norm, pruning or the like), and what a "
                         "merge writes there would be lost: make it a plain weight first, with "
                         "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove.")
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dtype not in FLOATS or weight.layout != torch.strided:
        dtype = str(getattr(weight, "dtype", "")).removeprefix("torch.")
        raise ValueError(f"its weight is a {type(weight).__name__} of {dtype} numbers, and LoRA goes beside plain "
                         "float32, float64, float16 or bfloat16: load the model without quantisation, and apply LoRA "
                         "before the model is sharded.")
    if weight.is_meta:
        raise ValueError("its weight has no values (it is on the meta device, as an offloaded layer's is): load the "
                         "whole model to one device first.")


def has_own_forward(layer: nn.Module) -> bool:
    """Does it compute something else than x Wᵀ + b? Then no merged weight can stand for it."""
    own = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return "forward" in vars(layer) or not (is_conv1d(layer) or is_quantized(layer) or type(layer).forward in own)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """What was hooked on `old` runs on `new`, which takes its place; the handles go on working."""
    if old is not new:
        for name in HOOKS:
            theirs, own = vars(old)[name], vars(new)[name]
            if not theirs:
                continue
            if isinstance(theirs, dict):                    # the same object: a handle knows the dict, not the module
                theirs.update(own)
            vars(old)[name], vars(new)[name] = type(theirs)() if isinstance(theirs, dict) else None, theirs


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of them, and float32 at least: what sums of weights are made in."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def rounded_sum(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """weight + delta in weight's dtype: the sum is made in float32 or wider, then rounded once.

    Raises:
        ValueError: an entry of delta, or of the sum, is not finite.
    """
    shape = " x ".join(map(str, weight.shape))
    if not delta.isfinite().all():
        raise ValueError(f"the update of this {shape} weight is not finite, so it is not merged and the weights stay "
                         "as they were: train again with a smaller learning rate.")
    wide = wide_dtype(weight.dtype, delta.dtype)
    folded = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
    if not folded.isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"this {shape} weight plus its update is not finite in {dtype} (largest: "
                         f"{torch.finfo(weight.dtype).max:.4g}), so it is not merged and the weights stay as they "
                         "were: load the model in bfloat16 or float32.")
    return folded


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of rank ``rank``.

    ``y = base_layer(x) + scaling * x @ lora_A.T @ lora_B.T`` with ``scaling = alpha / rank``.
    ``lora_B`` starts at zero, so a new layer returns exactly what ``base_layer`` returns.

    Args:
        in_features, out_features: size of the frozen weight, (out_features, in_features).
        rank: inner dimension r, 1 <= rank <= min(in_features, out_features).
        alpha: numerator of ``scaling``, no unit. PEFT calls it ``lora_alpha``.
        dropout: share of the inputs of ``lora_A`` that is zeroed in training mode.
        base_layer: the frozen layer; made new (an nn.Linear) when left out. See `wrap`.
        rslora: ``scaling = alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732).
        any_rank: take a rank above the smaller side, too: files have them, and it adds nothing.

    Attributes:
        weight: what the layer computes with, for whoever reads it: W₀ apart, the merged weight while merged. W₀ is
            ``base_layer.weight``, and no merge changes it.
        read_by_parent: the layer around this one reads `weight` and may go past `forward`: then `weight` is W₀ +
            update apart, too (`apply_lora` sets it).

    Shapes:
        lora_A (rank, in_features), Kaiming-uniform as in loralib (the paper: Gaussian)
        lora_B (out_features, rank), zeros
        x (..., in_features) -> y (..., out_features)

    The factors have the base's dtype, or float32 over a 16-bit base (as in PEFT): small updates need the digits.

    Raises:
        ValueError: a rank outside the range above, an alpha that is no finite number, a dropout that is no share; a
            base whose weight is no plain tensor of floating numbers.

    Source: Hu et al. (2021), "LoRA", section 4.1, arXiv:2106.09685.

    >>> layer, x = LoRALinear(96, 64, rank=4, alpha=8), torch.randn(5, 96)
    >>> torch.equal(layer(x), layer.base_layer(x))      # lora_B is zero
    True
    >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)     # 4 * (96 + 64)
    640
    """

    merged_weight: torch.Tensor | None
    takes, TAKEN = staticmethod(is_linear), "nn.Linear, transformers' Conv1D and a quantised layer"

    def __init__(self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
                 base_layer: nn.Module | None = None, rslora: bool = False, any_rank: bool = False):
        super().__init__()
        largest = float("inf") if any_rank else min(in_features, out_features)
        rank, alpha, dropout = check_settings(in_features, out_features, rank, alpha, dropout, largest)
        base_layer = nn.Linear(in_features, out_features) if base_layer is None else base_layer
        check_weight(base_layer)
        self.register_buffer("merged_weight", None, persistent=False)   # state_dict() is the same merged or not
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, bool(rslora)
        self.scaling = scaling_of(rank, alpha, rslora)
        self.off = False                     # see `lora_off`
        self.read_by_parent = False
        weight = base_layer.weight
        small = is_quantized(base_layer) or weight.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if small else weight.dtype
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.base_layer = base_layer.requires_grad_(False)
        self.register_load_state_dict_post_hook(_merge_anew)

    @classmethod
    def wrap(cls, base_layer: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, rslora: bool = False,
             any_rank: bool = False) -> "LoRALinear":
        """The same, around a layer that exists (nn.Linear, or transformers' Conv1D): it is frozen in place, not
        copied, and its hooks run on the new layer.
        """
        if isinstance(base_layer, cls):
            raise ValueError("this layer is a LoRALinear already: wrap its base_layer, or remove_lora first.")
        if not cls.takes(base_layer):
            raise TypeError(f"a {type(base_layer).__name__} cannot be wrapped: {cls.__name__} takes {cls.TAKEN}.")
        check_weight(base_layer)
        layer = cls(*features(base_layer), rank, alpha, dropout, base_layer, rslora, any_rank)
        move_hooks(base_layer, layer)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The formula is ``base_layer(x) + scaling * (x @ lora_A.T) @ lora_B.T``; `_add_update` says why its lines
        are longer.
        """
        if self.off:
            return self.base_layer(x)
        if self.merged_weight is not None:
            return self._merged_forward(x)
        return self._add_update(self.base_layer(x), x)

    def _add_update(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + scaling * x @ lora_A.T @ lora_B.T: two thin products, never the full B A."""
        if not torch.is_autocast_enabled(x.device.type):          # else narrowed again, one copy kept a layer
            x = x.to(self.lora_A.dtype)                           # a 16-bit base: made in float32, as in PEFT
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        low = x.reshape(-1, self.in_features) @ self.lora_A.T     # (N, rank)
        wide = y.reshape(-1, self.out_features).to(low.dtype)     # the sum in float32 too: rounded once, at the end
        # one call adds, scales and multiplies, which saves going over the output three times. The contiguous copy of
        # the thin factor costs nothing, and the two products of its backward run twice as fast on a CPU
        return torch.addmm(wide, low, self.lora_B.T.contiguous(), alpha=self.scaling).reshape(y.shape).to(y.dtype)

    def _merged_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("a merged layer cannot train, its factors are out of the sum: "
                               "call unmerge(), or eval() to use it.")
        if any(vars(self.base_layer)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
            return torch.func.functional_call(self.base_layer, {"weight": self.merged_weight}, (x,))
        return self._plain_forward(x, self.merged_weight)

    def _plain_forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.T if is_conv1d(self.base_layer) else weight, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """What the layer computes with, (out_features, in_features), or transposed in a Conv1D: see the class."""
        base = base_weight(self.base_layer)
        if self.off or not (self.merged or self.read_by_parent):
            return base
        return self.merged_weight if self.merged else (base + self._laid_out(self.delta_weight())).to(base.dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    @property
    def file_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B in PEFT's files."""
        return (self.rank, self.in_features), (self.out_features, self.rank)

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by. Setting it raises RuntimeError while the layer is merged."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        if self.merged:
            raise RuntimeError("this layer is merged, and the merged weight would not follow: call unmerge() first.")
        if real(value) is None:
            raise ValueError(f"scaling={value!r} is no finite number: choose one such as {self.alpha / self.rank:g}.")
        self._scaling = real(value)

    def set_strength(self, strength: float) -> None:
        """Count the update `strength` times: 0 is the base, 1 what was trained."""
        if real(strength) is None:
            raise ValueError(f"strength={strength!r} is no finite number: 0 is the base, 1 what was trained.")
        self.scaling = real(strength) * scaling_of(self.rank, self.alpha, self.rslora)

    def delta_weight(self) -> torch.Tensor:
        """The update ``scaling * lora_B @ lora_A``, (out_features, in_features), in the factors' dtype."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def _laid_out(self, update: torch.Tensor) -> torch.Tensor:
        """An update (out_features, in_features) as W₀ is stored."""
        return update.T if is_conv1d(self.base_layer) else update

    @torch.no_grad()
    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W₀ plus the update, and the update, both laid out as W₀: see `rounded_sum`. The layer is not changed.

        Raises:
            RuntimeError: the layer is in training mode with dropout, which a merged weight cannot do.
            ValueError: an entry of the update, or of the sum, is not finite; the base layer has a forward of its own,
                or its weight is no plain tensor any more.
        """
        check_weight(self.base_layer)
        if has_own_forward(self.base_layer):
            raise ValueError(f"a {type(self.base_layer).__name__} has a forward of its own, and no merged weight can "
                             "stand for that: use the layer as it is, with its update beside it.")
        if self.dropout and self.training:
            raise RuntimeError(f"the layer is in training mode with dropout={self.dropout:g}, which a merged weight "
                               "leaves out: call model.eval() first, then merge.")
        base = base_weight(self.base_layer)
        wide = wide_dtype(base.dtype, self.lora_A.dtype)
        with torch.autocast(base.device.type, enabled=False):         # it would make the product in 16 bits
            delta = self._laid_out(self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide)))
        return rounded_sum(base, delta), delta

    def folded_weight(self) -> torch.Tensor:
        """W₀ plus the update, laid out and typed as W₀; raises what `fold` raises."""
        return self.fold()[0]

    def merge(self) -> None:
        """Compute W₀ + update once and use it from now on: one matrix product instead of three.

        W₀ is kept beside it (the price is one more copy of the matrix), so that `unmerge` gives it back bit for bit.
        """
        if self.merged:
            raise RuntimeError("this layer is merged already: unmerge() first.")
        self.merged_weight = self.folded_weight()

    def unmerge(self) -> None:
        """Forget the merged weight: W₀ was never touched."""
        if not self.merged:
            raise RuntimeError("this layer is not merged: there is nothing to unmerge.")
        self.merged_weight = None

    def extra_repr(self) -> str:
        rule = ", rslora=True" if self.rslora else ""
        return (f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, dropout={self.dropout:g}, "
                f"merged={self.merged}{rule}")


def _merge_anew(layer: LoRALinear, _) -> None:
    """After load_state_dict: a merged layer follows what was loaded; apart, if the new numbers cannot be merged."""
    if layer.merged:
        layer.unmerge()
        layer.merge()
