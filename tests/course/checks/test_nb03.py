"""Notebook 03's checkers against the stub, a right answer, and wrong ones of several kinds."""
import pytest
import torch

from lora_edu.course.checks import nb03

RANKS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
LOSS = [4.4, 3.5, 3.0, 2.0, 1.3, 0.6, 0.28, 0.26, 0.25, 0.24]      # within 0.05 of the last from rank 32 on


def run(task, null, seed, sigma, extra=0.0, trains="matrices"):
    made = {"task": task, "null": null, "seed": seed, "trains": trains,
            "cut": [{"rest": "base", "test": [loss + 9.0 for loss in LOSS[::-1]]},
                    {"rest": "tuned", "test": [loss + extra for loss in LOSS]}]}
    return made | ({"sigma": {nb03.MYSTERY_MATRIX: sigma}} if seed == 1 else {})


@pytest.fixture(autouse=True)
def record(monkeypatch):
    """A record with made-up numbers; the other rest, and another task's runs, would mislead."""
    runs = [run("bistro", None, 1, [9.0, 9.0, 9.0], trains="everything"),
            run("bistro", None, 2, None, trains="everything"), run("bistro", None, 1, [2.0, 2.0, 1.0], extra=9.0),
            run("python_docs", None, 1, [8.0, 4.0, 1.0]),
            run("bistro", "mismatched", 1, [4.0, 3.0, 0.0]), run("bistro", "random_targets", 1, [5.0, 0.0, 0.0])]
    found = {"settings": {"ranks": RANKS}, "runs": runs}
    monkeypatch.setattr(nb03, "load_record", {"spectra": found}.__getitem__)
    return found


def good_energy(sigma, rank):
    return sigma[:rank].square().sum() / sigma.square().sum()


def good_truncated(U, S, Vh, rank):
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def good_effective(sigma):
    p = sigma**2 / (sigma**2).sum()
    return torch.special.entr(p).sum().exp()


def shares(sigma):
    return sigma**2 / (sigma**2).sum()


def nan_effective(sigma):
    return (-(shares(sigma) * shares(sigma).log()).sum()).exp()


def raises(*args):
    raise KeyError("no")


def eats_its_input(sigma, rank):
    sigma.square_()
    return sigma[:rank].sum() / sigma.sum()


ENERGY = [
    (lambda sigma, rank: None, None, "not attempted"),
    (good_energy, True, "correct"),
    (lambda sigma, rank: float(sum(s**2 for s in sigma.tolist()[:rank]) / sum(s**2 for s in sigma.tolist())), True,
     "correct"),
    (lambda sigma, rank: 100 * good_energy(sigma, rank), False, "per cent"),
    (lambda sigma, rank: sigma[:rank].sum() / sigma.sum(), False, "in the squares"),
    (lambda sigma, rank: good_energy(sigma, rank).sqrt(), False, "energy is its square"),
    (lambda sigma, rank: 1 - good_energy(sigma, rank), False, "what is lost"),
    (lambda sigma, rank: sigma[:rank].square().sum(), False, "divide by all of it"),
    (lambda sigma, rank: good_energy(sigma, rank - 1), False, "one direction is missing"),
    (lambda sigma, rank: good_energy(sigma, rank + 1), False, "one direction too many"),
    (lambda sigma, rank: 13 / 14, False, "case 2"),
    (lambda sigma, rank: good_energy(sigma, rank) if rank else 1.0, False, "case 4"),
    (lambda sigma, rank: sigma / sigma.sum(), False, "shape"),
    (eats_its_input, False, "changes its input"),
    (raises, False, "raised KeyError"),
]
TRUNCATED = [
    (lambda U, S, Vh, rank: None, None, "not attempted"),
    (good_truncated, True, "correct"),
    (lambda U, S, Vh, rank: U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank], True, "correct"),
    (lambda *case: good_truncated(*case).T, False, "transposed"),
    (lambda U, S, Vh, rank: U * S @ Vh, False, "whole matrix"),
    (lambda U, S, Vh, rank: U[:, :rank] @ Vh[:rank], False, "singular values are missing"),
    (lambda U, S, Vh, rank: U[:, :rank] * S[:rank].sqrt() @ Vh[:rank], False, "square root"),
    (lambda U, S, Vh, rank: U[:, -rank:] * S[-rank:] @ Vh[-rank:], False, "the smallest"),
    (lambda U, S, Vh, rank: good_truncated(U, S, Vh, 2), False, "case 2"),
    (lambda U, S, Vh, rank: good_truncated(U, S.mul_(1), Vh.zero_(), rank), False, "changes its input"),
    (lambda U, S, Vh, rank: U[:rank] * S[:rank] @ Vh[:rank], False, "raised RuntimeError"),
    (raises, False, "raised KeyError"),
]
EFFECTIVE = [
    (lambda sigma: None, None, "not attempted"),
    (good_effective, True, "correct"),
    (lambda sigma: float(good_effective(sigma)), True, "correct"),
    (nan_effective, False, "0 log 0"),
    (lambda sigma: good_effective(sigma).log(), False, "that is the entropy"),
    (lambda sigma: good_effective(sigma.sqrt()), False, "square the singular values"),
    (lambda sigma: 2 ** good_effective(sigma).log(), False, "the same base"),
    (lambda sigma: good_effective(sigma).log2().exp(), False, "the same base"),
    (lambda sigma: 1 / good_effective(sigma), False, "a sign is missing"),
    (lambda sigma: (sigma > 0).sum(), False, "your result is 3"),
    (lambda sigma: good_effective(sigma) if len(sigma) < 5 else 4.0, False, "case 3"),
    (raises, False, "raised KeyError"),
]
CASES = [(checker, *each) for checker, rows in ((nb03.check_energy_kept, ENERGY), (nb03.check_truncated, TRUNCATED),
                                                (nb03.check_effective_rank, EFFECTIVE)) for each in rows]


