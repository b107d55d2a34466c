"""Many adapters over one frozen base, in one forward pass: `LoRAStack`.

G adapters share every product with a frozen weight; only the thin ones are their own. Their factors lie in one tensor
per layer, (G, R, in) and (G, R, out), R the largest rank: a smaller adapter fills the first rows, and the rest are
zeros that no optimizer ever sees. A batch brings G groups of rows, one for each adapter; or a number per row says which
adapter it wants.

Sources: Hu et al. (2021), section 4.1, for one adapter; Chen et al. (2023), "Punica", arXiv:2310.18547, for many in a
batch.
"""
import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from lora_edu.lora.inject import all_or_nothing, choose_layers, linear_layers, replace, share_weights
from lora_edu.lora.layer import LoRALinear, features
from lora_edu.lora.quantized import is_quantized
from lora_edu.lora.settings import LoRASettings
from lora_edu.numbers import real, whole
from lora_edu.lora.targets import shorten, unwrap, weight_readers


class StackedLinear(nn.Module):
    """A frozen linear layer with G updates beside it; made by `LoRAStack`.

    Shapes: lora_A (G, R, in_features), lora_B (G, R, out_features), transposed so that one adapter's rows lie together;
    scaling (G, 1, 1), 0 for an adapter that leaves this layer alone. x (rows, ..., in_features) -> y (rows, ...,
    out_features).
    """

    def __init__(self, base_layer: nn.Module, ranks: list[int], scalings: list[float], routing: dict):
        super().__init__()
        self.base_layer, self.ranks, self.routing = base_layer.requires_grad_(False), ranks, routing
        weight, (into, out) = base_layer.weight, features(base_layer)
        small = is_quantized(base_layer) or weight.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if small else weight.dtype
        like = dict(dtype=dtype, device=weight.device)
        self.lora_A = nn.Parameter(torch.zeros(len(ranks), max(ranks), into, **like))
        self.lora_B = nn.Parameter(torch.zeros(len(ranks), max(ranks), out, **like))
        self.register_buffer("scaling", torch.tensor(scalings, **like)[:, None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        index, A, B, scaling = self.routing["index"], self.lora_A, self.lora_B, self.scaling
        if index is not None:                                        # a row, an adapter: gather the factors
            A, B, scaling = A[index], B[index], scaling[index]
        if x.shape[0] % len(A) or (index is not None and x.shape[0] != len(A)):
            raise ValueError(f"{x.shape[0]} rows for {len(A)} {'chosen ' if index is not None else ''}adapters: give "
                             "each adapter as many rows as the others, its rows together, or name an adapter for "
                             "every row with `stack.rows([...])`.")
        groups = x.to(A.dtype).reshape(len(A), -1, x.shape[-1])      # (G, N, in)
        low = groups @ A.transpose(1, 2) * scaling                   # (G, N, R)
        wide = y.reshape(len(A), -1, y.shape[-1]).to(low.dtype)
        return torch.baddbmm(wide, low, B.to(low.dtype)).reshape(y.shape).to(y.dtype)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"


class LoRAStack:
    """Put G adapters, one for each of a list of `LoRASettings`, on a model, in place: `model(ids)` then reads G groups
    of rows, one group for each adapter.

    The same numbers as one adapter at a time: adapter i starts as `torch.manual_seed(seed); apply_lora(model, ...)`
    would start it, its loss does not depend on its neighbours, and what pads it to the largest rank stays exactly zero,
    because only `parameters_of(i)` are handed to an optimizer. Move the model to its device first: `.to()` would part
    the stack from its optimizer.

    Shapes: ids (rows, T) -> logits (rows, T, vocab), rows a multiple of G, or as many as `rows` names.

    Raises:
        ValueError: as `apply_lora`, with the number of the adapter in front; a model that has LoRA or a stack already.

    Source: Chen et al. (2023), "Punica", arXiv:2310.18547, for a batch whose rows use different adapters.

    >>> model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> adapters = [LoRASettings(rank=rank, target_modules=["0"]) for rank in (2, 4)]
    >>> stack = LoRAStack(model, adapters)
    >>> model(torch.randn(6, 12)).shape       # three rows for each
    torch.Size([6, 3])
    >>> with stack.rows([1, 0, 1]):           # or a number for each row
    ...     model(torch.randn(3, 12)).shape
    torch.Size([3, 3])
    """

    def __init__(self, model: nn.Module, adapters: Sequence[LoRASettings]):
        self.model = model = unwrap(model)
        targets = targets_of(model, adapters)
        self.adapters, self.routing = list(adapters), {"index": None}
        self.layers: dict[str, StackedLinear] = {}
        with all_or_nothing(model):
            model.requires_grad_(False)
            for name, base_layer in linear_layers(model).items():
                ranks = [adapter.rank if name in target else 0 for adapter, target in zip(adapters, targets)]
                if any(ranks):
                    scalings = [adapter.scaling if rank else 0.0 for adapter, rank in zip(adapters, ranks)]
                    self.layers[name] = StackedLinear(base_layer, ranks, scalings, self.routing)
                    replace(model, name, self.layers[name])
            for i in range(len(adapters)):
                self.reset(i)

    def __len__(self) -> int:
        return len(self.adapters)

    @torch.no_grad()
    def reset(self, i: int) -> None:
        """Back to adapter i's start: lora_A drawn from its seed as `LoRALinear` draws it, lora_B zero."""
        with torch.random.fork_rng():
            torch.manual_seed(self.adapters[i].seed)
            for layer in self._of(i):
                layer.lora_B[i] = 0
                nn.init.kaiming_uniform_(layer.lora_A[i, :layer.ranks[i]], a=5**0.5)

    def parameters_of(self, i: int) -> list[nn.Parameter]:
        """Adapter i's factors, (rank, in) and (rank, out) by turns: views into the stack, made anew by each call, with
        their gradients.

        An optimizer over them trains this adapter and nothing else.
        """
        found = []
        for layer in self._of(i):
            for factor in (layer.lora_A, layer.lora_B):
                found.append(nn.Parameter(factor.data[i, :layer.ranks[i]]))
        return found

    def share_gradients(self, i: int, parameters: list[nn.Parameter]) -> None:
        """After a backward pass: point the gradients of `parameters` (from `parameters_of`) at the stack's."""
        factors = [(layer.ranks[i], factor) for layer in self._of(i) for factor in (layer.lora_A, layer.lora_B)]
        for parameter, (rank, factor) in zip(parameters, factors):
            parameter.grad = None if factor.grad is None else factor.grad[i, :rank]

    def zero_grad(self) -> None:
        for layer in self.layers.values():
            layer.lora_A.grad = layer.lora_B.grad = None

    def _of(self, i: int) -> list[StackedLinear]:
        return [layer for layer in self.layers.values() if layer.ranks[i]]

    @contextlib.contextmanager
    def rows(self, index: Sequence[int]):
        """Inside: row n of every input uses adapter index[n]. To serve one batch to users of different adapters."""
        index = torch.as_tensor(index)
        whole = index.dtype in (torch.int32, torch.int64)        # True and False would be a mask
        if index.ndim != 1 or not len(index) or not whole or not 0 <= index.min() <= index.max() < len(self):
            raise ValueError(f"rows({index.tolist()}): give one number from 0 to {len(self) - 1} for each row.")
        before, self.routing["index"] = self.routing["index"], index
        try:
            yield
        finally:
            self.routing["index"] = before

    def unstack(self, i: int) -> nn.Module:
        """A model with adapter i alone, in ordinary `LoRALinear` layers around the same frozen weights: nothing big is
        copied, so copy.deepcopy it before `remove_lora(merge=True)`, which writes into them. Moved to another device,
        it leaves the stack where it is.
        """
        adapter = self.adapters[i]
        model = share_weights(self.model)
        for name, layer in self.layers.items():
            alone = model.get_submodule(name).base_layer
            if layer.ranks[i]:
                alone = LoRALinear.wrap(alone, adapter.rank, adapter.alpha, rslora=adapter.rslora)
                alone.lora_A.data.copy_(layer.lora_A[i, :adapter.rank].detach())
                alone.lora_B.data.copy_(layer.lora_B[i, :adapter.rank].detach().T)
            replace(model, name, alone)
        return model

    def remove(self) -> None:
        """Give the model its plain layers back."""
        for name, layer in self.layers.items():
            replace(self.model, name, layer.base_layer)
        self.layers = {}


def targets_of(model: nn.Module, adapters: Sequence[LoRASettings]) -> list[list[str]]:
    """Names of the layers that each adapter asks for; all of `LoRAStack`'s checks are made here, and raise as it
    says.
    """
    if not adapters:
        raise ValueError("no adapters: give a list with at least one LoRASettings(rank=…, alpha=…).")
    targets, readers = [], weight_readers(model)
    for i, adapter in enumerate(adapters):
        try:
            if real(adapter.lr) is None:
                raise ValueError(f"lr={adapter.lr!r} is not finite, or no number: choose one such as 0.01.")
            if whole(adapter.seed) is None:
                raise ValueError(f"seed={adapter.seed!r} is no whole number: choose one such as 0.")
            chosen = list(choose_layers(model, adapter.target_modules, adapter.rank, adapter.alpha))
            if silent := [name for name in chosen if name in readers]:
                raise ValueError(f"the layer around {shorten(silent)} reads the weight and may go past the stack: "
                                 "leave it out of target_modules, or use apply_lora.")
            targets.append(chosen)
        except ValueError as error:
            raise ValueError(f"adapter {i}: {error}") from None
    return targets
