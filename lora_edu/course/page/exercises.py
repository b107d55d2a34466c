"""Judge a reader's answer and say what is wrong with it in one line.

`check` judges a function against an oracle, `check_choice` and `check_match` a diagnosis, `check_decision` a choice
scored by a measurement, `check_limits` plans that must stay within limits. The checkers themselves, one file a
notebook, stand in ``checks/``, so that a notebook's cell shows no answer.
"""
import copy
import dis
import inspect
import itertools
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_edu.course.page.guarded import SECONDS, TooSlow, guarded
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
    if student is None or student is ... or is_stub(student):
        return not_attempted(number)
    if not callable(student):
        return say(number, False, f"a function is wanted here, and this is {describe(student)}.")
    for i, case in enumerate(cases, 1):
        wrong = _judge(student, case, oracle, hint)
        if wrong is not None:
            return say(number, False, f"case {i} of {len(cases)} ({_shown(oracle, case)}): {wrong}")
    return say(number, True, "correct.")


def is_stub(student) -> bool:
    """Is its body what stands in the notebook, a docstring and ``...``?"""
    code = getattr(student, "__code__", None)
    does = {step.opname for step in dis.get_instructions(code)} if code else {"something"}
    return does <= {"RESUME", "NOP", "COPY_FREE_VARS", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"} and (
        {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_CONST", "RETURN_CONST")}
        <= {None, ...})


def _shown(oracle, case: tuple) -> str:
    """The arguments of a case, shortened: "A (2, 3), alpha 6"."""
    names = list(inspect.signature(oracle).parameters)
    words = (f"{name} " + (f"{tuple(value.shape)}" if isinstance(value, (torch.Tensor, np.ndarray)) else
                           type(value).__name__ if isinstance(value, nn.Module) else
                           f"{value:g}" if isinstance(value, float) else _cut(repr(value), 60))
             for name, value in zip(names, case))
    return _cut(", ".join(words), 150)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most - 1] + "…"


def _judge(student, case, oracle, hint) -> str | None:
    """What is wrong with the answer to one case; None for right."""
    want, given = oracle(*_copy(case)), _copy(case)
    try:
        with guarded():
            got = student(*given)
            if isinstance(got, (types.GeneratorType, map, filter, zip, range)):
                got = list(itertools.islice(got, 10**6))              # it may have no end
    except TooSlow:
        return f"your function has not come back after {SECONDS} seconds: is there a loop without an end in it?"
    except Exception as error:   # whatever a reader's code may raise is a verdict, not a traceback
        return f"your function raised {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for position, (now, before) in enumerate(zip(given, case), 1):
        if not _same(now, before):
            return (f"your function changes its input (argument {position}): "
                    "compute on a copy, x = x + 1 and not x += 1.")
    if got is None or got is ...:
        return "your function returns nothing: is a `return` missing?"
    wrong = _difference(got, want)
    if wrong and hint:
        wrong = _hinted(hint, got, want, case) or wrong
    return wrong


def _hinted(hint, got, want, case) -> str | None:
    """What the hint says; nothing where the answer is of a kind that it does not know."""
    try:
        return hint(*(_numbers(v) if _numbers(v) is not None else v for v in (got, want)), *_copy(case))
    except Exception:
        return None


def _difference(got, want) -> str | None:
    """The first way in which ``got`` is not ``want``, in words; None if there is none."""
    if isinstance(want, (tuple, list)) and _numbers(want) is None or isinstance(want, tuple):
        got = list(got) if isinstance(got, (torch.Tensor, np.ndarray)) and got.ndim else got
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"expected {_count(want)}, got {describe(got)}."
        found = ((i, _difference(g, w)) for i, (g, w) in enumerate(zip(got, want), 1))
        return next((f"value {i}: {wrong}" for i, wrong in found if wrong), None)
    target, answer = _numbers(want), _numbers(got)
    if target is None:
        same = (isinstance(got, str) if isinstance(want, str) else type(got) is type(want)) and got == want
        return None if same else f"got {describe(got)}, expected {describe(want)}."
    if answer is None:
        kind = f"numbers of shape {tuple(target.shape)}" if target.ndim else "a number"
        return f"got {describe(got)}, expected {kind}."
    if answer.shape != target.shape:
        return f"the shape is {tuple(answer.shape)}, expected {tuple(target.shape)}."
    return _farthest(answer, target, _tolerance(want), coarse=_is_coarse(got))


