"""A teacher whose update has a rank that we chose: the one experiment on rank whose right answer is known beforehand.

The teacher is the base with a random rank-k update in one matrix. A student, the base with LoRA on that matrix, learns
to give the teacher's probabilities for the next token. Below rank k it cannot; from k on it can.
"""
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.lora.inject import share_weights
from lora_edu.training.loop import Batch, mode


def plant(model: nn.Module, name: str, rank: int, seed: int = 0) -> nn.Module:
    """A copy of the model whose matrix `name` has a random update of this rank, as large as the matrix (Frobenius
    norm).

    The other weights are shared. Raises ValueError for a rank the matrix cannot have.
    """
    teacher = share_weights(model)
    layer = teacher.get_submodule(name)
    out, into = layer.weight.shape
    if not 1 <= rank <= min(out, into):
        raise ValueError(f"rank={rank} does not fit the {out} x {into} matrix {name}: choose 1 to {min(out, into)}.")
    generator = torch.Generator().manual_seed(seed)
    update = torch.randn(out, rank, generator=generator) @ torch.randn(rank, into, generator=generator)
    update = update.to(layer.weight) * (layer.weight.detach().norm() / update.norm())
    layer.weight = nn.Parameter(layer.weight.detach() + update, requires_grad=False)
    return teacher


@torch.no_grad()
def told(teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The teacher's log-probabilities for the next token after each of `ids` (B, T): (B, T, vocab)."""
    return F.log_softmax(teacher(ids), -1)


def lessons(teachers: list[nn.Module], ids: torch.Tensor, steps: int, students: int, rows: int = 4,
            seed: int = 0) -> Iterator[Batch]:
    """`steps` batches for `LoRAStack`: rows of `ids` (N, T), drawn anew at each step, for `students` students of
    each teacher in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = ids[torch.randint(len(ids), (rows,), generator=generator)]
        answers = torch.cat([told(teacher, drawn).repeat(students, 1, 1) for teacher in teachers])
        yield drawn.repeat(len(teachers) * students, 1), answers


def divergences(model: nn.Module, batch: Batch, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kullback-Leibler divergence from teacher to student in nats, summed over each group of rows, and the tokens in
    it.

    Takes (ids, the teacher's log-probabilities); a `losses_of` for `train_stack`. 0 is a perfect student.
    """
    ids, wanted = batch
    said = F.log_softmax(model(ids), -1)
    each = F.kl_div(said, wanted.to(said.device), reduction="none", log_target=True).sum(-1)
    return each.view(groups, -1).sum(1), torch.full((groups,), each.numel() // groups, device=each.device)


@torch.no_grad()
def heldout_divergence(model: nn.Module, teachers: list[nn.Module], ids: torch.Tensor,
                       students: int = 1) -> list[float]:
    """Divergence of every student in nats per token on texts it has not seen; students in the order of `lessons`."""
    total = 0
    with mode(model, training=False):
        for rows in ids.split(8):
            answers = torch.cat([told(teacher, rows).repeat(students, 1, 1) for teacher in teachers])
            sums, _ = divergences(model, (rows.repeat(len(teachers) * students, 1), answers), len(teachers) * students)
            total = total + sums.cpu().double()
    return (total / ids.numel()).tolist()
