"""The judge of exercises: the stub, right answers in many dresses, and wrong answers of many kinds."""
import numpy as np
import pytest
import torch
from torch import nn

from lora_edu.course.page.exercises import Verdict, check, check_choice, check_decision, check_match

CASES = [(torch.arange(6.0).reshape(2, 3) - 1, torch.arange(8.0).reshape(4, 2) - 3, 6.0),
         (torch.arange(15.0).reshape(3, 5) / 7, torch.arange(6.0).reshape(2, 3) - 2.5, 4.0)]


def oracle(A, B, alpha):
    """The update LoRA adds, as a sum of outer products (the solution multiplies matrices)."""
    return sum(torch.outer(B[:, i], A[i]) for i in range(len(A))) * alpha / len(A)


def solution(A, B, alpha):
    return alpha / A.shape[0] * B @ A


def stub(A, B, alpha):
    """Return the update."""
    ...


def judge(student, **more) -> Verdict:
    return check("1.1", student, CASES, oracle, **more)


def in_place(A, B, alpha):
    A *= alpha / len(A)
    return B @ A


def in_place_and_silent(A, B, alpha):
    A.mul_(2)


def nan_in_one_place(A, B, alpha):
    update = solution(A, B, alpha)
    update[1, 0] = torch.nan
    return update


def forgets(A, B, alpha):
    solution(A, B, alpha)


RIGHT = {
    "the solution": solution,
    "float64": lambda A, B, alpha: solution(A.double(), B.double(), alpha),
    "numpy": lambda A, B, alpha: alpha / len(A) * B.numpy() @ A.numpy(),
    "a list": lambda A, B, alpha: solution(A, B, alpha).tolist(),
    "with a graph": lambda A, B, alpha: solution(A.requires_grad_(), B, alpha),
}
WRONG = {
    "not divided by the rank": (lambda A, B, alpha: alpha * B @ A, "entry [0, 0] is -6, expected -3."),
    "hard-coded for the first case": (lambda A, B, alpha: oracle(*CASES[0]), "the shape is (4, 3), expected (2, 5)."),
    "float16": (lambda A, B, alpha: solution(A, B, alpha).half(), "right to the digits of 16 bits, and more are asked "
                                                                  "for: compute in float32."),
    "bfloat16": (lambda A, B, alpha: solution(A, B, alpha).bfloat16(), "right to the digits of 16 bits"),
    "transposed": (lambda A, B, alpha: solution(A, B, alpha).T, "the shape is (3, 4), expected (4, 3)."),
    "overwrites its input": (in_place, "your function changes its input (argument 1): compute on a copy, x = x + 1 and "
                                       "not x += 1."),
    "overwrites and returns nothing": (in_place_and_silent, "your function changes its input (argument 1): compute on "
                                                            "a copy, x = x + 1 and not x += 1."),
    "raises": (lambda A, B, alpha: A @ B[:1].T, "your function raised RuntimeError: mat1 and mat2"),
    "raises a message of two lines": (lambda A, B, alpha: {}["a\nb"], "your function raised KeyError: 'a\\nb'"),
    "has another signature": (lambda A, B: B @ A, "your function raised TypeError: "),
    "nan in one place": (nan_in_one_place, "entry [1, 0] is nan, expected 3."),
    "cut to whole numbers": (lambda A, B, alpha: solution(A, B, alpha).round().int(), "entry [0, 0] is "),
    "text": (lambda A, B, alpha: "B @ A", "got 'B @ A', expected numbers of shape (4, 3)."),
    "complex": (lambda A, B, alpha: solution(A, B, alpha) * 1j, "got "),
    "a ragged list": (lambda A, B, alpha: [[1.0], [1.0, 2.0]], "got [[1.0], [1.0, 2.0]] (list), expected numbers of "
                                                               "shape (4, 3)."),
    "a tuple": (lambda A, B, alpha: (A, B), "got "),
    "one entry off by 0.1 %": (lambda A, B, alpha: solution(A, B, alpha) * torch.tensor([1, 1, 1.001])[:len(A[0])]
                               if len(A) == 2 else solution(A, B, alpha), "entry [0, 2] is -33.033, expected -33."),
    "nothing for the second case": (lambda A, B, alpha: solution(A, B, alpha) if len(A) == 2 else None,
                                    "your function returns nothing: is a `return` missing?"),
    "a number where a function is wanted": (3.0, "a function is wanted here, and this is 3.0 (float)."),
    "a forgotten return": (forgets, "your function returns nothing: is a `return` missing?"),
}


