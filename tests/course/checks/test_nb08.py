"""Notebook 08's checkers against the stub, a right answer, and wrong ones of several kinds."""
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_edu.course.checks import nb08
from lora_edu.models.quantize import dequantize_nf4, quantize_nf4


def groups(n):
    return -(-n // 64 // 256)


def good_bytes(n):
    return n // 2 + n // 64 + 4 * groups(n) + 4


def good_merge(codes, shape, published, A, B, scaling):
    return dequantize_nf4(*codes, shape) + scaling * B @ A


def again(codes, shape, published, A, B, scaling):
    return dequantize_nf4(**quantize_nf4(good_merge(codes, shape, published, A, B, scaling)), shape=shape)


def good_block(block, x):
    return checkpoint(block, x, use_reentrant=False)


def raises(*args):
    raise KeyError("no")


BYTES = [(lambda n: n / 2, "codes alone"), (lambda n: n / 2 + 4 * (n // 64), "without double quantisation"),
         (lambda n: n / 2 + n // 64, "need their scales"), (lambda n: good_bytes(n) - 4, "one float32 more"),
         (lambda n: n / 2 + n / 64 + n / 64 / 64 + 4, "round up"), (lambda n: good_bytes(n) + n // 2, "share a byte"),
         (lambda n: 8 * good_bytes(n), "not in bits"), (lambda n: 7, "expected"), (raises, "KeyError")]
MERGES = [(lambda c, s, p, A, B, k: p + k * B @ A, "repairs what is not broken"), (again, "rounded away"),
          (lambda c, s, p, A, B, k: dequantize_nf4(*c, s) + B @ A, "scaling is missing"),
          (lambda c, s, p, A, B, k: k * B @ A, "the update alone"),
          (lambda c, s, p, A, B, k: dequantize_nf4(*c, s), "without its update"),
          (lambda c, s, p, A, B, k: torch.zeros(1), "shape"), (raises, "KeyError")]
BLOCKS = [(lambda b, x: checkpoint(b, x, use_reentrant=True), "6 of 6 factors got no gradient"),
          (lambda b, x: b(x), "it is not checkpointed"), (lambda b, x: 2 * b(x), "not the plain block's"),
          (raises, "KeyError"), (lambda b, x: "x", "expected what the block returns")]


@pytest.mark.parametrize("checker, good", [(nb08.check_nf4_bytes, good_bytes), (nb08.check_right_merge, good_merge),
                                           (nb08.check_checkpointed, good_block)])
def test_right_answers_pass_and_stubs_are_not_attempted(checker, good):
    assert checker(good)
    for stub in (None, ..., lambda *args: None, lambda *args: ...):
        assert checker(stub).passed is None


@pytest.mark.parametrize("checker, wrong, said", [(checker, *each) for checker, those in (
    (nb08.check_nf4_bytes, BYTES), (nb08.check_right_merge, MERGES), (nb08.check_checkpointed, BLOCKS))
    for each in those])
def test_wrong_answers_are_told_why(checker, wrong, said):
    verdict = checker(wrong)
    assert verdict.passed is False and said in verdict.line


def test_an_input_that_wants_a_gradient_is_right_too():
    assert nb08.check_checkpointed(lambda b, x: checkpoint(b, x.detach().requires_grad_(), use_reentrant=True))


def test_the_mystery_runs_are_what_their_causes_do():
    runs = nb08.mystery_runs()
    assert set(runs["A"].values()) == {"none", "flows"} and runs["A"]["block 2, 7 lora_A"] == "flows"
    assert {key.rpartition(" ")[2]: said for key, said in runs["B"].items()} == {"lora_A": "zero", "lora_B": "flows"}
    assert all("1 lora" in key for key in runs["C"]) and set(runs["D"].values()) == {"flows"}
    assert nb08.check_runs(nb08.CAUSES) and nb08.check_runs({"A": None, "B": None}).passed is None
    verdict = nb08.check_runs(nb08.CAUSES | {"B": "reentrant"})
    assert verdict.passed is False and "3 of 4 right; look at B" in verdict.line


def best(rank):
    grid = nb08.load_record("real_model").runs("grid", model="SmolLM2", method=f"rank {rank}")
    return grid.best()["lr"]


def test_a_plan_that_fits_and_learns_passes():
    assert nb08.check_plan(("nf4", "float16", 16, best(16))) and nb08.check_plan(None).passed is None
    assert nb08.check_plan(["nf4-double", "float16", 1, best(1)])


@pytest.mark.parametrize("plan, said", [
    (("fp32", "float32", 16, 0.002), "do not fit in 15; the largest part is weights"),
    (("16-bit", "float16", 16, 0.002), "do not fit in 15"), (("nf4", "bfloat16", 16, 0.002), "emulates bfloat16"),
    (("nf4", "float32", 16, 0.002), "tensor cores unused"), (("nf4", "fp8", 16, 0.002), "not one of the products"),
    (("nf4", "float16", 4, 0.002), "no rank 4"), (("nf4", "float16", 16, 0.003), "no rank 16 at rate 0.003"),
    (("nf4", "float16", 16, 0.008), "another rank or rate reaches"), (("fp8", "float16", 16, 0.002), "recipe='fp8'"),
    (7, "cannot be billed"), (("nf4", "float16", "x", 1), "cannot be billed")])
def test_other_plans_are_told_why(plan, said):
    verdict = nb08.check_plan(plan)
    assert verdict.passed is False and said in verdict.line
