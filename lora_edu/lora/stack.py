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
from pathlib import Path

import torch
from torch import nn

from lora_edu.lora.adapter_file import Fitted, fit_adapter
from lora_edu.lora.factors import refuse_adapted
from lora_edu.lora.inject import all_or_nothing, check_layers, choose_layers, linear_layers, replace, share_weights
from lora_edu.lora.layer import LoRALinear, features, is_linear
from lora_edu.lora.quantized import is_quantized
from lora_edu.lora.settings import LoRASettings, scaling_of
from lora_edu.lora.targets import plain_name, shorten, unwrap_to_train, weight_readers
from lora_edu.numbers import real, whole


class StackedLinear(nn.Module):
    """A frozen linear layer with G updates beside it; made by `LoRAStack`.

    Shapes: lora_A (G, R, in_features), lora_B (G, R, out_features), transposed so that one adapter's rows lie together;
    scaling (G, 1, 1), 0 for an adapter that leaves this layer alone. x (rows, ..., in_features) -> y (rows, ...,
    out_features).
    """

    def __init__(self, base_layer: nn.Module, ranks: list[int], scalings: list[float], routing: dict):
        super().__init__()
        self.base_layer, self.routing = base_layer.requires_grad_(False), routing
        self.ranks, self.scalings = ranks, scalings                  # Python's numbers; the buffer has the dtype's
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

    @torch.no_grad()
    def put(self, i: int, A: torch.Tensor | None, B: torch.Tensor | None, scaling: float) -> None:
        """Adapter i's factors, (rank, in) and (out, rank); None: it leaves this layer alone."""
        self.ranks[i] = 0 if A is None else len(A)
        self.scaling[i] = self.scalings[i] = scaling
        self.lora_A[i], self.lora_B[i] = 0, 0
        if A is not None:
            self.lora_A[i, :len(A)], self.lora_B[i, :len(A)] = A, B.T

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
        ValueError: as `apply_lora`, with the number of the adapter in front; a model that has LoRA or a stack already,
            or that reads the sequence before the rows.

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
        model = unwrap_to_train(model)
        plans = [dict.fromkeys(target, (adapter.rank, adapter.scaling))
                 for adapter, target in zip(adapters, targets_of(model, adapters))]
        self._build(model, adapters, plans)
        for i in range(len(adapters)):
            self.reset(i)

    @classmethod
    def from_folders(cls, model: nn.Module, folders: Sequence[str | Path], any_base: bool = False) -> "LoRAStack":
        """The adapters of several folders over one base; their ranks, alphas and targets may differ.

        Raises:
            FileNotFoundError, ValueError: as `load_adapter`, with the number of the adapter in front; an adapter that
                brings a whole module (`modules_to_save`), which no row can have to itself.

        >>> import tempfile
        >>> from lora_edu import apply_lora, save_adapter
        >>> model, folder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), tempfile.mkdtemp()
        >>> _ = apply_lora(model, ["0"], rank=2), save_adapter(model, folder)
        >>> plain = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
        >>> len(LoRAStack.from_folders(plain, [folder, folder], any_base=True))
        2
        """
        model, stack = unwrap_to_train(model), cls.__new__(cls)
        refuse_adapted(model)
        linears, found = linear_layers(model), []
        for i, folder in enumerate(folders):
            found.append(_fitted(i, model, linears, folder, any_base))
        if not found:
            raise ValueError("no folders: give a list with at least one adapter's folder.")
        check_layers(model, list(dict.fromkeys(name for each in found for name in each.settings)))
        plans = [{name: (each["rank"], _scaling(each)) for name, each in one.settings.items()} for one in found]
        stack._build(model, [_as_settings(one) for one in found], plans)
        for i, one in enumerate(found):
            stack._put(i, one)
        model.eval()                            # as after load_adapter
        return stack

    def _build(self, model: nn.Module, adapters: Sequence[LoRASettings], plans: list[dict[str, tuple[int, float]]]):
        """Put the stack in place; plans: of each adapter, name of a layer -> rank and scaling there."""
        if turned := [name for name, part in model.named_modules() if getattr(part, "batch_first", True) is False]:
            raise ValueError(f"{shorten(turned, 1)} reads the sequence first (batch_first=False), and a stack takes "
                             "the first axis for its rows: build the model with batch_first=True, or put one adapter "
                             "alone on it.")
        self.model, self.adapters, self.routing = model, list(adapters), {"index": None}
        self.layers: dict[str, StackedLinear] = {}
        with all_or_nothing(model):
            model.requires_grad_(False)
            for name, base_layer in linear_layers(model).items():
                ranks, scalings = zip(*(plan.get(name, (0, 0.0)) for plan in plans))
                if any(ranks):
                    self.layers[name] = StackedLinear(base_layer, list(ranks), list(scalings), self.routing)
                    replace(model, name, self.layers[name])

    def load(self, i: int, folder: str | Path, any_base: bool = False) -> None:
        """Put the adapter of a folder in the place of adapter i; the others, and batches of theirs that are on their
        way, do not notice. (Rows that ask for i itself have to wait.)

        Raises (then nothing has been changed):
            FileNotFoundError, ValueError: as `from_folders`; a layer or a rank that the stack has no room for.
        """
        if whole(i) is None or not 0 <= i < len(self):
            raise ValueError(f"load({i!r}, …): this stack has the adapters 0 to {len(self) - 1}.")
        linears = {name: getattr(layer, "base_layer", layer) for name, layer in self.model.named_modules()
                   if name in self.layers or (is_linear(layer) and not name.endswith(".base_layer"))}
        found = _fitted(i, self.model, linears, folder, any_base)
        outside = [name for name, each in found.settings.items()
                   if name not in self.layers or each["rank"] > self.layers[name].lora_A.shape[1]]
        if outside:
            most = max(each["rank"] for each in found.settings.values())
            raise ValueError(f"adapter {i}: the stack has no room for {shorten(outside, 2)} at rank {most}: make it "
                             "with an adapter of this rank on these layers.")
        self.adapters[i] = _as_settings(found)
        self._put(i, found)

    def _put(self, i: int, found: Fitted) -> None:
        for name, layer in self.layers.items():
            A, B = (found.stored.get(f"{plain_name(name)}.lora_{end}.weight") for end in "AB")
            layer.put(i, A, B, _scaling(found.settings[name]) if A is not None else 0.0)

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
                rank = layer.ranks[i]
                alone = LoRALinear.wrap(alone, rank, adapter.alpha, rslora=adapter.rslora, any_rank=True)
                alone.scaling = layer.scalings[i]
                alone.lora_A.data.copy_(layer.lora_A[i, :rank].detach())
                alone.lora_B.data.copy_(layer.lora_B[i, :rank].detach().T)
            replace(model, name, alone)
        return model

    def remove(self) -> None:
        """Give the model its plain layers back."""
        for name, layer in self.layers.items():
            replace(self.model, name, layer.base_layer)
        self.layers = {}