def _farthest(answer: torch.Tensor, target: torch.Tensor, tolerance: float, coarse: bool) -> str | None:
    """The first entry that is not near enough; None if all are."""
    def near(tolerance):
        return torch.isclose(answer, target, rtol=tolerance, atol=tolerance * _size(target))
    close = near(tolerance)
    if close.all():
        return None
    if coarse and near(2e-2).all():
        return "right to the digits of 16 bits, and more are asked for: compute in float32."
    where = tuple((~close).nonzero()[0].tolist())
    entry = f"entry {list(where)}" if where else "your result"
    return f"{entry} is {answer[where].item():.6g}, expected {target[where].item():.6g}."


def _tolerance(want) -> float:
    """Whole numbers must match; otherwise what the type of the right answer can give."""
    if not torch.as_tensor(_first(want)).is_floating_point():
        return 0.0
    return 2e-2 if _is_coarse(want) else 1e-4


def _is_coarse(value) -> bool:
    return str(getattr(value, "dtype", "")).endswith(("float16", "half"))


def _count(values) -> str:
    return f"{len(values)} values" if len(values) != 1 else "1 value"


def _first(value):
    return _first(value[0]) if isinstance(value, list) and value else value


def _size(target: torch.Tensor) -> float:
    """The largest finite entry: rounding is judged against it, so that an entry that should be 0 may be 1e-8."""
    finite = target[target.isfinite()].abs()
    return max(finite.max().item(), 1e-3) if finite.numel() else 1e-3


def _numbers(value) -> torch.Tensor | None:
    """``value`` as a float64 tensor, or None if it does not consist of real numbers."""
    if isinstance(value, (str, dict, set)) or value is None:
        return None
    try:
        if isinstance(value, (list, tuple)) and value and all(isinstance(each, torch.Tensor) for each in value):
            value = torch.stack([each.detach().cpu().double() for each in value])
        elif isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float, np.generic)):
            value = float(value)                       # a Fraction, a Decimal
        tensor = value.detach().cpu() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError):   # ragged lists, objects, strings, lists of tensors with a graph
        return None
    return None if tensor.is_complex() else tensor.double()


def describe(value) -> str:
    if isinstance(value, (list, tuple)) and not value:
        return f"an empty {type(value).__name__}"
    numbers_of = _numbers(value)
    if numbers_of is not None and numbers_of.ndim:
        return f"a {type(value).__name__} of shape {tuple(numbers_of.shape)}"
    return repr(str(value)[:60]) if isinstance(value, str) else (
        f"{' '.join(str(value).split())[:60]} ({type(value).__name__})")


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
    if isinstance(before, (int, float, str)):
        return now == before or before != before and now != now         # nan equals nothing, itself included
    return True


def word(answer) -> str:
    """An answer in words as it is compared: case, spaces, quotes and the point of 16.0 do not count.

    >>> word(" 'Rank  too Small' "), word(16.0), word(np.int64(16))
    ('rank too small', '16', '16')
    """
    if isinstance(answer, numbers.Real) and not isinstance(answer, bool):
        return f"{float(answer):.12g}"
    return " ".join(str(answer).strip().strip("'\"").lower().split())


def is_blank(answer) -> bool:
    return answer is None or answer is ... or isinstance(answer, str) and not word(answer)


def _quoted(choices) -> str:
    return ", ".join(map(repr, choices))


def check_choice(number: str, answer: str | None, right: str, because: str, hints: dict[str, str]) -> Verdict:
    """A diagnosis of one word. ``hints`` has an entry for each wrong choice; ``because`` explains the right one."""
    if is_blank(answer):
        return not_attempted(number)
    if word(answer) == word(right):
        return say(number, True, f"correct: {because}")
    known = {word(choice): text for choice, text in hints.items()}
    choices = _quoted(sorted([right, *hints]))
    return say(number, False, known.get(word(answer), f"{str(answer)!r} is not one of the choices: {choices}."))


