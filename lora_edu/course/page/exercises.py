"""Judge a reader's answer and say what is wrong with it in one line.

`check` judges a function against an oracle, `check_choice` and `check_match` a diagnosis, `check_decision` a choice
scored by a measurement. The checkers themselves, one file a notebook, stand in ``checks/``, so that a notebook's cell
shows no answer.
"""
import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_edu.tables import printable


@dataclass(frozen=True)
class Verdict:
    """What came out: ``passed`` is True, False, or None for "not attempted yet". True in an ``if`` only when passed."""

    passed: bool | None
    line: str

    def __bool__(self) -> bool:
        return self.passed is True

    def _ipython_display_(self) -> None:
        """Nothing: the line is printed already, and a cell that ends with a check shows it once."""


def check(number: str, student, cases, oracle, hint=None) -> Verdict:
    """Call ``student`` on copies of each case, compare with ``oracle``, print one line.

    Args:
        number: the exercise's number, "1.1".
        student: the reader's function (or None or ..., for a value not filled in).
        cases: tuples of arguments; give at least two, of different shapes, or a hard-coded answer passes.
        oracle: the right function, written in another way than the hidden solution.
        hint: ``hint(got, want, *case) -> str | None`` about a wrong answer; numbers reach it as float64 tensors.
    """
    if student is None or student is ...:
        return not_attempted(number)
    for i, case in enumerate(cases, 1):
        wrong = _judge(student, case, oracle, hint, first=i == 1)
        if wrong == "":
            return not_attempted(number)
        if wrong is not None:
            return say(number, False, (f"case {i} of {len(cases)}: " if i > 1 else "") + wrong)
    return say(number, True, "correct.")


def _judge(student, case, oracle, hint, first: bool) -> str | None:
    """What is wrong with the answer to one case; None for right, "" for not attempted."""
    want, given = oracle(*_copy(case)), _copy(case)
    try:
        got = student(*given)
    except Exception as error:   # whatever a reader's code may raise is a verdict, not a traceback
        return f"your function raised {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for position, (now, before) in enumerate(zip(given, case), 1):
        if not _same(now, before):
            return (f"your function changes its input (argument {position}): "
                    "compute on a copy, x = x + 1 and not x += 1.")
    if got is None or got is ...:
        return "" if first else "your function returns nothing here."
    wrong = _difference(got, want)
    if wrong and hint:
        said = hint(*(_numbers(v) if _numbers(v) is not None else v for v in (got, want)), *_copy(case))
        wrong = said or wrong
    return wrong


def _difference(got, want) -> str | None:
    """The first way in which ``got`` is not ``want``, in words; None if there is none."""
    if isinstance(want, (tuple, list)) and _numbers(want) is None or isinstance(want, tuple):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"expected {len(want)} values, got {_describe(got)}."
        found = ((i, _difference(g, w)) for i, (g, w) in enumerate(zip(got, want), 1))
        return next((f"value {i}: {wrong}" for i, wrong in found if wrong), None)
    target, answer = _numbers(want), _numbers(got)
    if target is None:
        return None if type(got) is type(want) and got == want else f"got {_describe(got)}, expected {_describe(want)}."
    if answer is None:
        return f"got {_describe(got)}, expected numbers of shape {tuple(target.shape)}."
    if answer.shape != target.shape:
        return f"the shape is {tuple(answer.shape)}, expected {tuple(target.shape)}."
    tolerance = _tolerance(got, want)
    close = torch.isclose(answer, target, rtol=tolerance, atol=tolerance * _size(target))
    if close.all():
        return None
    where = tuple((~close).nonzero()[0].tolist())
    entry = f"entry {list(where)}" if where else "your result"
    return f"{entry} is {answer[where].item():.6g}, expected {target[where].item():.6g}."


def _tolerance(got, want) -> float:
    """Whole numbers must match; otherwise what the coarser of the two float types can give."""
    if not torch.as_tensor(_first(want)).is_floating_point():
        return 0.0
    coarse = str(getattr(got, "dtype", "")).endswith(("float16", "half"))
    return 2e-2 if coarse else 1e-4


