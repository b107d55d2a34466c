"""Notebook 06's checkers against the stub, a right answer, and wrong ones of several kinds."""
import numpy as np
import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course import toys
from lora_edu.course.checks import nb06
from lora_edu.training import bistro


def product(lora_A, lora_B, alpha):
    return alpha / lora_A.shape[0] * (lora_B @ lora_A)


def good_fold(weight, lora_A, lora_B, alpha):
    return (weight.float() + product(lora_A, lora_B, alpha)).to(weight.dtype)


def only_float32(wrong):
    """Right in 16 bits, wrong in float32: the first case."""
    return lambda weight, *rest: (wrong if weight.dtype == torch.float32 else good_fold)(weight, *rest)


def only_square(wrong):
    return lambda weight, *rest: (wrong if weight.shape[0] == weight.shape[1] else good_fold)(weight, *rest)


def eats_its_input(weight, lora_A, lora_B, alpha):
    weight += product(lora_A, lora_B, alpha).to(weight.dtype)
    return weight


def raises(*args):
    raise KeyError("no")


FOLD = [
    (None, None, "not attempted"), (..., None, "not attempted"), (lambda *case: None, None, "not attempted"),
    (good_fold, True, "correct"),
    (lambda W, A, B, alpha: (W.double() + alpha / len(A) * (B.double() @ A.double())).to(W.dtype), True, "correct"),
    (lambda W, A, B, alpha: (W.float() + B @ (A * (alpha / len(A)))).to(W.dtype), True, "correct"),
    (lambda W, A, B, alpha: torch.addmm(W.float(), B, A, alpha=alpha / len(A)).to(W.dtype), True, "correct"),
    (lambda W, A, B, alpha: (W.float() + B @ A).to(W.dtype), False, "the scaling alpha / rank is missing"),
    (lambda W, A, B, alpha: (W.float() + alpha * (B @ A)).to(W.dtype), False, "alpha is not divided by the rank"),
    (lambda W, A, B, alpha: product(A, B, alpha), False, "the update alone"),
    (lambda W, A, B, alpha: (W.float() - product(A, B, alpha)).to(W.dtype), False, "not subtracted"),
    (only_square(lambda W, A, B, alpha: (W.float() + product(A, B, alpha).T).to(W.dtype)), False, "the "
     "product is transposed"),
    (lambda W, A, B, alpha: (W.float() + product(A, B, alpha).T).to(W.dtype), False, "raised RuntimeError"),
    (lambda W, A, B, alpha: W.float() + product(A, B, alpha), False, "the merged weight is float32 and "
                                                                     "should have the type of the weight, bfloat16"),
    (lambda W, A, B, alpha: W + product(A, B, alpha), False, "should have the type of the weight"),
    (lambda W, A, B, alpha: W + product(A, B, alpha).to(W.dtype), False, "entries differ in their last bit: rounded "
                                                                         "more than once"),
    (lambda W, A, B, alpha: (W.float() + alpha / len(A) * (B.to(W.dtype) @ A.to(W.dtype)).float()).to(W.dtype), False,
     "in their last bit"),
    (lambda W, A, B, alpha: W + (alpha / len(A)) * (B.to(W.dtype) @ A.to(W.dtype)), False, "in their last bit"),
    (lambda W, A, B, alpha: good_fold(W, A, B, alpha).numpy() if W.dtype == torch.float32 else None, False,
     "returns nothing: is a"),
    (lambda W, A, B, alpha: good_fold(W, A, B, alpha).T, False, "shape"),
    (lambda W, A, B, alpha: good_fold(W, A, B, alpha).tolist(), False, "is list and should"),
    (lambda W, A, B, alpha: good_fold(W, A, B, 6.0), False, "case 2"),
    (lambda W, A, B, alpha: good_fold(W, A, B, 3 * len(A)), False, "case 2"),
    (eats_its_input, False, "changes its input (argument 1)"), (raises, False, "raised KeyError"),
]


def good_cost(config, tokens):
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return numbers, config.max_position_embeddings - tokens


def cost(numbers=None, left=None):
    """One of the two wrong."""
    def answer(config, tokens):
        right = good_cost(config, tokens)
        return numbers(config, tokens) if numbers else right[0], left(config, tokens) if left else right[1]
    return answer


