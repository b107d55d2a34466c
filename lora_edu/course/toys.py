"""Small experiments that notebooks run and checkers use: a hidden update to learn, and cards far from their
sentence.
"""
import torch
from torch import nn

from lora_edu.models.bridge import encode, end_token
from lora_edu.training import bistro
from lora_edu.training.loop import Batch


def teacher(W: torch.Tensor, hidden_rank: int, n: int, seed: int,
            noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (n, in) and targets (n, out) of a layer whose weight is W plus a hidden update of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = W.shape
    B = torch.randn(out_features, hidden_rank, generator=generator)
    A = torch.randn(hidden_rank, in_features, generator=generator)
    hidden = B @ A / (hidden_rank * in_features) ** 0.5
    x = torch.randn(n, in_features, generator=generator)
    y = x @ (W.detach() + hidden).T
    return x, y + noise * torch.randn(y.shape, generator=generator)


def learn(layer: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 150, lr: float = 0.02) -> list[float]:
    """Adam on the mean squared error over all examples; returns the error before each step and at the end."""
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr)
    errors = []
    for _ in range(steps):
        loss = ((layer(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    with torch.no_grad():
        return [*errors, ((layer(x) - y) ** 2).mean().item()]


def far_cards(tokenizer, filler: torch.Tensor, length: int, room: int = 512, n: int = 24) -> Batch:
    """Section 4: restaurant cards that stand far from their sentence, as a batch (inputs, targets) that counts the
    sentence alone.

    Args:
        filler: tokens (N,) of tales, of which as many stand between a card and the arrow as make a prompt of `length`
            tokens.
        room: how many tokens the model can read; what is too long loses its oldest, and those are the card's.
    """
    rows, arrow, place = [], encode(tokenizer, "\n=>"), 0
    for record, sentence in bistro.examples("test", n):
        card = encode(tokenizer, bistro.prompt(record).removesuffix("\n=>"))
        between = length - len(card) - len(arrow)
        if not 0 <= between <= len(filler):
            raise ValueError(f"length={length}: a card and its arrow have {len(card) + len(arrow)} tokens and there "
                             f"are {len(filler)} of tales; choose a length between.")
        place = place if place + between <= len(filler) else 0
        said = encode(tokenizer, " " + sentence) + [end_token(tokenizer)]
        ids = card + filler[place:place + between].tolist() + arrow + said
        place += between
        rows.append((ids[:-1][-room:], ([-100] * (length - 1) + said)[-room:]))
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    return inputs, torch.tensor([wanted + [-100] * (width - len(wanted)) for _, wanted in rows])