@pytest.mark.parametrize("student", RIGHT.values(), ids=RIGHT)
def test_right_answers_pass_whatever_their_type(student, capsys):
    assert judge(student)
    assert capsys.readouterr().out == "Exercise 1.1 ✓ correct.\n"


@pytest.mark.parametrize("student, line", WRONG.values(), ids=WRONG)
def test_wrong_answers_get_one_line_that_says_what_is_wrong(student, line, capsys):
    assert judge(student).passed is False
    out = capsys.readouterr().out
    assert out.startswith("Exercise 1.1 ✗ ") and out.count("\n") == 1 and line in out, out
    if "a function is wanted" not in line:
        shown = ("1 of 2 (A (2, 3), B (4, 2), alpha 6): ", "2 of 2 (A (3, 5), B (2, 3), alpha 4): ")
        assert out.startswith(tuple("Exercise 1.1 ✗ case " + each for each in shown))
    if line.endswith("."):
        assert out.endswith(f"{line}\n")


@pytest.mark.parametrize("student", [stub, None, ..., lambda *_: ..., lambda *_: None])
def test_a_stub_is_not_attempted_and_not_wrong(student, capsys):
    verdict = judge(student)
    assert verdict.passed is None and not verdict
    assert capsys.readouterr().out == "Exercise 1.1: not attempted yet.\n"


def test_the_verdict_at_the_end_of_a_cell_adds_nothing_to_its_output():
    from IPython.core.interactiveshell import InteractiveShell
    data, _ = InteractiveShell.instance().display_formatter.format(judge(solution))
    assert data == {}


def test_the_cases_are_left_as_they_were():
    before = [(A.clone(), B.clone(), alpha) for A, B, alpha in CASES]
    judge(in_place)
    for (A, B, _), (old_A, old_B, _) in zip(CASES, before):
        assert torch.equal(A, old_A) and torch.equal(B, old_B)


def test_the_hint_sees_float64_tensors_and_speaks_only_of_what_it_knows(capsys):
    def hint(got, want, A, B, alpha):
        assert got.dtype == want.dtype == torch.float64
        if got.shape == want.shape and torch.allclose(got, want * len(A)):
            return "right product, but it is not divided by the rank."
    judge(lambda A, B, alpha: alpha * B @ A, hint=hint)
    judge(lambda A, B, alpha: (alpha * B @ A).numpy(), hint=hint)
    judge(lambda A, B, alpha: 2 + B @ A, hint=hint)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] == ("Exercise 1.1 ✗ case 1 of 2 (A (2, 3), B (4, 2), alpha 6): right product, but it "
                                    "is not divided by the rank.")
    assert "entry [0, 0] is " in lines[2]


def one(want, got):
    return check("2.1", lambda: got, [()], lambda: want).passed


@pytest.mark.parametrize("want, got, passed", [
    (65536, 65536, True), (65536, 65536.0, True), (65536, np.int64(65536), True), (65536, torch.tensor(65536), True),
    (65536, 65537, False), (16777216, 16777217, False), (0.25, 0.25001, True), (0.25, 0.26, False), (0.0, 1e-9, True),
    (0.0, 1e-3, False),
    (0.5, [0.5], False), (True, True, True), (True, False, False), ("q_proj", "q_proj", True),
    ("q_proj", "k_proj", False),
    (["q", "v"], ["q", "v"], True), (["q", "v"], ["q"], False), (["q", "v"], "q", False), ({"q"}, {"q"}, True),
    ({"q"}, ["q"], False),
    ((2, torch.ones(3)), (2, np.ones(3)), True), ((2, torch.ones(3)), (2, torch.zeros(3)), False),
    ((2, 3), torch.Size([2, 3]), True),
    (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf]), True),
    (torch.tensor([1.0, torch.inf]), torch.tensor([2.0, torch.inf]), False), (torch.empty(0), torch.empty(0), True)])
def test_results_of_every_kind(want, got, passed):
    assert one(want, got) is passed


@pytest.mark.parametrize("change", [lambda values: values.append(3), lambda values: values.__setitem__(0, 9)])
def test_a_changed_list_is_an_overwritten_input(change, capsys):
    def student(values):
        change(values)
        return 3
    assert check("2.2", student, [([1, 2],)], sum).passed is False
    assert "changes its input (argument 1)" in capsys.readouterr().out


