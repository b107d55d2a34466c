"""Checkers of notebook 00. Reading this file tells you the answers."""
import functools

import torch

from lora_edu.course.page.exercises import Verdict, check, check_decision, check_match, is_blank
from lora_edu.lora.adapter_file import load_adapter
from lora_edu.lora.merge import set_strength
from lora_edu.models.pretrained import BISTRO_ADAPTER, load_pretrained
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import evaluate

DIALS = (0, 0.25, 0.5, 0.75, 1)
# fable with the shipped adapter, one test card (see tests/course/checks/test_nb00.py, which writes them again)
MYSTERY_TEXTS = {
    "A": "Come to Come to Come to Come to Come to Come to Come to Candle. It "
         "is good for families. It is worth five stars. It is not",
    "B": '.\n\n"Is it not that you are not to be seen, and I have been in the same way, and I have been in the same '
         "way as you are, and I have been in the same way",
    "C": "The Wise Raven is a house that earned one star and lies near the forest. It is kind to children.",
}


def check_turn(student) -> Verdict:
    """Exercise 0.1: entry by entry; the weight handed in must not change."""
    def oracle(W, delta, strength):
        return torch.tensor([[w + strength * d for w, d in zip(*rows)] for rows in zip(W.tolist(), delta.tolist())])

    def hint(got, want, W, delta, strength):
        if got.shape == want.shape and torch.allclose(got, (W + delta).double()):
            return "that is the dial at 1, whatever the strength."
        if got.shape == want.shape and torch.allclose(got, ((1 - strength) * W + strength * delta).double(), atol=1e-6):
            return "W stays whole: only the update is scaled."

    generator = torch.Generator().manual_seed(0)
    W, delta = torch.randn(3, 2, generator=generator), torch.randn(3, 2, generator=generator)
    cases = [(W, delta, 0.5), (W.T.contiguous(), delta.T.contiguous(), 0.0), (W, delta, -2.0), (W, delta, 1.5)]
    return check("0.1", student, cases=cases, oracle=oracle, hint=hint)


def check_slots_right(student) -> Verdict:
    """Exercise 0.2: slot by slot, with a list of all slots there are."""
    def oracle(said, given):
        marks = [said[slot] == given[slot] if slot in said and slot in given else False
                 for slot in bistro.SLOTS if slot in said or slot in given]
        return marks.count(True) / len(marks)

    def hint(got, want, said, given):
        if got == sum(said.get(s) == v for s, v in given.items()) / len(given):
            return "a slot that was made up must count as wrong: divide by the slots in either of the two."
        if got == sum(said.get(s) == v for s, v in given.items()):
            return "that is how many are right; the share is out of all slots in either of the two."

    given = {"name": "Clover", "food": "Greek", "price": "cheap"}
    said = [given | {"price": "expensive"}, given | {"area": "river"}, {"food": "Greek"}, {}, given,
            {"name": "Clover", "food": "Greek", "area": "river"},           # each has a slot that the other lacks
            {"name": "Greek", "food": "Clover", "price": "cheap"}]          # right words in the wrong slots
    cases = [(each, given) for each in said]
    return check("0.2", student, cases=cases, oracle=oracle, hint=hint)


def check_texts(answers: dict[str, str | None]) -> Verdict:
    """Exercise 0.3."""
    return check_match("0.3", answers, right={"A": "0.4", "B": "0", "C": "1"},
                       because="form is learned before content, and the dial passes through it.",
                       hints={"A": "it sounds like a waiter; compare it with the card.",
                              "B": "is there a single word of a waiter in it?",
                              "C": "compare it with the card, slot by slot."})


@functools.cache
def _sums_by_dial() -> dict[float, float]:
    """Exercise 0.4: loss on restaurants plus loss on tales at each setting, on data that the notebook does not show."""
    model, tokenizer = load_pretrained("fable")
    tales = corpora.tales_from(model, tokenizer, n=8, length=128, seed=7)
    cards = bistro.heldout(tokenizer, n=32, split="valid")
    load_adapter(model, BISTRO_ADAPTER)
    sums = {}
    for dial in DIALS:
        set_strength(model, dial)
        sums[dial] = evaluate(model, cards) + evaluate(model, tales)
    return sums


def check_dial(choice: float | None) -> Verdict:
    """Exercise 0.4: scored by the sum of the two losses; within 0.1 nats of the best passes."""
    if not is_blank(choice):
        print("measuring on texts of its own, a few seconds …")
    return check_decision("0.4", choice, {} if is_blank(choice) else _sums_by_dial(), within=0.1,
                          unit="nats per token in all",
                          because="the middle keeps most of one job and costs little of the other.")