def _fitted(i: int, model: nn.Module, linears: dict, folder: str | Path, any_base: bool) -> Fitted:
    try:
        found = fit_adapter(model, linears, Path(folder), any_base)
        _refuse_silent(model, list(found.settings))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"adapter {i}: {error}") from None
    if found.heads:
        raise ValueError(f"adapter {i}: {folder} replaces whole modules ({shorten(list(found.heads), 2)}), and all "
                         "rows share them: load it alone, with load_adapter.")
    return found


def _refuse_silent(model: nn.Module, names: list[str]) -> None:
    readers = weight_readers(model)
    if silent := [name for name in names if name in readers]:
        raise ValueError(f"the layer around {shorten(silent)} reads the weight and may go past the stack: leave it out "
                         "of target_modules, or put one adapter alone on the model.")


def _scaling(settings: dict) -> float:
    return scaling_of(settings["rank"], settings["alpha"], settings["rslora"])


def _as_settings(found: Fitted) -> LoRASettings:
    """What a folder brought, as settings: the largest rank and its alpha; layers may have their own."""
    most = max(found.settings.values(), key=lambda each: each["rank"])
    return LoRASettings(most["rank"], most["alpha"], tuple(found.settings), most["rslora"])


def targets_of(model: nn.Module, adapters: Sequence[LoRASettings]) -> list[list[str]]:
    """Names of the layers that each adapter asks for; all of `LoRAStack`'s checks are made here, and raise as it
    says.
    """
    if not adapters:
        raise ValueError("no adapters: give a list with at least one LoRASettings(rank=…, alpha=…).")
    targets = []
    for i, adapter in enumerate(adapters):
        try:
            if real(adapter.lr) is None:
                raise ValueError(f"lr={adapter.lr!r} is not finite, or no number: choose one such as 0.01.")
            if whole(adapter.seed) is None:
                raise ValueError(f"seed={adapter.seed!r} is no whole number: choose one such as 0.")
            targets.append(list(choose_layers(model, adapter.target_modules, adapter.rank, adapter.alpha)))
            _refuse_silent(model, targets[-1])
        except ValueError as error:
            raise ValueError(f"adapter {i}: {error}") from None
    return targets