def _first(value):
    return _first(value[0]) if isinstance(value, list) and value else value


def _size(target: torch.Tensor) -> float:
    """The largest finite entry: rounding is judged against it, so that an entry that should be 0 may be 1e-8."""
    finite = target[target.isfinite()].abs()
    return max(finite.max().item(), 1e-3) if finite.numel() else 1e-3


def _numbers(value) -> torch.Tensor | None:
    """``value`` as a float64 tensor, or None if it does not consist of real numbers."""
    if isinstance(value, str) or value is None:
        return None
    try:
        tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError):   # ragged lists, objects, strings, lists of tensors with a graph
        return None
    return None if tensor.is_complex() else tensor.double()


def _describe(value) -> str:
    numbers = _numbers(value)
    if numbers is not None and numbers.ndim:
        return f"a {type(value).__name__} of shape {tuple(numbers.shape)}"
    return repr(value[:60]) if isinstance(value,
                                          str) else f"{' '.join(str(value).split())[:60]} ({type(value).__name__})"


def _copy(value):
    """A deep copy; a tensor is cut from its graph, which `copy.deepcopy` would refuse."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(each) for each in value)
    return copy.deepcopy(value)


def _same(now, before) -> bool:
    if isinstance(before, (torch.Tensor, np.ndarray)):
        return np.array_equal(_numbers(now), _numbers(before), equal_nan=True)
    if isinstance(before, nn.Module):   # weights and buffers; what requires a gradient may be changed
        return _same(dict(now.state_dict()), dict(before.state_dict()))
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(_same(now[key], before[key]) for key in before)
    if isinstance(before, (tuple, list)):
        return len(now) == len(before) and all(map(_same, now, before))
    return now == before if isinstance(before, (int, float, str)) else True


def check_choice(number: str, answer: str | None, right: str, because: str, hints: dict[str, str]) -> Verdict:
    """A diagnosis of one word. ``hints`` has an entry for each wrong choice; ``because`` explains the right one."""
    if answer in (None, ..., ""):
        return not_attempted(number)
    given = str(answer).strip().lower()
    if given == right.lower():
        return say(number, True, f"correct: {because}")
    known = {choice.lower(): text for choice, text in hints.items()}
    choices = ", ".join(sorted([right, *hints]))
    return say(number, False, known.get(given, f"{str(answer)!r} is not one of the choices: {choices}."))


def check_match(number: str, answers: dict, right: dict, because: str, hints: dict) -> Verdict:
    """A diagnosis of several things, ``{"curve A": "cause", ...}``; ``hints`` has one for each key."""
    if not answers or all(answer in (None, ...) for answer in answers.values()):
        return not_attempted(number)
    wrong = [key for key in right if str(answers.get(key)).strip().lower() != right[key].lower()]
    if not wrong:
        return say(number, True, f"correct: {because}")
    return say(number, False, f"{len(right) - len(wrong)} of {len(right)} right; look at {wrong[0]}: {hints[wrong[0]]}")


def check_decision(number: str, choice, scores: dict, within: float, because: str,
                   unit: str = "nats per token") -> Verdict:
    """A choice judged by its held-out score, lower is better; it passes within ``within`` of the best."""
    if choice in (None, ..., ""):
        return not_attempted(number)
    if choice not in scores:
        return say(number, False, f"{choice!r} is not one of the choices: {', '.join(map(str, scores))}.")
    best = min(scores, key=scores.get)
    if scores[choice] <= scores[best] + within:
        return say(number, True, f"a good choice, {scores[choice]:.3g} {unit} on held-out data: {because}")
    return say(number, False, f"{choice} scores {scores[choice]:.3g} {unit} on held-out data; another choice reaches "
                              f"{scores[best]:.3g}.")


def not_attempted(number: str) -> Verdict:
    return say(number, None, "not attempted yet.")


def say(number: str, passed: bool | None, text: str) -> Verdict:
    mark = {True: " ✓ ", False: " ✗ ", None: ": "}[passed]
    verdict = Verdict(passed, f"Exercise {number}{mark}{text}")
    print(printable(verdict.line))
    return verdict