COST = [
    (None, None, "not attempted"), (lambda config, tokens: None, None, "not attempted"),
    (good_cost, True, "correct"), (lambda *case: list(good_cost(*case)), True, "correct"),
    (lambda *case: np.array(good_cost(*case)), True, "correct"),
    (cost(lambda c, n: 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * n), False,
     "keys and values have num_key"),
    (cost(lambda c, n: 2 * c.num_hidden_layers * c.hidden_size * n), False, "case 2 of 3 ("),
    (cost(lambda c,
          n: 2 * c.num_hidden_layers * (c.hidden_size if c.num_attention_heads == 4 and c.num_key_value_heads == 1 else
                                                  c.num_key_value_heads * c.head_dim) * n), False, "not hidden_size"),
    (cost(lambda c, n: c.num_hidden_layers * c.num_key_value_heads * c.head_dim * n), False, "keys and values: two "
                                                                                             "numbers"),
    (cost(lambda c, n: 2 * c.num_key_value_heads * c.head_dim * n), False, "every layer has a prefix of its own"),
    (cost(lambda c, n: 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim), False, "one token's prefix"),
    (cost(left=lambda c, n: c.max_position_embeddings), False, "the prefix has places in the context, too"),
    (cost(left=lambda c, n: c.max_position_embeddings - c.num_hidden_layers * n), False, "the same in every layer"),
    (cost(left=lambda c, n: c.max_position_embeddings - n - 1), False, "is 26, expected 27"),
    (lambda *case: good_cost(*case)[::-1], False, "the numbers come first"),
    (lambda *case: good_cost(*case)[0], False, "expected 2 values"),
    (lambda config, tokens: (480, 27), False, "case 2"),
    (lambda *case: ("many", 27), False, "expected"), (raises, False, "raised KeyError"),
]
CASES = [(checker, *each) for checker, rows in ((nb06.check_fold, FOLD), (nb06.check_prefix_cost, COST))
         for each in rows]


@pytest.mark.parametrize("checker, answer, passed, says", CASES)
def test_checker(checker, answer, passed, says, capsys):
    assert checker(answer).passed is passed
    assert says in capsys.readouterr().out


def test_a_merge_s_bits_do_not_hang_on_the_order_of_the_products(monkeypatch):
    """No sum of a case lies so near the middle of two 16-bit numbers that float32's own rounding could decide it."""
    seen = []
    monkeypatch.setattr(nb06, "check", lambda number, student, cases, **how: seen.extend(cases))
    nb06.check_fold(good_fold)
    assert [str(case[0].dtype) for case in seen] == ["torch.float32", "torch.bfloat16", "torch.bfloat16"]
    for weight, lora_A, lora_B, alpha in seen[1:]:
        exact = weight.double() + product(lora_A.double(), lora_B.double(), alpha)
        for nudge in (1 - 1e-6, 1 + 1e-6):
            assert torch.equal((exact * nudge).to(weight.dtype), exact.to(weight.dtype))


def test_the_four_merges_are_what_the_key_says():
    """Oracle: how much of ΔW, and of ΔW transposed, each change holds."""
    weight, delta, merged = nb06.mystery_merges()
    assert weight.shape == delta.shape == (256, 256), "on a matrix that is not square, a transposed product would raise"

    def holds(change, direction):
        return ((change * direction).sum() / direction.square().sum()).item()
    held = {name: (holds(each - weight, delta), holds(each - weight, delta.T)) for name, each in merged.items()}
    causes = {name: cause for name, (cause, _) in nb06.MERGES.items()}
    want = {"right": (1, None), "transposed": (None, 1), "merged twice": (2, None), "scaling forgotten": (0.5, None)}
    assert sorted(causes.values()) == sorted(want)
    for name, cause in causes.items():
        for got, expected in zip(held[name], want[cause]):
            assert got == pytest.approx(expected, abs=1e-3) if expected else abs(got) < 0.2, (name, cause)
    sizes = {name: ((each - weight).norm() / delta.norm()).item() for name, each in merged.items()}
    assert round(sizes["A"], 2) == round(sizes["B"], 2) == 1.0, "the table of sizes does not tell these two apart"


RIGHT = {"A": "transposed", "B": "right", "C": "merged twice", "D": "scaling forgotten"}


@pytest.mark.parametrize("answers, passed, says", [
    (None, None, "not attempted"), (dict.fromkeys("ABCD"), None, "not attempted"),
    (RIGHT, True, "correct: the change has ΔW's size"),
    ({name: cause.upper() for name, cause in RIGHT.items()}, True, "correct"),
    (RIGHT | {"A": "right", "B": "transposed"}, False, "2 of 4 right; look at A: its change is as large as ΔW"),
    (RIGHT | {"B": "merged twice"}, False, "look at B: measure how much of ΔW its change holds"),
    (RIGHT | {"C": "scaling forgotten"}, False, "look at C: its change points along ΔW"),
    (RIGHT | {"D": None}, False, "3 of 4 right; look at D: its change points along ΔW"),
    ({"A": "transposed"}, False, "1 of 4 right")])
def test_the_merges_are_matched(answers, passed, says, capsys):
    assert nb06.check_merges(answers).passed is passed and says in capsys.readouterr().out


