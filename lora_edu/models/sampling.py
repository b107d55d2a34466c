"""One token after another: `stream` yields them as they come, `generate` hands them over at the end.

For the course's `Llama`, which takes both as its methods, and for causal language models of transformers.
"""
from collections.abc import Iterator

import torch

from lora_edu.models.bridge import context, reader


def _pick(logits: torch.Tensor, temperature: float, top_k: int | None,
         generator: torch.Generator | None) -> torch.Tensor:
    """The next token of each row: logits (B, vocab) -> ids (B,). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check(model, ids: torch.Tensor, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    limit = context(model)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids of shape {tuple(ids.shape)}: a prompt is (batch, time) with at least one token.")
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones do not fit a context of "
                         f"{limit}: ask for at most {max(limit - ids.shape[1], 0)} new tokens.")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: choose 0 (the likeliest token) or a positive number (1: "
                         "as the model says).")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: choose at least 1, or None for the whole vocabulary.")


def stream(self, ids: torch.Tensor, max_new_tokens: int = 100, temperature: float = 1.0, top_k: int | None = None,
           seed: int | None = None, stop_token: int | None = None, use_cache: bool = True) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, a LongTensor (B,), until all rows have said `stop_token` or the number is
    reached.

    Args:
        ids: the prompts (B, T), all of one length.
        temperature: 0 takes the likeliest token; above, logits are divided by it. No unit.
        top_k: sample from the k likeliest tokens only.
        seed: the same seed gives the same text on the same device. None: torch's own generator.
        stop_token: a row that has said it goes on saying it.
        use_cache: False reads the whole text again at every step; slower, the same tokens.
    """
    ids = ids.to(next(self.parameters()).device)
    self = reader(self)
    check(self, ids, max_new_tokens, temperature, top_k)
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    cache = self.new_cache() if use_cache else None
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    new = ids
    for _ in range(max_new_tokens):
        with torch.no_grad():       # inside the loop: a generator must not leave gradients off between its yields
            logits = self(new if use_cache else ids, cache)[:, -1]
        token = _pick(logits, temperature, top_k, generator)
        if stop_token is not None:
            token = token.masked_fill(done, stop_token)
            done |= token == stop_token
        yield token
        if done.all():
            return
        new = token[:, None]
        if not use_cache:
            ids = torch.cat([ids, new], dim=1)


def generate(self, ids: torch.Tensor, max_new_tokens: int = 100, **how) -> torch.Tensor:
    """Prompt and new tokens together, (B, T + new); `how` is what `stream` takes. Use the model in eval mode."""
    new = list(stream(self, ids, max_new_tokens, **how))
    return torch.cat([ids.to(new[0].device), torch.stack(new, dim=1)], dim=1) if new else ids
