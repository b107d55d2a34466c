"""Checkers of notebook 01. Reading this file tells you the answers."""
import functools

import torch
from torch import nn

from lora_edu.course.page.exercises import Verdict, check, check_decision, check_match
from lora_edu.course.toys import learn, teacher
from lora_edu.lora.layer import LoRALinear

RANKS = (1, 2, 4, 8, 16, 32)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check_delta_weight(student) -> Verdict:
    """Exercise 1.1: compare with a sum of outer products, one per rank. Two cases of different rank."""
    def oracle(A, B, alpha):
        return sum(torch.outer(B[:, i], A[i]) for i in range(len(A))) * alpha / len(A)

    def hint(got, want, A, B, alpha):
        if got.shape == want.shape and torch.allclose(got, want * len(A), rtol=1e-4, atol=1e-6):
            return "right product, but it is not divided by the rank."
        if got.shape == want.shape and torch.allclose(got * alpha / len(A), want, rtol=1e-4, atol=1e-6):
            return "right product, but the scaling alpha / rank is missing."
        if got.shape == want.T.shape and torch.allclose(got, want.T, rtol=1e-4, atol=1e-6):
            return "transposed: B @ A has shape (out_features, in_features)."
        return _other_scaling(got, B @ A, alpha, len(A))

    return check("1.1", student, cases=[(randn(2, 3), randn(4, 2), 6.0), (randn(3, 5), randn(2, 3), 4.0),
                                        (randn(1, 5).repeat(3, 1), randn(4, 3), 5.0), (randn(4, 3), randn(5, 4), 3.0)],
                 oracle=oracle, hint=hint)


def _other_scaling(got: torch.Tensor, product: torch.Tensor, alpha: float, rank: int) -> str | None:
    """What an update that is B A times another number was divided by."""
    if got.shape != product.shape or not product.abs().max() > 0:
        return None
    found = (got * product).sum().item() / product.square().sum().item()
    if not torch.allclose(got, found * product.double(), rtol=1e-4, atol=1e-6):
        return None
    slips = [(alpha // rank, "// cuts to whole numbers: divide with /."),
             (alpha / (rank - 1) if rank > 1 else 0, "the rank is the number of rows of A, not one less."),
             (rank / alpha, "upside down: alpha is above the line."), (alpha * rank, "alpha is divided by the rank.")]
    return next((text for wrong, text in slips if abs(found - wrong) < 1e-4 * max(abs(wrong), 1)),
                f"right product, but its factor is {found:.4g} in place of alpha / rank = {alpha / rank:.4g}; the rank "
                "is the number of rows of A.")


def check_trainable_numbers(student) -> Verdict:
    """Exercise 1.2: the library's layers are built and their numbers counted."""
    def oracle(shapes, rank):
        layers = [LoRALinear(n_in, n_out, rank) for n_out, n_in in shapes]
        return sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)

    def hint(got, want, shapes, rank):
        if got == sum(n_out * n_in for n_out, n_in in shapes):
            return "that is the frozen weights; A and B are much thinner."
        if got == want // rank and rank > 1:
            return "that is rank 1: each factor has `rank` rows or columns."

    return check("1.2", student,
                 cases=[([(64, 96), (64, 64)], 4), ([(12, 8)], 3), ([(256, 256)] * 4 + [(688, 256)], 8)],
                 oracle=oracle, hint=hint)


def check_fold(student) -> Verdict:
    """Exercise 1.4: the library's own merge; the weight handed in must not change."""
    def oracle(W, A, B, alpha):
        layer = LoRALinear.wrap(nn.Linear(W.shape[1], W.shape[0], bias=False), len(A), alpha, any_rank=True)
        layer.weight.data, layer.lora_A.data, layer.lora_B.data = W.clone(), A, B
        return layer.folded_weight()

    def hint(got, want, W, A, B, alpha):
        if got.shape == want.shape and torch.allclose(got, W.double() + (B @ A).double(), rtol=1e-4, atol=1e-5):
            return "the scaling alpha / rank is missing."
        if got.shape == want.shape and torch.allclose(got, want - W, rtol=1e-4, atol=1e-5):
            return "that is the update alone; the merged weight is W plus the update."
        return _other_scaling(got - W.double(), B @ A, alpha, len(A)) if got.shape == want.shape else None

    cases = [(randn(4, 6), randn(2, 6), randn(4, 2), 5.0), (randn(5, 3), randn(3, 3), randn(5, 3, seed=7), 1.0),
             (randn(4, 5), randn(1, 5).repeat(2, 1), randn(4, 2), 3.0),
             (randn(3, 2), randn(4, 2), randn(3, 4), 7.0)]
    return check("1.4", student, cases=cases, oracle=oracle, hint=hint)


def _fresh(W: torch.Tensor, rank: int, a: float, b: float, seed: int = 0) -> LoRALinear:
    """A layer over a copy of W whose factors are normal with standard deviations a and b."""
    layer = LoRALinear.wrap(nn.Linear(W.shape[1], W.shape[0], bias=False), rank, 2 * rank)
    layer.weight.data = W.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    layer.lora_A.data.normal_(0, a, generator=generator) if a else layer.lora_A.data.zero_()
    layer.lora_B.data.normal_(0, b, generator=generator) if b else layer.lora_B.data.zero_()
    return layer


def mystery_curves(W: torch.Tensor) -> dict[str, list[tuple[int, float]]]:
    """Four trainings on one teacher; three have something wrong."""
    x, y = teacher(W, hidden_rank=4, n=256, seed=0)
    made = {"P": (0.1, 0.3, 0.02), "Q": (0.0, 0.0, 0.02), "R": (0.1, 0.0, 0.02), "S": (0.1, 0.0, 0.4)}
    return {name: list(enumerate(learn(_fresh(W, 4, a, b), x, y, steps=40, lr=lr))) for name,
            (a, b, lr) in made.items()}


def check_mystery(answers: dict[str, str | None]) -> Verdict:
    """Exercise 1.3."""
    return check_match("1.3", answers,
                       right={"P": "both factors random", "Q": "both factors zero", "R": "healthy",
                              "S": "learning rate too high"},
                       because="where a curve starts tells the start; how it goes on tells the rate.",
                       hints={"P": "compare where it starts with where Q starts.",
                              "Q": "which start leaves no gradient at all?",
                              "R": "it starts where Q does and falls steadily.",
                              "S": "it starts where Q does; what happens in the next steps?"})


@functools.cache
def errors_by_rank() -> tuple[list[float], list[float]]:
    """Exercise 1.5: mean squared error on 120 noisy examples and on 2,000 unseen ones, for each of `RANKS`."""
    W = randn(48, 64) / 8
    x, y = teacher(W, hidden_rank=8, n=2120, seed=1, noise=0.5)
    seen, unseen = [], []
    for rank in RANKS:
        layer = _fresh(W, rank, a=0.1, b=0.0)
        seen.append(learn(layer, x[:120], y[:120], steps=400, lr=0.01)[-1])
        with torch.no_grad():
            unseen.append(((layer(x[120:]) - y[120:]) ** 2).mean().item())
    return seen, unseen


def check_rank(choice: int | None) -> Verdict:
    """Exercise 1.5: scored on examples that were not learned from; within a tenth of the best passes."""
    unseen = errors_by_rank()[1]
    return check_decision("1.5", choice, dict(zip(RANKS, unseen)), within=0.1 * min(unseen), unit="mean squared error",
                          because="past the rank of what is there to learn, more rank learns the noise.")