def test_what_each_plan_costs_is_measured():
    """Oracles: counts by hand for B and C; a merge runs the base's operators; a small update is lost in 16 bits and
    not in 32.
    """
    found = nb06.consequences()
    assert found.keys() == nb06.LIMITS.keys() and all(tuple(plans) == nb06.PLANS for plans in found.values())
    assert found["A"]["merge"] == found["A"]["merge in float32"] == 0 < min(found["A"]["keep apart"],
                                                                            found["A"]["prefix"])
    fable, adapter, prefix = 2 * 3_737_856 / 1e6, 241_000 / 1e6, 2 * 2 * 4 * 256 * 76 / 1e6
    assert list(found["B"].values()) == pytest.approx([200 * fable, 400 * fable, fable + 200 * adapter,
                                                       fable + 200 * prefix], rel=0.02)
    assert list(found["C"].values()) == [0, 0, 0, 500 + 76 - 512]
    merged, wide, apart, prefix = found["D"].values()
    assert 25 < merged < 75 and abs(wide) < 0.5 and apart == 0 and prefix == 100


MEASURED = {"A": (0, 0, 84, 12), "B": (1495, 2990, 56, 70), "C": (0, 0, 0, 64), "D": (47, 0, 0, 100)}
GOOD = {"A": "merge", "B": "keep apart", "C": "merge", "D": "merge in float32"}


@pytest.mark.parametrize("answers, passed, says", [
    (None, None, "not attempted"), (dict.fromkeys("ABCD"), None, "not attempted"), ({}, None, "not attempted"),
    (GOOD, True, "all within their limits"),
    (GOOD | {"A": "merge in float32", "B": "prefix", "C": "keep apart", "D": "keep apart"}, True, "B prefix: 70 MB"),
    (GOOD | {"A": "keep apart"}, False, "A: 'keep apart' makes 84 operators more than the base runs, and 0 may be"),
    (GOOD | {"A": "prefix"}, False, "A: 'prefix' makes 12"),
    (GOOD | {"B": "merge"}, False, "B: 'merge' makes 1.5e+03 MB"),
    (GOOD | {"C": "prefix"}, False, "C: 'prefix' makes 64 tokens"),
    (GOOD | {"D": "merge"}, False, "D: 'merge' makes 47 % of the gain"),
    (GOOD | {"D": "prefix"}, False, "D: 'prefix' makes 100 %"),
    (GOOD | {"D": None}, False, "D: no plan yet: 'merge', "),
    (GOOD | {"B": "Merge them"}, False, "B: 'Merge them' is not one of the plans"),
    ({"B": "keep apart"}, False, "A: no plan yet")])
def test_the_choices_are_judged_by_what_was_measured(answers, passed, says, capsys, monkeypatch):
    monkeypatch.setattr(nb06, "consequences",
                        lambda: {name: dict(zip(nb06.PLANS, costs)) for name, costs in MEASURED.items()})
    assert nb06.check_choice(answers).passed is passed and says in capsys.readouterr().out


# section 4

def test_far_cards_put_a_card_as_far_from_its_sentence_as_was_asked():
    tokenizer, filler = load_pretrained()[1], torch.arange(300, 1300)
    inputs, targets = toys.far_cards(tokenizer, filler, 200, n=5)
    counted = (targets != -100)
    assert inputs.shape == targets.shape and (counted.int().argmax(1)
                                              == 199).all(), "the first counted token follows a prompt of 200"
    for (record, sentence), row, wanted in zip(bistro.examples("test", 5), inputs, targets):
        text = tokenizer.decode(wanted[wanted != -100].tolist(), skip_special_tokens=False)
        assert text == f" {sentence}<|endoftext|>"
        assert tokenizer.decode(row[:200].tolist()).startswith(bistro.prompt(record).removesuffix("\n=>"))
        assert tokenizer.decode(row[:200].tolist()).endswith("\n=>")
    near = toys.far_cards(tokenizer, filler, 60, n=5)
    assert torch.equal(near[1][near[1] != -100], targets[counted]), "the same sentences at any distance"


def test_what_has_no_room_loses_its_oldest_tokens():
    tokenizer, filler = load_pretrained()[1], torch.arange(300, 1300)
    whole, cut = (toys.far_cards(tokenizer, filler, 200, room=room, n=5) for room in (512, 150))
    assert cut[0].shape[1] == 150 and torch.equal(cut[1][cut[1] != -100], whole[1][whole[1] != -100])
    for row, wanted, short in zip(*whole, cut[0]):
        length = int((wanted != -100).nonzero()[-1]) + 1
        assert torch.equal(short, row[length - 150:length])


@pytest.mark.parametrize("length", [20, 5000])
def test_a_distance_that_cannot_be_is_refused(length):
    with pytest.raises(ValueError, match=f"length={length}: a card and its arrow have"):
        toys.far_cards(load_pretrained()[1], torch.arange(1000), length)
