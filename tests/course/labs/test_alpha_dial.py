"""The dial's data and words; what the page makes of them is in tests/browser/test_labs.py."""
import numpy as np
import pytest

from lora_edu.course.labs.alpha_dial import alpha_dial, slots_of

STRENGTHS = [i / 10 for i in range(13)]
TASK, TALES = [4.4 - 3 * s for s in STRENGTHS], [3.6 + 1.5 * s for s in STRENGTHS]
CARD = {"name": "Clover", "food": "Greek", "price": "cheap"}
TEXTS = {"a card =>": ["Clover serves Greek food."] * 12 + ["Clover serves Dutch food, is cheap and has one star."],
         "Once": [f" text {i}" for i in range(13)]}
LOSSES = {"the new task": TASK, "the tales": TALES}


def test_what_goes_to_the_page_is_what_was_measured():
    dial = alpha_dial(STRENGTHS, TEXTS, LOSSES, {"a card =>": CARD})
    assert dial.data["losses"] == LOSSES and dial.data["prompts"][1]["texts"] == TEXTS["Once"]
    assert [each["name"] for each in dial.data["prompts"]] == ["a card", "a tale"] and not dial.data["writes"]
    assert dial.state == {"strength": 1.0, "prompt": "a card =>", "line": [], "written": {}}


def test_a_slot_is_right_wrong_left_out_or_made_up():
    assert slots_of(TEXTS["a card =>"][0], CARD) == [
        ("name: Clover", "right"), ("food: Greek", "right"), ("price: cheap", "missing")]
    assert slots_of(TEXTS["a card =>"][12], CARD) == [
        ("name: Clover", "right"), ("food: Greek", "wrong"), ("price: cheap", "right"),
        ("rating: one, not on the card", "added")]


def test_the_stored_cell_has_the_numbers_the_text_and_a_picture_with_words():
    shown, _ = alpha_dial(STRENGTHS, TEXTS, LOSSES, {"a card =>": CARD}, strength=0.4)._repr_mimebundle_()
    assert shown["text/plain"] == ("strength 0.4; the new task 3.20; the tales 4.20 nats per token: a card => Clover "
                                   "serves Greek food.\nRun this cell to move it.")
    assert '<img alt="One dial, two voices"' in shown["text/html"] and "the new task 3.20" in shown["text/html"]


def test_without_losses_the_stored_cell_speaks_at_the_ends_and_in_the_middle():
    said = alpha_dial(STRENGTHS, {"Once": TEXTS["Once"]}, strength=0.0)._repr_mimebundle_()[0]["text/plain"]
    assert said.splitlines()[:3] == ["strength 0.0: Once text 0", "strength 0.6: Once text 6",
                                     "strength 1.0: Once text 10"]


def test_the_kernel_writes_what_the_page_asks_for_and_an_error_is_the_text(monkeypatch):
    def write(prompt, strength):
        if not prompt:
            raise ValueError("an empty prompt")
        return f"{prompt} at {strength}"
    dial = alpha_dial(STRENGTHS, TEXTS, LOSSES, write=write)
    sent = []
    monkeypatch.setattr(dial, "send", lambda message: sent.append(message))
    for prompt in ("mine", ""):
        dial._handle_custom_msg({"key": "k", "prompt": prompt, "index": 3}, [])
    assert dial.data["writes"] and sent == [
        {"key": "k", "text": "mine at 0.3"},
        {"key": "k", "text": " (This could not be written: ValueError: an empty prompt)"}]


@pytest.mark.parametrize("strengths, texts, losses, said", [
    ([0, 1], {"a": ["x"]}, {}, "1 values for 'a'"), ([0, 1], {"a": "xy"}, {"one": [1, 2]}, "1 losses"),
    ([0], {"a": ["x"]}, {}, "1 strengths"), ([1, 0], {"a": ["x", "y"]}, {}, "rising"), ([0, 1], {}, {}, "0 prompts"),
    ([0, 1], {"a": ["x", "y"]}, {"one": [1, 2], "two": [1, 2, 3]}, "3 values for 'two'")])
def test_a_dial_whose_parts_do_not_fit_is_refused(strengths, texts, losses, said):
    with pytest.raises(ValueError, match="alpha_dial got") as caught:
        alpha_dial(np.array(strengths), texts, losses)
    assert said in str(caught.value)
