"""Guesses: nothing measured is printed without one; scores against ratios worked out by hand."""
import base64
import math

import numpy as np
import pytest
import torch

from lora_edu.course.page import guess as module
from lora_edu.course.page.guess import calibration, factor_off, guess


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(module, "_guesses", {})


@pytest.fixture
def shown(monkeypatch):
    """The figures shown, in place of a notebook to show them in."""
    figures = []
    monkeypatch.setattr(module, "show", figures.append)
    return figures


def test_without_a_guess_the_text_is_the_same_whatever_the_truth(capsys, shown):
    texts = []
    for truth in (3.561, 3.572):
        bet = guess(None, "How large is the loss?", unit="nats per token")
        bet.reveal(truth)
        calibration()
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == ("no guess yet: How large is the loss?\nno guess to compare: put yours in place of "
                                    "None above, and run both cells again\ncalibration: no guesses yet; this notebook "
                                    "asks for 1\n")
    assert shown == []


def test_a_number_is_drawn_beside_the_truth_and_printed(capsys, shown):
    bet = guess(131072, "How many numbers?", unit="numbers")
    bet.reveal(65536)
    assert (
        capsys.readouterr().out
        == "your guess: 131,072 numbers\nyour guess: 131,072 numbers; the truth: 65,536 numbers\n"
    )
    ax = shown[0].axes[0]
    assert [line.get_xdata()[0] for line in ax.lines] == [131072, 65536]
    assert [text.get_text() for text in ax.texts] == ["your guess: 131,072", "the truth: 65,536"]
    assert ax.get_title() == "Your guess is off by a factor of 2" and ax.get_xscale() == "log"


@pytest.mark.parametrize("truth", [[10, 40, 90], (10, 40, 90), np.array([10, 40, 90]), torch.tensor([10, 40, 90])])
def test_a_curve_is_drawn_over_its_x(truth, shown):
    bet = guess([10, 20, 90], "How much energy?", unit="%", x=(1, 8, 64), xlabel="rank r")
    bet.reveal(truth)
    assert [list(line.get_ydata()) for line in shown[0].axes[0].lines] == [[10, 20, 90], [10, 40, 90]]
    ax = shown[0].axes[0]
    assert ax.get_xlabel() == "rank r" and [label.get_text() for label in ax.get_xticklabels()] == ["1", "8", "64"]
    assert bet.factor == pytest.approx(2 ** (1 / 3)) and bet.too_low


@pytest.mark.parametrize("value, truth, factor", [
    (500, 1000, 2), (2000, 1000, 2), (7, 7, 1), (0, 0, 1), (0, 5, math.inf), (5, 0, math.inf), (-1, 2, math.inf),
    (-4, -1, 4),
    ([1, 8], [2, 2], 8 ** 0.5)])
def test_factor_off(value, truth, factor):
    assert factor_off(value, truth) == pytest.approx(factor)


@pytest.mark.parametrize("value, x, message", [
    ("many", None, "'many': give a finite number"), (float("nan"), None, "nan: give a finite number"),
    (True, None, "True: give a finite number"), ([1, 2], None, r"\[1, 2\]: this question asks for one number"),
    ([1, 2], (1, 2, 4), "a list of 3 numbers, one for each of 1, 2, 4"), (5, (1, 2), "a list of 2 numbers"),
    ([1, None], (1, 2), "give a finite number"), (float("inf"), None, "inf: give")])
def test_what_is_not_an_answer_is_refused(value, x, message):
    with pytest.raises(ValueError, match="your guess is .*" + message):
        guess(value, "How many?", x=x)


def test_a_truth_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the truth is .* a list of 2 numbers"):
        guess([1, 2], "How many?", x=(1, 2)).reveal([1, 2, 3])


def test_calibration_counts_each_question_once_and_takes_the_middle(capsys, shown):
    for question, value in [("a", 500), ("a", 500), ("b", 4000), ("c", 1000), ("d", None), ("e", 10)]:
        bet = guess(value, question)
        if question != "e":
            bet.reveal(1000)
    capsys.readouterr()
    calibration()
    assert capsys.readouterr().out == "calibration: 3 of 5 guessed; half of them within a factor of 2; 1 too low\n"


def test_a_guess_without_ratio_still_reveals(capsys, shown):
    guess(0, "What is the gradient of A?").reveal(0.5)
    assert "no ratio" in shown[0].axes[0].get_title() and shown[0].axes[0].get_xscale() == "linear"


def test_reveal_displays_a_real_picture(monkeypatch):
    sent = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: sent.append(data))
    guess(3, "How many?").reveal(4)
    assert base64.b64decode(sent[0]["text/html"].partition("base64,")[2].rstrip('">'))[:4] == b"\x89PNG"


def test_a_close_guess_looks_close(shown):
    guess(65000, "How many numbers?").reveal(65536)
    ax = shown[0].axes[0]
    left, right = (ax.transAxes.inverted().transform(ax.transData.transform((x, 0)))[0] for x in (65000, 65536))
    assert 0 < right - left < 0.01 and ax.get_title() == "Your guess is within 5 %"


WAYS = ("LoRA", "adapters", "prefix")


def test_a_choice_is_right_or_wrong_in_words(capsys):
    guess(" lora ", "which?", choices=WAYS).reveal("LoRA")
    guess("prefix", "which else?", choices=WAYS).reveal("LoRA")
    calibration()
    assert capsys.readouterr().out.splitlines() == [
        "your guess: LoRA", "your guess, LoRA, is right", "your guess: prefix", "your guess: prefix; the truth: LoRA",
        "choices: 1 of 2 right"]


def test_an_order_says_how_many_stand_in_their_place(capsys):
    bet = guess(["prefix", "lora", "adapters"], "in which order?", choices=WAYS)
    bet.reveal(("prefix", "adapters", "LoRA"))
    assert "1 of 3 in place" in capsys.readouterr().out and bet.right is False
    bet.reveal(["prefix", "LoRA", "adapters"])
    assert bet.right is True


@pytest.mark.parametrize("value", ["rank", ["LoRA"], ["LoRA", "LoRA", "prefix"], 3, [1, 2, 3]])
def test_what_is_no_choice_is_refused(value):
    with pytest.raises(ValueError, match="give one of 'LoRA', 'adapters', 'prefix'"):
        guess(value, "which?", choices=WAYS)


def test_without_a_choice_nothing_is_told(capsys):
    guess(None, "which?", choices=WAYS).reveal("LoRA")
    calibration()
    assert "LoRA" not in capsys.readouterr().out


def test_choices_and_numbers_are_summed_up_beside_each_other(capsys, shown):
    guess("LoRA", "which?", choices=WAYS).reveal("LoRA")
    guess(10, "how many?").reveal(20)
    calibration()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "choices: 1 of 1 right", "calibration: 1 of 2 guessed; half of them within a factor of 2; 1 too low"]
