"""The one training loop: a generator that yields a `Step` after each optimizer step.

A progress bar, a live plot, a stop button, a test and the pretraining of fable are readers of this same loop. A batch
is a pair (inputs, targets) of token ids (B, T): targets[:, t] is the token that follows inputs[:, t], and -100 where no
loss counts. Losses are nats per token.
"""
import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.lora.factors import layers_without_gradient
from lora_edu.lora.targets import shorten
from lora_edu.numbers import real, whole
from lora_edu.training.compiled import compiled
from lora_edu.training.group import Batch, Group, cut
from lora_edu.training.loss_scale import LossScale


class Diverged(ValueError):
    """A loss or a gradient is not finite; the training has stopped before it reached the weights."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: `step` counts from 1; `loss` (nats per token) is that of the batch before the
    update; `skipped`: the gradient overflowed in float16, and no weight moved.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    skipped: bool = False


def constant(step: int, steps: int) -> float:
    """The learning rate as given, at every step."""
    return 1.0


def warmup_linear(warmup: float = 0.05) -> Callable[[int, int], float]:
    """Rise over the first `warmup` (a share of all steps), then fall in a straight line to zero."""
    def factor(step: int, steps: int) -> float:
        rising = max(1.0, warmup * steps)
        return min((step + 1) / rising, (steps - step) / max(1.0, steps - rising))
    return factor


def cross_entropy(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """What is computed of `loss_on`, and nothing that is checked: torch.compile takes it whole."""
    logits = model(inputs)
    logits = getattr(logits, "logits", logits)                          # (B, T, vocab)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def loss_on(model: nn.Module, batch: Batch, reduction: str = "mean", compute: Callable = cross_entropy) -> torch.Tensor:
    """Cross-entropy of the next token, in float32 or wider.

    The model returns logits, or an object that has `.logits`. Raises ValueError for what is no batch.
    """
    check_batch(batch)
    device = next(model.parameters()).device
    inputs, targets = (t.to(device, torch.long) for t in batch)
    try:
        return compute(model, inputs, targets, reduction)
    except IndexError as error:
        raise ValueError(f"a token id of this batch is not in the model's vocabulary ({error}): inputs are "
                         f"{inputs.min()} to {inputs.max()}, targets {targets.min()} to {targets.max()}; use the "
                         "model's own tokenizer.") from None


def check_batch(batch: Batch) -> None:
    """Raise ValueError for anything else than (inputs, targets), whole numbers (B, T), the targets one token on."""
    if isinstance(batch, dict) or (isinstance(batch, (tuple, list)) and len(batch) == 3):
        ids, labels = ("batch['input_ids']", "batch['labels']") if isinstance(batch, dict) else ("ids", "labels")
        raise ValueError(f"a batch is a pair (inputs, targets), and this is a {type(batch).__name__} of {len(batch)}: "
                         f"give ({ids}[:, :-1], {labels}[:, 1:]), shifted by one, with -100 where no loss counts, in "
                         "the padding too.")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, torch.Tensor) for t in batch):
        raise ValueError(f"a batch is a pair (inputs, targets) of token ids (B, T), and this is a "
                         f"{type(batch).__name__}: give tensors, and a list of such pairs where batches are asked for.")
    inputs, targets = batch
    if inputs.shape != targets.shape or inputs.ndim != 2 or any(t.is_floating_point() or t.is_complex() for t in batch):
        raise ValueError(f"inputs {tuple(inputs.shape)} of {inputs.dtype} and targets {tuple(targets.shape)} of "
                         f"{targets.dtype} are no batch: give whole numbers, both (B, T).")
    counted = targets != -100
    if targets.device == inputs.device and torch.equal(inputs[counted], targets[counted]) and (
            len(inputs[counted].unique()) > 1):
        raise ValueError("the targets are the inputs themselves, so the model would learn to repeat: targets[:, t] is "
                         "the token that follows inputs[:, t], as in (ids[:, :-1], ids[:, 1:]).")


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the whole model is in this mode; afterwards every module is in its own again."""
    were = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in were:
            module.training = was


def evaluate(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean loss in nats per token over all tokens that count, in eval mode; the model's mode is put back.

    Args:
        batches: (inputs, targets), token ids (B, T); targets are -100 where no loss counts.

    Raises ValueError if no token counts.

    >>> from lora_edu import load_pretrained
    >>> from lora_edu.training import bistro
    >>> model, tokenizer = load_pretrained()
    >>> 4 < evaluate(model, bistro.heldout(tokenizer, 8)) < 5
    True
    """
    total, tokens = 0.0, 0
    with mode(model, training=False), torch.no_grad():
        for batch in batches:
            total += loss_on(model, batch, "sum").item()
            tokens += (batch[1] != -100).sum().item()
    if not tokens:
        raise ValueError("evaluate got no token that counts: give at least one batch whose targets are not all -100.")
    return total / tokens


def sixteen_bits(device: torch.device) -> torch.dtype | None:
    """The 16-bit type that the hardware itself multiplies faster than float32, else None.

    bfloat16 on a GPU of compute capability 8.0 (A100, L4) or more, float16 on 7.0 and 7.5 (V100, and the T4 that Colab
    lends, where bfloat16 is emulated); bfloat16 on a CPU with AVX512-BF16.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device)[0] >= 7 else None
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)     # absent before torch 2.6: float32 then
    return torch.bfloat16 if device.type == "cpu" and has() else None


