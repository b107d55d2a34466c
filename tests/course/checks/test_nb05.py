"""Notebook 05's checkers against the stub, a right answer, and wrong ones of several kinds."""
import pytest

from lora_edu.course.checks import nb05


def good_bytes(parameters, weight, state):
    return parameters * 2 * (weight + state)


def good_count(layers, hidden, kv, rank):
    return layers * rank * (3 * hidden + kv)


def raises(*args):
    raise KeyError("no")


BYTES = [(lambda n, w, s: n * (w + 2 * s), "gradients are missing"), (lambda n, w, s: n * (2 * w + s), "two states"),
         (lambda n, w, s: 4 * n * w, "their own type"), (lambda n, w, s: 2 * (w + s), "for one number"),
         (lambda n, w, s: n * 2 * (w + s) / 1e9, "not in GB"), (lambda n, w, s: 0, "expected"), (raises, "KeyError")]
COUNT = [(lambda L, C, kv, r: L * r * 4 * C, "`kv` outputs"),
         (lambda L, C, kv, r: L * r * (2 * C + kv), "has an A and a B"),
         (lambda L, C, kv, r: r * (3 * C + kv), "one layer"), (lambda L, C, kv, r: L * (3 * C + kv), "rank 1"),
         (lambda L, C, kv, r: L * (C * C + C * kv), "the matrices themselves"),
         (lambda L, C, kv, r: L * r * (C * C + C * kv), "not inputs times outputs"), (lambda *a: 7, "expected"),
         (raises, "KeyError")]


@pytest.mark.parametrize("checker, good", [(nb05.check_adam_bytes, good_bytes), (nb05.check_lora_count, good_count)])
def test_right_answers_pass_and_stubs_are_not_attempted(checker, good):
    assert checker(good)
    for stub in (None, ..., lambda *args: None, lambda *args: ...):
        assert checker(stub).passed is None


@pytest.mark.parametrize("wrong, said", BYTES)
def test_wrong_bytes(wrong, said):
    verdict = nb05.check_adam_bytes(wrong)
    assert verdict.passed is False and said in verdict.line


@pytest.mark.parametrize("wrong, said", COUNT)
def test_wrong_counts(wrong, said):
    verdict = nb05.check_lora_count(wrong)
    assert verdict.passed is False and said in verdict.line


def test_the_largest_batch_is_right_and_nothing_else():
    assert nb05.check_fit(("nf4", 6, True)) and nb05.check_fit(["nf4-double", 6, True])
    assert nb05.check_fit(None).passed is None


@pytest.mark.parametrize("choice, said", [
    (("nf4", 7, True), "do not fit in 19.2"), (("nf4", 5, True), "a larger batch does, too"),
    (("nf4", 1, False), "another recipe"),
    (("16-bit", 1, True), "another recipe"), (("16-bit", 1, False), "largest part is weights"),
    (("fp8", 1, True), "recipe='fp8'"),
    (("nf4", 0, True), "batch=0"), (7, "cannot be billed"), (("nf4", 7), "cannot be billed"),
    (("nf4", "ten", True), "cannot be billed")])
def test_other_choices_are_told_why(choice, said):
    verdict = nb05.check_fit(choice)
    assert verdict.passed is False and said in verdict.line


def test_the_wrong_row():
    assert nb05.check_wrong_row("70B with LoRA") and nb05.check_wrong_row(" 70b with lora ")
    assert nb05.check_wrong_row(None).passed is None
    for other in ("8B in full", "34B in full", "70B in full", "8B with LoRA", "34B with LoRA", "none"):
        verdict = nb05.check_wrong_row(other)
        assert verdict.passed is False and len(verdict.line) > 30
    sound = {"8B in full": 128 == 16 * 8, "34B in full": 272 == 8 * 34, "70B in full": 560 == 8 * 70,
             "8B with LoRA": 16 == 2 * 8, "34B with LoRA": round(2 * 34e9 / 2**30) == 63}
    assert all(sound.values()) and 48e9 < 2 * 70e9


@pytest.mark.parametrize("choice", [("NF4 ", 6.0, 1), ["'nf4'", "6", "True"], ("nf4-double", 6, True)])
def test_a_choice_that_fits_in_other_words(choice):
    assert nb05.check_fit(choice)


@pytest.mark.parametrize("choice", [("nf4", 6, "yes"), ("nf4", 6, "checkpointing"), {"nf4": 6}, "nf4", 6, (1, 2, 3),
                                    [[1], 2, 3]])
def test_a_choice_that_is_none_is_told_and_raises_nothing(choice):
    verdict = nb05.check_fit(choice)
    assert verdict.passed is False and len(verdict.line) > 30
