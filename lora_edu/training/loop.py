"""The one training loop: a generator that yields a `Step` after each optimizer step.

A progress bar, a live plot, a stop button, a test and the pretraining of fable are readers of this same loop. A batch
is a pair (inputs, targets) of token ids (B, T): targets[:, t] is the token that follows inputs[:, t], and -100 where no
loss counts. Losses are nats per token.
"""
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: `step` counts from 1; `loss` (nats per token) is that of the batch before the
    update.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float


def constant(step: int, steps: int) -> float:
    """The learning rate as given, at every step."""
    return 1.0


def warmup_linear(warmup: float = 0.05) -> Callable[[int, int], float]:
    """Rise over the first `warmup` (a share of all steps), then fall in a straight line to zero."""
    def factor(step: int, steps: int) -> float:
        rising = max(1.0, warmup * steps)
        return min((step + 1) / rising, (steps - step) / max(1.0, steps - rising))
    return factor


def loss_on(model: nn.Module, batch: Batch, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the next token, in float32 or wider.

    The model returns logits, or an object that has `.logits`.
    """
    device = next(model.parameters()).device
    inputs, targets = (t.to(device) for t in batch)
    logits = model(inputs)
    logits = getattr(logits, "logits", logits)                          # (B, T, vocab)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


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
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                total += loss_on(model, batch, "sum").item()
                tokens += (batch[1] != -100).sum().item()
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("evaluate got no token that counts: give at least one batch whose targets are not all -100.")
    return total / tokens


def sixteen_bits(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it faster than float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
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
          first_step: int = 0) -> Iterator[Step]:
    """Train what is trainable, in place, and yield a `Step` after each optimizer step.

    Stop whenever you like: what has been learned stays in the model, and its mode (train or eval) is put back.

    Args:
        batches: as many as there are steps; a list shorter than that is an error, so no step is skipped in silence.
        lr: the highest learning rate; `schedule(step, steps)` multiplies it.
        optimizer: by default `adamw(model)`: no weight decay, betas (0.9, 0.999).
        max_grad_norm: gradients are scaled down to this norm where theirs is larger; None leaves them.
        autocast: torch.bfloat16 computes matrix products in 16 bits on a device that can; weights keep their dtype.
        first_step: go on from here (with the optimizer of the earlier part, and its batches left out).

    Raises:
        ValueError: nothing trains, or the batches end early.

    Shapes: each batch is (inputs, targets), both (B, T), targets -100 where no loss counts.

    >>> from lora_edu import apply_lora, load_pretrained
    >>> from lora_edu.training import bistro
    >>> model, tokenizer = load_pretrained()
    >>> _ = apply_lora(model, rank=4)
    >>> [step.step for step in train(model, bistro.batches(tokenizer, 2, batch_size=2), steps=2, lr=1e-2)]
    [1, 2]
    """
    optimizer = optimizer or adamw(model)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    device = trained[0].device
    was_training = model.training
    model.train()
    batches = iter(batches)
    try:
        for step in range(first_step, steps):
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"the batches ended after {step - first_step} steps, "
                                 f"and {steps - first_step} were asked for.")
            now = lr * schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = now
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = loss_on(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, max_grad_norm if max_grad_norm is not None else float("inf"))
            optimizer.step()
            yield Step(step + 1, loss.item(), now, norm.item(), batch[0].numel() / (time.perf_counter() - began))
    finally:
        model.train(was_training)


def fit(model: nn.Module, batches: Iterable[Batch], steps: int, lr: float, **how) -> list[Step]:
    """`train` behind a progress bar. The stop button (KeyboardInterrupt) ends it and keeps what was learned.

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
    return done