def test_a_model_may_be_frozen_in_place_but_its_weights_may_not_change(capsys):
    def count(model):
        return sum(p.numel() for p in model.parameters())

    def freezes(model):
        model.requires_grad_(False)
        return count(model)

    def zeroes(model):
        nn.init.zeros_(model.weight)
        return count(model)
    assert check("2.3", freezes, [(nn.Linear(3, 2),)], count)
    assert not check("2.3", zeroes, [(nn.Linear(3, 2),)], count)
    assert "changes its input" in capsys.readouterr().out


def test_torch_is_as_it_was_and_an_answer_has_its_time(monkeypatch, capsys):
    from lora_edu.course.page import exercises, guarded
    monkeypatch.setattr(exercises, "guarded", lambda: guarded.guarded(0.2))
    state = torch.get_rng_state()

    def meddles(A, B, alpha):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.manual_seed(1)
        return solution(A, B, alpha)

    def endless(*case):
        while True:
            try:
                sum(range(1000))
            except Exception:       # the kind of answer that must not swallow the signal
                pass
    judge(meddles)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.ones(1).device.type == "cpu" and torch.equal(torch.get_rng_state(), state)
    assert not torch.overrides._get_current_function_mode_stack()       # no default device is left set
    assert judge(endless).passed is False and "a loop without an end" in capsys.readouterr().out


def test_without_a_signal_or_in_another_thread_there_is_no_limit(monkeypatch):
    from lora_edu.course.page import guarded
    monkeypatch.delattr(guarded.signal, "SIGALRM")
    with guarded.guarded(1e-9):
        sum(range(1000))


def test_a_hint_that_fails_is_no_hint(capsys):
    assert judge(lambda A, B, alpha: 2 + B @ A, hint=lambda *_: 1 / 0).passed is False
    assert "entry [0, 0] is" in capsys.readouterr().out


def test_an_interrupt_is_not_a_verdict():
    def interrupted(*_):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        judge(interrupted)


@pytest.mark.parametrize("answer, passed, text", [
    (None, None, "not attempted yet."), (..., None, "not attempted yet."), ("", None, "not attempted yet."),
    (" B ", True, "correct: its loss explodes."), ("a", False, "a slow rate never jumps."),
    ("c", False, "look at step 1."),
    ("d", False, "'d' is not one of the choices: 'a', 'b', 'c'."),
    (2, False, "'2' is not one of the choices: 'a', 'b', 'c'.")])
def test_check_choice(answer, passed, text, capsys):
    verdict = check_choice("1.4", answer, "b", "its loss explodes.",
                           {"a": "a slow rate never jumps.", "c": "look at step 1."})
    assert verdict.passed is passed and capsys.readouterr().out.endswith(text + "\n")


@pytest.mark.parametrize("answers, passed, text", [
    ({}, None, "not attempted yet."), ({"A": None, "B": ...}, None, "not attempted yet."),
    ({"A": "Rate", "B": "rank "}, True, "correct: see below."),
    ({"A": "rank", "B": "rank"}, False, "1 of 2 right; look at A: it explodes."),
    ({"A": "rate"}, False, "1 of 2 right; look at B: it stops early."),
    ({"A": "magic"}, False, "A: 'magic' is not one of the choices: 'rank', 'rate'."),
    (["rate", "rank"], False, "give a dict with the keys 'A', 'B', not ['rate', 'rank'] (list).")])
def test_check_match(answers, passed, text, capsys):
    verdict = check_match("1.4", answers, {"A": "rate", "B": "rank"}, "see below.",
                          {"A": "it explodes.", "B": "it stops early."})
    assert verdict.passed is passed and capsys.readouterr().out.endswith(text + "\n")


@pytest.mark.parametrize("choice, passed, text", [
    (None, None, "not attempted yet."),
    ("all", True, "a good choice, 0.24 nats per token on held-out data: every layer helps."),
    ("mlp", True, "a good choice, 0.25 nats"),
    ("qv", False, "qv scores 0.4 nats per token on held-out data; another choice reaches 0.24."),
    ("head", False, "'head' is not one of the choices: 'qv', 'mlp', 'all'."),
    (["qv"], False, "['qv'] is not one of the choices"), (" ALL ", True, "a good choice")])
def test_check_decision(choice, passed, text, capsys):
    verdict = check_decision("1.5", choice, {"qv": 0.40, "mlp": 0.25, "all": 0.24}, within=0.02, because="every layer "
                                                                                                         "helps.")
    assert verdict.passed is passed and text in capsys.readouterr().out