@pytest.mark.parametrize("checker, answer, passed, says", CASES)
def test_checker(checker, answer, passed, says, capsys):
    assert checker(answer).passed is passed
    assert says in capsys.readouterr().out


MYSTERY = {"P": "documentation", "Q": nb03.SENTENCES, "R": "random targets", "S": nb03.SENTENCES}


@pytest.mark.parametrize("answer, passed, says", [
    (None, None, "not attempted"), (MYSTERY, True, "correct"),
    (MYSTERY | {"P": "random targets"}, False, "which is left"),
    (MYSTERY | {"R": "documentation", "P": "random targets"}, False, "2 of 4"),
    (MYSTERY | {"Q": "documentation"}, False, "can it not be told from"), ("R", False, "give a dict"),
    (MYSTERY | {"S": "noise"}, False, "not one of the choices")])
def test_the_mystery(answer, passed, says, capsys):
    assert nb03.check_mystery(answer).passed is passed
    assert says in capsys.readouterr().out


def test_the_mystery_spectra_are_those_of_the_record_and_have_norm_1():
    spectra = nb03.mystery_spectra()
    assert list(spectra) == ["P", "Q", "R", "S"]
    assert spectra["P"] == pytest.approx([8 / 9, 4 / 9, 1 / 9]) and spectra["Q"] == pytest.approx([0.8, 0.6, 0])
    assert spectra["R"] == [1, 0, 0] and spectra["S"] == pytest.approx([2 / 3, 2 / 3, 1 / 3])


@pytest.mark.parametrize("choice, passed, says", [
    (None, None, "not attempted"), (32, True, "r = 32 costs 0.04 nats"), ("32", True, "correct"),
    (8, False, "too small: r = 8 costs 1.06 nats per token, and the budget is 0.05"), (1, False, "costs 3.26"),
    (64, False, "fits, at 0.02 nats per token, but r = 32 would too"), (256, False, "but r = 32 would too"),
    (24, False, "not one of the choices"), (0, False, "not one of the choices")])
def test_the_smallest_rank_within_the_budget(choice, passed, says, capsys):
    assert nb03.check_rank(choice).passed is passed
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("budget, best", [(0.0, 256), (0.012, 128), (0.05, 32), (0.4, 16), (10.0, 1)])
def test_the_budget_decides(budget, best, capsys):
    for rank in RANKS[1:]:
        assert nb03.check_rank(rank, budget).passed is (rank == best)


def test_the_cost_is_the_mean_over_the_seeds(record):
    """Oracle: by hand; the second seed is 0.3 worse at rank 1 alone."""
    second = next(run for run in record["runs"] if run["seed"] == 2)
    second["cut"][1]["test"] = [4.4, 3.8, *LOSS[2:]]
    costs = nb03.rank_costs()
    assert costs[1] == pytest.approx(3.41) and costs[2] == pytest.approx(2.76) and list(costs) == RANKS[1:]