def adamw(model: nn.Module, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW on what is trainable; only matrices decay. Raises ValueError when everything is frozen."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen. Call apply_lora(model, …), or "
                         "model.requires_grad_(True).")
    groups = [{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas)


def train(model: nn.Module, batches: Iterable[Batch], steps: int, lr: float, *,
          schedule: Callable[[int, int], float] = warmup_linear(), optimizer: torch.optim.Optimizer | None = None,
          max_grad_norm: float | None = 1.0, autocast: torch.dtype | None = None,
          first_step: int = 0, compile: bool = False, processes: Group = Group(), pieces: int = 1) -> Iterator[Step]:
    """Train what is trainable, in place, and yield a `Step` after each optimizer step.

    Stop whenever you like: what has been learned stays in the model, and its mode (train or eval) is put back.

    Args:
        batches: as many as there are steps; a list shorter than that is an error, so no step is skipped in silence.
        lr: the highest learning rate; `schedule(step, steps)` multiplies it.
        optimizer: by default `adamw(model)`: no weight decay, betas (0.9, 0.999).
        max_grad_norm: gradients are scaled down to this norm where theirs is larger; None leaves them.
        autocast: torch.bfloat16 or torch.float16 computes matrix products in 16 bits on a device that can
            (`sixteen_bits`); weights keep their dtype. In float16 the loss is scaled, and a step that overflows is
            skipped.
        first_step: go on from here (with the optimizer of the earlier part, and its batches left out).
        processes: this process among several: it takes its rows of every batch.
        pieces: a batch goes through in so many, rows after rows, and the gradients are added up ("accumulated"): the
            same step, in the memory of one piece.
        compile: through torch.compile, rows padded to a multiple of 16 tokens. The first steps take half a minute.

    Raises:
        ValueError: nothing trains (all is frozen, the optimizer holds other parameters, no target counts, the first
            gradient is zero), a factor is in 16 bits, a number that is none, what is no batch, or batches that end
            early.
        Diverged: a loss or gradient is not finite. A LoRA then has the weights that gave the last finite loss; where
            much trains, no copy is kept, and what is not finite has not been added.

    It warns once, after the first backward pass, of adapted layers that got no gradient.

    Shapes: each batch is (inputs, targets), both (B, T), targets -100 where no loss counts.

    >>> from lora_edu import apply_lora, load_pretrained
    >>> from lora_edu.training import bistro
    >>> model, tokenizer = load_pretrained()
    >>> _ = apply_lora(model, rank=4)
    >>> [step.step for step in train(model, bistro.batches(tokenizer, 2, batch_size=2), steps=2, lr=1e-2)]
    [1, 2]
    """
    optimizer = optimizer or adamw(model)
    trained = check_training(model, optimizer, steps, lr)
    device, lr, steps = trained[0].device, real(lr), whole(steps)
    few = sum(p.numel() for p in trained) * 10 < sum(p.numel() for p in model.parameters())
    last = [p.detach().clone() for p in trained] if few else None
    loss_of, scale, moved = compiled(loss_on, cross_entropy) if compile else loss_on, LossScale(1, autocast), False
    batches = iter(batches)
    with mode(model, training=True):
        for step in range(first_step, steps):
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step - first_step} steps, "
                                 f"and {steps - first_step} were asked for.")
            check_batch(batch)
            batch = processes.mine(batch, pieces)
            tokens = processes.total((batch[1] != -100).sum().item(), device)
            if not tokens:
                raise ValueError(f"step {step + 1}: no token of the batch counts, all its targets are -100: look at "
                                 "how the prompt is masked and where the text is cut.")
            now = lr * schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = now
            optimizer.zero_grad(set_to_none=True)
            part = add_gradient(model, batch, loss_of, tokens, pieces, processes, scale.scales[0], autocast)
            processes.check_reached(trained, first=not moved)
            scale.unscale(0, trained)
            norm = nn.utils.clip_grad_norm_(trained, max_grad_norm if max_grad_norm is not None else float("inf"))
            norm = getattr(norm, "full_tensor", lambda: norm)().item()        # of shards: over all processes
            mean = processes.total(part, device)
            skipped = scale.skips(0, mean, norm)
            if not skipped:
                check_step(model, trained, last, step, mean, norm, first=not moved)
                optimizer.step()
                moved = True
            yield Step(step + 1, mean, now, norm, batch[0].numel() / (time.perf_counter() - began), skipped)


