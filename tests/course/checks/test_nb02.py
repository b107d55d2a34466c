"""Notebook 02's checkers against the stub, a right answer, and wrong ones of several kinds."""
import pytest

from lora_edu.course.checks import nb02
from lora_edu.course.records.stored import load_record
from lora_edu.lora.targets import PLACEMENTS


def good_matching(names, entries):
    return [name for name in names if any(name == entry or name.endswith("." + entry) for entry in entries)]


def good_rank(shapes, budget):
    return min(budget // sum(o + i for o, i in shapes), min(min(shape) for shape in shapes))


def raises(*args):
    raise KeyError("no")


def eats_its_input(names, entries):
    found = good_matching(names, entries)
    names.clear()
    return found


RIGHT = {"P": "rate too high", "Q": "factors not given to the optimizer", "R": "rate about right", "S": "rate too low"}


@pytest.mark.parametrize("checker, answer, passed, says", [
    (nb02.check_matching, lambda names, entries: None, None, "not attempted"),
    (nb02.check_matching, good_matching, True, "correct"),
    (nb02.check_matching, lambda names, entries: [n for n in names if any(n.endswith(e) for e in entries)], False,
     "after a dot"),
    (nb02.check_matching, lambda names, entries: good_matching(names, entries)[::-1], False, "not in the order"),
    (nb02.check_matching, lambda names, entries: ["layers.0.q_proj", "layers.1.q_proj"], False, "case 2"),
    (nb02.check_matching, eats_its_input, False, "changes its input"),
    (nb02.check_matching, raises, False, "raised KeyError"),
    (nb02.check_rank_for_budget, lambda shapes, budget: None, None, "not attempted"),
    (nb02.check_rank_for_budget, good_rank, True, "correct"),
    (nb02.check_rank_for_budget, lambda shapes, budget: budget // sum(o + i for o, i in shapes), False, "smaller side"),
    (nb02.check_rank_for_budget, lambda shapes, budget: good_rank(shapes, budget) + 1, False, "one too many"),
    (nb02.check_rank_for_budget, lambda shapes, budget: 9, False, "case 2"),
    (nb02.check_rank_for_budget, raises, False, "raised KeyError"),
    (nb02.check_causes, dict.fromkeys("PQRS"), None, "not attempted"),
    (nb02.check_causes, RIGHT, True, "correct"),
    (nb02.check_causes, RIGHT | {"P": "rate too low", "S": "rate too high"}, False, "2 of 4"),
    (nb02.check_causes, dict.fromkeys("PQRS", "rate too high"), False, "1 of 4"),
    (nb02.check_causes, {"Q": "magic"}, False, "not one of the choices"),
    (nb02.check_placement, None, None, "not attempted"),
    (nb02.check_placement, "everything", False, "not one of the choices"),
])
def test_checker(checker, answer, passed, says, capsys):
    assert checker(answer).passed is passed
    assert says in capsys.readouterr().out


def test_the_placements_are_judged_by_the_record(capsys):
    """On documentation: the answer is not that of restaurants, which the reader has seen."""
    found = load_record("placements_docs")["tasks"]["python_docs"]
    means = {name: its["mean test"] for name, its in found.items() if name in PLACEMENTS}
    assert means.keys() == PLACEMENTS.keys()
    for name, mean in means.items():
        assert nb02.check_placement(name).passed is (mean <= min(means.values()) + 0.02)
    # else there is nothing to decide
    assert not all(mean <= min(means.values()) + 0.02 for mean in means.values())


def test_the_mystery_curves_look_like_their_causes():
    curves = {name: [y for _, y in points] for name, points in nb02.mystery_curves().items()}
    assert len(set(curves["Q"])) == 1
    assert curves["R"][-1] < min(curves["P"][-1], curves["S"][-1], curves["Q"][-1]) - 0.02
    assert curves["S"] == sorted(curves["S"], reverse=True)