def by_key(number: str, answers, keys) -> dict | Verdict:
    """The answers of a dict, one for each of the keys (None where there is none), or what is said of one without any.
    Case and spaces of the keys do not count.
    """
    if is_blank(answers):
        return not_attempted(number)
    if not isinstance(answers, dict):
        return say(number, False, f"give a dict with the keys {_quoted(keys)}, not {describe(answers)}.")
    given = {word(key): answer for key, answer in answers.items()}
    if all(is_blank(answer) for answer in given.values()):
        return not_attempted(number)
    return {key: given.get(word(key)) for key in keys}


def check_match(number: str, answers: dict, right: dict, because: str, hints: dict) -> Verdict:
    """A diagnosis of several things, ``{"curve A": "cause", ...}``; ``hints`` has one for each key."""
    answered = by_key(number, answers, right)
    if isinstance(answered, Verdict):
        return answered
    choices = sorted(set(right.values()))
    for key, answer in answered.items():
        if not is_blank(answer) and word(answer) not in map(word, choices):
            return say(number, False, f"{key}: {str(answer)!r} is not one of the choices: {_quoted(choices)}.")
    wrong = [key for key, answer in answered.items() if word(answer) != word(right[key])]
    if not wrong:
        return say(number, True, f"correct: {because}")
    return say(number, False, f"{len(right) - len(wrong)} of {len(right)} right; look at {wrong[0]}: {hints[wrong[0]]}")


def check_limits(number: str, answers: dict, plans: tuple, limits: dict, consequences: Callable) -> Verdict:
    """A plan for each situation, judged by what it is found to do.

    ``limits``: {situation: {what: the most}}; ``consequences()``: {situation: {plan: {what: how much}}}, called when
    every situation has a plan.
    """
    chosen = by_key(number, answers, limits)
    if isinstance(chosen, Verdict):
        return chosen
    for name, answer in chosen.items():
        chosen[name] = next((plan for plan in plans if word(plan) == word(answer)), None)
        if chosen[name] is None:
            said = "no plan yet" if is_blank(answer) else f"{answer!r} is not one of the plans"
            return say(number, False, f"{name}: {said}: {_quoted(plans)}.")
    print("measuring on fable, a few seconds …")
    found, told = consequences(), []
    for name, plan in chosen.items():
        does = found[name][plan]
        for what, most in limits[name].items():
            if does[what] > most:
                return say(number, False, f"{name}: {plan!r} makes {does[what]:.3g} {what}, and {most} may be.")
        told.append(f"{name} {plan}: " + ", ".join(f"{does[what]:.3g} {what}" for what in limits[name]))
    return say(number, True, f"all within their limits, measured on fable. {'; '.join(told)}.")


def check_decision(number: str, choice, scores: dict, within: float, because: str,
                   unit: str = "nats per token") -> Verdict:
    """A choice judged by its held-out score, lower is better; it passes within ``within`` of the best."""
    if is_blank(choice):
        return not_attempted(number)
    chosen = next((key for key in scores if word(key) == word(choice)), None)
    if chosen is None:
        return say(number, False, f"{choice!r} is not one of the choices: {_quoted(scores)}.")
    best = min(scores, key=scores.get)
    if scores[chosen] <= scores[best] + within:
        return say(number, True, f"a good choice, {scores[chosen]:.3g} {unit} on held-out data: {because}")
    return say(number, False, f"{chosen} scores {scores[chosen]:.3g} {unit} on held-out data; another choice reaches "
                              f"{scores[best]:.3g}.")


def not_attempted(number: str) -> Verdict:
    return say(number, None, "not attempted yet.")


def say(number: str, passed: bool | None, text: str) -> Verdict:
    mark = {True: " ✓ ", False: " ✗ ", None: ": "}[passed]
    verdict = Verdict(passed, f"Exercise {number}{mark}{text}")
    print(printable(verdict.line))
    return verdict
