"""Checkers of notebook 03. Reading this file tells you the answers."""
import math
from statistics import mean

import torch

from lora_edu.course.checks.nb01 import randn
from lora_edu.course.page.exercises import Verdict, check, check_choice, check_match
from lora_edu.course.records.stored import load_record

MYSTERY_MATRIX = "model.layers.1.self_attn.o_proj"
# the four of exercise 3.4: (task, null) in the record
CAUSES = {"P": ("python_docs", None), "Q": ("bistro", "mismatched"), "R": ("bistro", "random_targets"),
          "S": ("bistro", None)}


def equals(got, want, atol: float = 1e-6) -> bool:
    """Does an answer equal this wrong one?"""
    want = torch.as_tensor(want, dtype=torch.float64)
    return isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=atol)


def check_energy_kept(student) -> Verdict:
    """Exercise 3.1: Frobenius norms of a diagonal matrix that is cut."""
    def oracle(sigma, rank):
        whole = torch.diag(sigma.double())
        cut = whole.clone()
        cut[rank:] = 0
        return (torch.linalg.matrix_norm(cut) / torch.linalg.matrix_norm(whole)).item() ** 2

    def hint(got, want, sigma, rank):
        if equals(got, 100 * want):
            return "right, but in per cent: give a share, where 1 is everything."
        if equals(got, sigma[:rank].sum() / sigma.sum()):
            return "energy is in the squares of the singular values."
        if equals(got, want**0.5):
            return "that is the share of the norm; energy is its square."
        if equals(got, 1 - want):
            return "that is what is lost, not what is kept."
        if equals(got, sigma[:rank].square().sum()):
            return "that is the energy kept; divide by all of it."
        if rank > 0 and equals(got, oracle(sigma, rank - 1)):
            return "one direction is missing: sigma[:rank] holds the first `rank` of them."
        if equals(got, oracle(sigma, rank + 1)):
            return "one direction too many: sigma[:rank] holds the first `rank` of them."

    cases = [(torch.tensor([3.0, 2.0, 1.0]), 2), (torch.tensor([5.0, 4.0, 1.0, 0.5, 0.1]), 1),
             (torch.tensor([2.0, 1.0, 1.0, 0.0]), 3),
             (torch.tensor([2.0, 1.0]), 0)]
    return check("3.1", student, cases=cases, oracle=oracle, hint=hint)


def check_truncated(student) -> Verdict:
    """Exercise 3.2: a sum of outer products, one for each direction kept."""
    def oracle(U, S, Vh, rank):
        return sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank))

    def hint(got, want, U, S, Vh, rank):
        if equals(got, want.T):
            return "transposed: U comes first, and the shape is (out_features, in_features)."
        if equals(got, U * S @ Vh):
            return "that is the whole matrix: keep the first `rank` columns of U, values of S and rows of Vh."
        if equals(got, U[:, :rank] @ Vh[:rank]):
            return "the singular values are missing: scale each column of U by its own."
        if equals(got, U[:, :rank] * S[:rank].sqrt() @ Vh[:rank]):
            return "each singular value belongs in whole, not as its square root."
        if equals(got, U[:, -rank:] * S[-rank:] @ Vh[-rank:]):
            return "those are the smallest directions: the largest come first."

    def svd(matrix):
        return torch.linalg.svd(matrix, full_matrices=False)

    cases = [(*svd(randn(5, 3)), 2), (*svd(randn(3, 6)), 1), (*svd(randn(4, 4)), 3)]
    return check("3.2", student, cases=cases, oracle=oracle, hint=hint)


def check_effective_rank(student) -> Verdict:
    """Exercise 3.3: exp(-sum p log p) is the product of p to the power -p, and 0 to the power 0 is 1."""
    def effective(weights):
        return math.prod((w / sum(weights)) ** -(w / sum(weights)) for w in weights)

    def oracle(sigma):
        return effective([s * s for s in sigma.tolist()])

    def hint(got, want, sigma):
        if isinstance(got, torch.Tensor) and got.isnan().any():
            return "nan: 0 log 0 counts as 0 here; leave out the zeros, or use torch.special.entr."
        if equals(got, math.log(want)):
            return "that is the entropy; the effective rank is exp of it."
        if equals(got, effective(sigma.tolist())):
            return "the shares are those of the energy: square the singular values first."
        if equals(got, 2 ** math.log(want)) or equals(got, math.exp(math.log2(want))):
            return "log and exp must have the same base."
        if equals(got, 1 / want):
            return "a sign is missing: the entropy is minus the sum of p log p."

    cases = [(torch.tensor([3.0, 2.0, 1.0]),), (torch.ones(4),), (torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0]),),
             (torch.tensor([7.0, 0.0]),)]
    return check("3.3", student, cases=cases, oracle=oracle, hint=hint)


def mystery_spectra() -> dict[str, list[float]]:
    """Exercise 3.4: singular values of one matrix of four recorded updates, each divided by the update's norm."""
    spectra = {}
    for name, (task, null) in CAUSES.items():
        sigma = next(run["sigma"][MYSTERY_MATRIX] for run in _runs(task, null) if "sigma" in run)
        norm = sum(value * value for value in sigma) ** 0.5
        spectra[name] = [value / norm for value in sigma]
    return spectra


SENTENCES = "restaurants, right or wrong"


def check_mystery(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 3.4: two of the four can be told from the others, and not from each other."""
    return check_match("3.4", answers, right={"P": "documentation", "Q": SENTENCES, "R": "random targets",
                                              "S": SENTENCES},
                       because="random labels ask for the same answer everywhere, every token equally likely: a few "
                               "directions give it. Sentences right or wrong leave one and the same spectrum.",
                       hints={"P": "two lie on each other, one starts far above; which is left?",
                              "Q": "which other curve can it not be told from? Section 4 had two such trainings.",
                              "R": "which curve starts highest? What do random labels ask of a model?",
                              "S": "which other curve can it not be told from? Section 4 had two such trainings."})


def check_rank(choice: int | None, budget: float = 0.05) -> Verdict:
    """Exercise 3.5: the smallest recorded rank that loses at most ``budget`` nats per token on test, mean over the
    seeds, where everything was trained and the rest is the tuned one.
    """
    costs = rank_costs()
    best = min(rank for rank, cost in costs.items() if cost <= budget)
    hints = {str(rank): f"too small: r = {rank} costs {cost:.2f} nats per token, and the budget is {budget:.2f}."
             if cost > budget else
             f"it fits, at {cost:.2f} nats per token, but r = {best} would too." for rank, cost in costs.items()
             if rank != best}
    return check_choice("3.5", choice, right=str(best), hints=hints,
                        because=f"r = {best} costs {costs[best]:.2f} nats per token on held-out data, "
                                "and no smaller rank fits.")


def rank_costs() -> dict[int, float]:
    """Nats per token on test that each recorded rank from 1 on loses against the whole update of bistro, mean over
    the seeds: of the matrices, with the tuned embedding and norms.
    """
    ranks = load_record("spectra")["settings"]["ranks"]
    cuts = [next(cut["test"] for cut in run["cut"] if cut["rest"] == "tuned")
            for run in _runs("bistro", None, "everything")]
    losses = [mean(at_rank) for at_rank in zip(*cuts)]
    return {rank: loss - losses[-1] for rank, loss in zip(ranks, losses) if rank > 0}


def _runs(task: str, null: str | None, trains: str = "matrices") -> list[dict]:
    """The record's runs of one kind."""
    return [run for run in load_record("spectra")["runs"]
            if (run["task"], run["null"], run["trains"]) == (task, null, trains)]
