"""Checkers of notebook 04. Reading this file tells you the answers."""
import math

import torch

from lora_edu.course.checks.nb01 import randn
from lora_edu.course.checks.nb03 import equals
from lora_edu.course.page.exercises import Verdict, check, check_decision, check_match, is_blank, is_stub, say, word
from lora_edu.course.records.stored import load_record
from lora_edu.lora.settings import LoRASettings

STEPS = 120      # of a training that draws a curve
# exercise 4.4: what was done to each; a learning rate of 0.03 and rank 8 would be right
CURVES = {"A": ("rank too small", dict(rank=2)), "B": ("rate too high", dict(lr=0.4)),
          "C": ("both factors zero", dict(start=0.0)), "D": ("rate too low", dict(lr=0.001))}


def check_scaling(student) -> Verdict:
    """Exercise 4.1: the library's own settings of an adapter."""
    def oracle(rank, alpha, rule):
        return LoRASettings(rank, 2 * rank if rule == "2r" else alpha, rslora=rule == "rslora").scaling

    def hint(got, want, rank, alpha, rule):
        slips = {"2r": [(2 * rank, "that is alpha; the scaling divides it by the rank."),
                        (alpha / rank, "under this rule alpha is not the one that is handed in, it is 2 rank.")],
                 "fixed": [(alpha / math.sqrt(rank), "the square root belongs to rsLoRA alone.")],
                 "rslora": [(alpha / rank, "rsLoRA divides by the square root of the rank."),
                            (math.sqrt(alpha / rank), "the root is of the rank alone, not of alpha / rank."),
                            (math.sqrt(alpha) / rank, "the root is of the rank, not of alpha.")]}
        every = [(alpha * rank, "alpha is divided by the rank, not multiplied."),
                 (alpha, "that is alpha, not yet divided."),
                 (1 / want, "upside down: alpha is above the line.")]
        return next((f"{rule}: {text}" for wrong, text in slips[rule] + every if equals(got, wrong)), None)

    cases = [(4, 3.0, "2r"), (8, 3.0, "fixed"), (16, 3.0, "rslora"), (1, 5.0, "2r"), (2, 5.0, "fixed"),
             (3, 5.0, "rslora")]
    return check("4.1", student, cases=cases, oracle=oracle, hint=hint)


def check_rate_for_b(student) -> Verdict:
    """Exercise 4.2: train with alpha times ``factor`` and the reader's rate for lora_B; the losses must be those of
    before.
    """
    given = {}

    def oracle(lr, factor, optimizer):
        return [loss for _, loss in _training(lr=lr, optimizer=optimizer, steps=12)]

    def trained(lr, factor, optimizer):
        given["rate"] = student(lr, factor, optimizer)
        if given["rate"] is None or given["rate"] is ...:
            return None
        return [loss
                for _,
                loss in _training(lr=lr, lr_b=float(given["rate"]), scaling=factor, optimizer=optimizer, steps=12)]

    def hint(got, want, lr, factor, optimizer):
        parted = (got - want).abs().max().item() / want[0].item()
        measured = (f"{optimizer}, alpha × {factor:g}, B's rate {given['rate']:.4g} in place of {lr:g}: within 12 "
                    "steps the losses part by "
                    + (f"{parted:.1%} of the first. " if parted < 100 else "more than 100 times the first. "))
        slips = [(lr, "A larger alpha moves the product further for the same step of B: the rate must make up for it."),
                 (lr * factor, "That goes the wrong way: B must become smaller where alpha becomes larger."),
                 (lr * factor**2, "That goes the wrong way: B must become smaller where alpha becomes larger."),
                 (lr / factor, "SGD's step is rate × gradient, and alpha multiplies B's gradient too."),
                 (lr / factor**2, "Adam divides the gradient's size out: alpha counts once, not twice."),
                 (lr / math.sqrt(factor), "Half of the correction would be A's, but A stays as it is.")]
        return measured + next((text for wrong, text in slips if math.isclose(given["rate"], wrong)),
                               "Write B as 1/factor of what it was: which rate takes steps of that size?")

    cases = [(0.03, 4.0, "adam"), (0.5, 4.0, "sgd"), (0.02, 0.5, "adam"), (0.8, 0.25, "sgd")]
    attempted = callable(student) and not is_stub(student)
    return check("4.2", trained if attempted else student, cases=cases, oracle=oracle, hint=hint)


