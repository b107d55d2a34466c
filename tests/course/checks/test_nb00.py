"""Notebook 00's checkers against the stub, a right answer, and wrong ones of several kinds."""
import pytest

from lora_edu import load_pretrained
from lora_edu.course.checks import nb00
from lora_edu.lora.adapter_file import load_adapter
from lora_edu.lora.merge import set_strength
from lora_edu.models.pretrained import BISTRO_ADAPTER
from lora_edu.training import bistro, corpora


def good_slots(said, given):
    slots = said.keys() | given.keys()
    return sum(said.get(slot) == given.get(slot) for slot in slots) / len(slots)


def raises(*args):
    raise ValueError("no")


def adds_in_place(W, delta, strength):
    W += strength * delta
    return W


RIGHT = {"A": "0.4", "B": "0", "C": "1"}


@pytest.mark.parametrize("checker, answer, passed, says", [
    (nb00.check_turn, lambda W, delta, strength: None, None, "not attempted"),
    (nb00.check_turn, lambda W, delta, strength: W + strength * delta, True, "correct"),
    (nb00.check_turn, lambda W, delta, strength: W + delta, False, "the dial at 1"),
    (nb00.check_turn, lambda W, delta, strength: (1 - strength) * W + strength * delta, False, "W stays whole"),
    (nb00.check_turn, lambda W, delta, strength: W + 0.5 * delta, False, "case 2"),
    (nb00.check_turn, adds_in_place, False, "changes its input"),
    (nb00.check_turn, raises, False, "raised ValueError"),
    (nb00.check_slots_right, lambda said, given: None, None, "not attempted"),
    (nb00.check_slots_right, good_slots, True, "correct"),
    (nb00.check_slots_right, lambda said, given: sum(said.get(s) == v for s, v in given.items()) / len(given), False,
     "made up"),
    (nb00.check_slots_right, lambda said, given: sum(said.get(s) == v for s, v in given.items()), False, "the share"),
    (nb00.check_slots_right, lambda said, given: 2 / 3, False, "case 2"),
    (nb00.check_slots_right, raises, False, "raised ValueError"),
    (nb00.check_texts, dict.fromkeys("ABC"), None, "not attempted"),
    (nb00.check_texts, RIGHT, True, "correct"),
    (nb00.check_texts, RIGHT | {"A": "1", "C": "0.4"}, False, "1 of 3"),
    (nb00.check_texts, dict.fromkeys("ABC", "0"), False, "1 of 3"),
    (nb00.check_texts, {"B": "2"}, False, "not one of the choices"),
    (nb00.check_dial, None, None, "not attempted"),
    (nb00.check_dial, 0.5, True, "good choice"),
    (nb00.check_dial, 0, False, "another choice"),
    (nb00.check_dial, 1, False, "another choice"),
    (nb00.check_dial, 0.3, False, "not one of the choices"),
])
def test_checker(checker, answer, passed, says, capsys):
    assert checker(answer).passed is passed
    assert says in capsys.readouterr().out


def test_the_mystery_texts_are_fables_own():
    """Written again for the same card; float arithmetic may differ between machines, so the beginnings are compared."""
    model, tokenizer = load_pretrained("fable")
    card = bistro.cards("test", 8)[2]
    load_adapter(model, BISTRO_ADAPTER)
    for letter, dial in (("A", 0.4), ("B", 0.0), ("C", 1.0)):
        set_strength(model, dial)
        text = corpora.completions(model, tokenizer, [bistro.prompt(card)], max_new_tokens=45)[0]
        assert text[:20] == nb00.MYSTERY_TEXTS[letter][:20]
    said = bistro.slots_said(nb00.MYSTERY_TEXTS["C"])
    assert said == card and bistro.slots_said(nb00.MYSTERY_TEXTS["A"]) != card
