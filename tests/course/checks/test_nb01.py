"""Notebook 01's checkers against the stub, a right answer, and wrong ones of several kinds."""
import numpy as np
import pytest
import torch

from lora_edu.course.checks import nb01


def raises(*args):
    raise RuntimeError("no")


def spoils_its_input(W, A, B, alpha):
    W += alpha / len(A) * B @ A
    return W


RIGHT = {"P": "both factors random", "Q": "both factors zero", "R": "healthy", "S": "learning rate too high"}


@pytest.mark.parametrize("checker, answer, passed, says", [
    (nb01.check_delta_weight, lambda A, B, alpha: None, None, "not attempted"),
    (nb01.check_delta_weight, lambda A, B, alpha: alpha / A.shape[0] * B @ A, True, "correct"),
    (nb01.check_delta_weight, lambda A, B, alpha: (alpha / len(A) * B @ A).numpy().astype(np.float32), True, "correct"),
    (nb01.check_delta_weight, lambda A, B, alpha: alpha * B @ A, False, "not divided by the rank"),
    (nb01.check_delta_weight, lambda A, B, alpha: B @ A, False, "alpha / rank is missing"),
    (nb01.check_delta_weight, lambda A, B, alpha: 3.0 * B @ A, False, "case 2"),           # fits the first case only
    (nb01.check_delta_weight, lambda A, B, alpha: (alpha / len(A) * B @ A).T, False, "transposed"),
    (nb01.check_delta_weight, raises, False, "raised RuntimeError"),
    (nb01.check_trainable_numbers, lambda shapes, rank: None, None, "not attempted"),
    (nb01.check_trainable_numbers, lambda shapes, rank: sum(rank * (o + i) for o, i in shapes), True, "correct"),
    (nb01.check_trainable_numbers, lambda shapes, rank: sum(o * i for o, i in shapes), False, "frozen weights"),
    (nb01.check_trainable_numbers, lambda shapes, rank: sum(o + i for o, i in shapes), False, "rank 1"),
    (nb01.check_trainable_numbers, lambda shapes, rank: 1152, False, "case 2"),
    (nb01.check_trainable_numbers, raises, False, "raised RuntimeError"),
    (nb01.check_fold, lambda W, A, B, alpha: None, None, "not attempted"),
    (nb01.check_fold, lambda W, A, B, alpha: W + alpha / len(A) * B @ A, True, "correct"),
    (nb01.check_fold, lambda W, A, B, alpha: W + B @ A, False, "scaling"),
    (nb01.check_fold, lambda W, A, B, alpha: alpha / len(A) * B @ A, False, "the update alone"),
    (nb01.check_fold, spoils_its_input, False, "changes its input"),
    (nb01.check_fold, lambda W, A, B, alpha: W * float("nan"), False, "nan"),
    (nb01.check_rank, None, None, "not attempted"),
    (nb01.check_rank, 8, True, "good choice"),
    (nb01.check_rank, 1, False, "another choice"),
    (nb01.check_rank, 32, False, "another choice"),
    (nb01.check_rank, 5, False, "not one of the choices"),
    (nb01.check_mystery, dict.fromkeys("PQRS"), None, "not attempted"),
    (nb01.check_mystery, RIGHT, True, "correct"),
    (nb01.check_mystery, RIGHT | {"P": "healthy", "R": "both factors random"}, False, "2 of 4"),
    (nb01.check_mystery, dict.fromkeys("PQRS", "healthy"), False, "1 of 4"),
    (nb01.check_mystery, {"Q": "both factors zero"}, False, "1 of 4"),
])
def test_checker(checker, answer, passed, says, capsys):
    assert checker(answer).passed is passed
    assert says in capsys.readouterr().out


def test_the_mystery_curves_look_like_their_causes():
    torch.manual_seed(0)
    curves = {name: [y for _, y in points]
              for name, points in nb01.mystery_curves(torch.randn(64, 96) / 96**0.5).items()}
    assert curves["P"][0] > 2 * curves["Q"][0] and curves["P"][-1] < 0.2 * curves["P"][0]
    assert len(set(curves["Q"])) == 1
    assert curves["R"][0] == pytest.approx(curves["Q"][0]) and curves["R"][-1] < 0.05 * curves["R"][0]
    assert curves["S"][0] == pytest.approx(curves["Q"][0]) and max(curves["S"]) > 2 * curves["S"][0]


def test_more_rank_always_looks_better_on_the_examples_and_is_not():
    seen, unseen = nb01.errors_by_rank()
    assert seen == sorted(seen, reverse=True)
    assert unseen.index(min(unseen)) == nb01.RANKS.index(8)