def _training(rank=8, lr=0.03, lr_b=None, scaling=1.0, start=0.25, optimizer="adam", noise=1.5,
              steps=STEPS) -> list[tuple[int, float]]:
    """A tiny LoRA on a linear layer, in float64: (step, held-out squared error), 1 at the start; deterministic.

    The target is an update of rank 6, 12 x 16, seen through noise; every step has a fresh batch of 32. Adam's epsilon
    is 0, almost.
    """
    source = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    sigma = torch.tensor([3, 2.5, 2, 1.5, 1.2, 1], dtype=torch.float64)
    target = torch.linalg.qr(draw(12, 6))[0] * sigma @ torch.linalg.qr(draw(16, 6))[0].T
    x, held_out = draw(steps, 32, 16), draw(256, 16)
    y = x @ target.T + noise * draw(steps, 32, 12)
    lora_A = (start * draw(rank, 16)).requires_grad_()
    lora_B = torch.zeros(12, rank, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [lora_A], "lr": lr}, {"params": [lora_B], "lr": lr if lr_b is None else lr_b}]
    stepper = torch.optim.Adam(groups, eps=1e-100) if optimizer == "adam" else torch.optim.SGD(groups)

    def error(x, y):
        return (scaling * (x @ lora_A.T @ lora_B.T) - y).square().mean()

    curve, first = [], error(held_out, held_out @ target.T).item()
    for step in range(steps + 1):
        if step % 2 == 0:
            curve.append((step, error(held_out.detach(), held_out @ target.T).item() / first))
        if step < steps:
            stepper.zero_grad()
            error(x[step], y[step]).backward()
            stepper.step()
    return curve


def check_stacked(student) -> Verdict:
    """Exercise 4.3: one adapter after the other."""
    def oracle(x, lora_A, lora_B, scaling):
        return torch.stack([s * (rows @ A.T @ B) for rows, A, B, s in zip(x, lora_A, lora_B, scaling)])

    def hint(got, want, x, lora_A, lora_B, scaling):
        ones = torch.ones_like(scaling)
        if equals(got, oracle(x, lora_A, lora_B, ones)):
            return "the scaling is missing."
        if got.shape == want.shape and any(equals(got, oracle(x, lora_A, lora_B, ones) * wrong)
                                           for wrong in _misplaced(scaling, want.shape)):
            return "the scaling lines up with the wrong axis: give it the shape (G, 1, 1)."
        if equals(got, want.sum(0)):
            return "the adapters are added up: each group has its own, the result is (G, N, out)."
        if equals(got, torch.stack([rows @ lora_A[0].T @ lora_B[0] * scaling[0] for rows in x])):
            return "every group got the first adapter."

    cases = [(randn(2, 5, 3), randn(2, 4, 3), randn(2, 4, 6), torch.tensor([2.0, 0.5])),
             (randn(3, 3, 3), randn(3, 3, 3), randn(3, 3, 3), torch.tensor([1.0, 4.0, 0.25])),
             (randn(1, 2, 5), randn(1, 1, 5), randn(1, 1, 2), torch.tensor([3.0]))]
    return check("4.3", student, cases=cases, oracle=oracle, hint=hint)


def _misplaced(scaling, shape) -> list:
    """The scaling as it broadcasts without new axes, and with one too few."""
    return [wrong for axis, wrong in ((2, scaling), (1, scaling[:, None])) if shape[axis] == len(scaling)]


def mystery_curves() -> dict[str, list[tuple[int, float]]]:
    """Exercise 4.4: held-out squared error over the steps, as a share of that at the start, of four tiny trainings
    made here.
    """
    return {name: _training(**setting) for name, (_, setting) in CURVES.items()}


def check_curves(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 4.4."""
    return check_match("4.4", answers, right={name: cause for name, (cause, _) in CURVES.items()},
                       because="too small a rank falls well and then stops at a floor; too high a rate never comes to "
                               "rest; two zero factors get no gradient at all; "
                               "too low a rate is still on its way at the last step.",
                       hints={"A": "it fell quickly, and then it stopped, quietly. What cannot be had with more steps?",
                              "B": "look how it moves from one point to the next, to the end.",
                              "C": "not one digit changes. What must be wrong if nothing at all is learned?",
                              "D": "is it done at the last step?"})


def check_setting(choice: tuple | None, budget: int = 400_000, task: str = "python_docs") -> Verdict:
    """Exercise 4.5: (rank, rule, learning rate); the recorded test loss against the best whose adapter has at most
    ``budget`` bytes.
    """
    record = load_record("rank_alpha")
    runs = {(run["rank"], run["rule"], run["lr"]): run for run in record["grid"] if run["task"] == task}
    fits = {setting: run for setting, run in runs.items() if 4 * run["trainable"] <= budget}
    scores = {setting: run["test"] for setting, run in fits.items() if run["test"] is not None}
    if not is_blank(choice):
        parts = [word(part) for part in choice] if isinstance(choice, (tuple, list)) else None
        found = next((setting for setting in runs if [word(part) for part in setting] == parts), None)
        if found is None:
            ranks, rules, rates = (record["settings"][key] for key in ("ranks", "rules", "rates"))
            return say("4.5", False, f"{choice!r} is not in the record: give (rank, rule, learning rate), with a rank "
                                     f"of {ranks}, a rule of {rules} and a rate of {rates}.")
        choice = found
        if choice not in fits:
            return say("4.5", False, f"an adapter of rank {choice[0]} has {4 * runs[choice]['trainable']:,} bytes, "
                                     f"over the budget of {budget:,}.")
        if choice not in scores:
            return say("4.5", False, "that training diverged: look at the crosses in the map.")
    best = min(scores, key=scores.get)
    return check_decision("4.5", choice, scores, within=0.02,
                          because=f"the best within {budget:,} bytes, {best}, reaches {scores[best]:.3g}.")