def check_training(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, lr: float) -> list[nn.Parameter]:
    """The parameters that the optimizer trains; ValueError where that is none of the model's, or cannot work."""
    if whole(steps) is None or whole(steps) < 1 or real(lr) is None or real(lr) < 0:
        raise ValueError(f"steps={steps!r}, lr={lr!r}: choose a whole number of steps, 1 or more, and a finite rate "
                         "such as 0.001.")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not any(id(p) in own for p in trained):
        raise ValueError(f"the optimizer holds {len(trained)} tensors, and none of them is one of the {len(own)} that "
                         "train in this model: make it after apply_lora, of lora_parameters(model).")
    held, factors = {id(p) for p in trained}, [key for key in own if own[key].endswith(("lora_A", "lora_B"))]
    left = [own[key] for key in factors if key not in held]
    if left:
        raise ValueError(f"the optimizer does not hold {shorten(left, 2)}, which train in this model: make it after "
                         "apply_lora, of all that trains.")
    narrow = [own[id(p)] for p in trained if p.dtype in (torch.float16, torch.bfloat16) and id(p) in factors]
    if narrow:
        raise ValueError(f"{shorten(narrow, 2)} are in 16 bits, which round small steps away: move the model to its "
                         "dtype before apply_lora, which makes factors in float32, or set p.data = p.data.float() for "
                         "each p of lora_parameters(model).")
    if any(p.is_inference() or p.is_meta for p in model.parameters()):
        raise ValueError("a parameter has no values (meta device), or was made under torch.inference_mode: load the "
                         "model outside of it, and onto a device.")
    return trained


def add_gradient(model: nn.Module, batch: Batch, loss_of: Callable, tokens: float, pieces: int, processes: Group,
                 scale: float, autocast: torch.dtype | None) -> float:
    """Add up the gradient of a mean over so many tokens, of all processes, a piece of this one's rows after another;
    returns what these rows are of that mean. DDP and FSDP2 divide what they send by the number of processes.
    """
    part, cuts, device = 0.0, cut(batch, pieces, "pieces"), next(model.parameters()).device
    for i, piece in enumerate(cuts, 1):
        with processes.sending(model, i == len(cuts)):
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = loss_of(model, piece, "sum") / tokens
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on anything that trains: is the adapted layer used, and "
                                 "gradients enabled?")
            (loss * (scale * processes.size)).backward()
        part += loss.item()
    return part


@torch.no_grad()
def check_step(model: nn.Module, trained: list[nn.Parameter], last: list[torch.Tensor] | None, step: int, loss: float,
               norm: float, first: bool) -> None:
    """Between the backward pass and the update: is all finite, and does anything move? `last` is brought up to date."""
    if not math.isfinite(loss + norm):
        for p, before in zip(trained, last or []):
            p.copy_(before)
        raise Diverged(f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}. The training stops here"
                       + ("; the weights are those of the last finite loss" if last else "")
                       + ". Try a smaller learning rate, or bfloat16 or float32 in place of float16.")
    if first and not norm:
        raise ValueError("the gradient of the first step is exactly zero, so nothing would move: is alpha 0, or lora_A "
                         "and lora_B both zero, or the adapted layer not used?")
    silent = layers_without_gradient(model) if first else []
    if silent:
        warnings.warn(f"these adapted layers got no gradient: {shorten(silent)}. What reads their weight and goes past "
                      "their forward, or did not use them for this batch, leaves them as they are.", stacklevel=3)
    for p, kept in zip(trained, last or []):
        kept.copy_(p)


def fit(model: nn.Module, batches: Iterable[Batch], steps: int, lr: float, **how) -> list[Step]:
    """`train` behind a progress bar. The stop button (KeyboardInterrupt) ends it and keeps what was learned. Steps that
    overflowed in float16 are counted in one line.

    Takes and raises what `train` does, and returns its steps; losses are nats per token.

    >>> from lora_edu import apply_lora, load_pretrained
    >>> from lora_edu.training import bistro
    >>> model, tokenizer = load_pretrained()
    >>> _ = apply_lora(model, rank=4)
    >>> len(fit(model, bistro.batches(tokenizer, 2, batch_size=2), steps=2, lr=1e-2))
    2
    """
    from tqdm.auto import tqdm  # late: `import lora_edu` does not need it
    done: list[Step] = []
    with tqdm(total=steps, initial=how.get("first_step", 0), unit="step", leave=False) as bar:
        try:
            for step in train(model, batches, steps, lr, **how):
                done.append(step)
                bar.update()
                bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
        except KeyboardInterrupt:
            print(f"Stopped after {len(done)} of {steps} steps; the model keeps what it has learned.")
    if skipped := sum(step.skipped for step in done):
        print(f"{skipped} of {len(done)} steps overflowed in float16 and were skipped.")
    return done
