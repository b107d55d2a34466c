"""Notebook 09's checkers: the four runs do what they are called, and plans are judged by their bills."""
import pytest

from lora_edu.course.checks import nb09

IS_SO = {"healthy": (0, False, False), "same rows": (8, False, True), "mean of means": (0, False, True),
         "not sent": (0, True, True)}


def test_the_four_runs_do_what_they_are_called():
    """Each differs from the others in what the table shows, by more than rounding and another seed would."""
    runs = nb09.mystery_runs()
    for name, (rows, apart, away) in runs.items():
        want = IS_SO[nb09.RUNS[name]]
        assert (int(rows), float(apart) > 0.2, float(away) > 0.03) == want, (name, rows, apart, away)
    assert len(set(runs.values())) == 4


@pytest.mark.parametrize("answers, passed, words", [
    ({"A": ("nf4-double", "ddp"), "B": ("bf16-mixed", "fsdp")}, True, "A: 45 GB a card, 0.02 s"),
    ({"a ": ["NF4-double ", "DDP"], "b": ("bf16-mixed", "fsdp")}, True, "both fit"),
    ({"A": ("bf16-mixed", "ddp"), "B": ("bf16-mixed", "fsdp")}, False, "A: 146.3 GB do not fit in 48"),
    ({"A": ("bf16-mixed", "fsdp"), "B": ("bf16-mixed", "fsdp")}, False, "46 GB, and a step sends for 8.5 seconds"),
    ({"A": ("nf4-double", "fsdp"), "B": ("bf16-mixed", "fsdp")}, False, "A: ('nf4-double', 'fsdp') cannot be billed"),
    ({"A": ("nf4-double", "ddp"), "B": ("nf4-double", "ddp")}, False, "B: the weights are to be bf16-mixed"),
    ({"A": ("nf4-double", "ddp"), "B": ("bf16-mixed", "ddp")}, False, "B: 146.3 GB do not fit in 80"),
    ({"A": ("nf4-double", "ddp")}, False, "B: no plan yet"), ({"A": "pray", "B": "pray"}, False, "cannot be billed"),
    ({"A": 5, "B": 5}, False, "cannot be billed"), ("ddp", False, "give a dict"), ({}, None, "not attempted"),
    (None, None, "not attempted"), ({"A": None, "B": None}, None, "not attempted")])
def test_a_plan_is_judged_by_its_bill(answers, passed, words, capsys):
    assert nb09.check_plans(answers).passed is passed
    assert words in capsys.readouterr().out


def test_sending_by_hand():
    """Four cards, 25 GB a second: LLaMA 3.1 70B in bfloat16, gathered twice, three quarters of it by each."""
    weights, factors = 70_553_706_496 * 2 / 1e9, 103_546_880 * 4 / 1e9
    want = 0.75 * (2 * (weights + factors) + factors) / 25
    assert nb09.seconds("bf16-mixed", "fsdp", 25) == pytest.approx(want, rel=1e-3)
    assert nb09.seconds("bf16-mixed", "ddp", 25) == pytest.approx(0.75 * 2 * factors / 25, rel=1e-3)
