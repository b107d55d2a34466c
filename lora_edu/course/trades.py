"""Two more trades for fable beside the bistro's waiter: a herald, who cries out news, and an apothecary.

Like the bistro each is a grammar with a seed: a card of slots goes in, a sentence or two comes out. They share nothing
but the form of the card, so that notebook 07 can mix three adapters and see who speaks.
"""
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lora_edu.models.pretrained import BISTRO_ADAPTER, FABLE
from lora_edu.training.corpora import Batch
from lora_edu.training.pairs import collate


@dataclass(frozen=True)
class Trade:
    """Slots with the ways to say each value, and templates with a place for every slot.

    Args:
        name: how the pages call it.
        slots: slot -> value -> phrases; those in `optional` may be missing on a card, and are then not said.
        templates: "{slot}" is filled with a phrase, or with nothing.
    """

    name: str
    slots: dict[str, dict[str, tuple[str, ...]]]
    optional: tuple[str, ...]
    templates: tuple[str, ...]

    def card(self, rng: random.Random) -> dict[str, str]:
        return {slot: rng.choice(list(values)) for slot, values in self.slots.items()
                if slot not in self.optional or rng.random() < 0.6}

    def sentence(self, card: dict[str, str], rng: random.Random) -> str:
        said = {slot: rng.choice(values[card[slot]]) if slot in card else "" for slot, values in self.slots.items()}
        return re.sub(r",?( taken)? ?([.])", r"\2", " ".join(rng.choice(self.templates).format(**said).split()))

    def pairs(self, split: str, n: int, seed: int = 0) -> list[tuple[str, str]]:
        """`n` cards in words, each with its sentence; "train" and "test" never share a card."""
        source = self._stream(split, seed)
        return [next(source) for _ in range(n)]

    def _stream(self, split: str, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            card = self.card(rng)
            words = " | ".join(f"{slot}: {value}" for slot, value in card.items())
            if (sum(map(ord, words)) % 10 == 0) == (split == "test"):
                yield words, self.sentence(card, rng)

    def batches(self, tokenizer, steps: int, batch_size: int = 16, seed: int = 0) -> Iterator[Batch]:
        """`steps` batches to train on; the same seed, the same batches."""
        source = self._stream("train", seed)
        for _ in range(steps):
            yield collate(tokenizer, [next(source) for _ in range(batch_size)])

    def heldout(self, tokenizer, n: int = 100, batch_size: int = 50) -> list[Batch]:
        """Batches of cards that training never sees, to measure a loss on (nats per token of the sentences)."""
        pairs = self.pairs("test", n)
        return [collate(tokenizer, pairs[i:i + batch_size]) for i in range(0, n, batch_size)]


HERALD = Trade(
    "herald",
    {"town": {town: (town,) for town in ("Rookford", "Millbridge", "Harrow", "Old Ferry", "Greywater", "Thornby",
                                         "Kingsgate", "Applemoor")},
     "day": {day: (f"On {day}", f"This coming {day}") for day in ("Monday", "Tuesday", "Wednesday", "Thursday",
                                                                  "Friday", "Saturday", "Sunday")},
     "news": {"wedding": ("the princess will be wed", "there will be a royal wedding"),
              "fair": ("the great fair opens", "the summer fair begins"),
              "tax": ("a new tax on salt is due", "the salt tax must be paid"),
              "war": ("the army rides to war", "our soldiers march to war"),
              "trial": ("a thief will be tried", "the court will judge a thief"),
              "feast": ("the king gives a feast", "all are called to the king's feast")},
     "place": {"bridge": ("at the bridge", "by the old bridge"), "church": ("before the church", "at the church door"),
               "gate": ("at the north gate", "before the gate"), "square": ("in the square", "on the market square")},
     "duty": {"bread": ("Bring bread!", "Let each bring a loaf of bread!"),
              "silence": ("Keep silence!", "Let no one speak a word!"),
              "torch": ("Carry a torch!", "Let every man carry a torch!")}},
    ("place", "duty"),
    ("Hear ye, people of {town}! {day} {news} {place}. {duty}",
     "Good folk of {town}, give ear! {day} {news} {place}. {duty}",
     "By order of the king, to all of {town}: {day} {news} {place}. {duty}"))

APOTHECARY = Trade(
    "apothecary",
    {"ill": {ill: (f"a {ill}", f"a bad {ill}") for ill in ("cough", "fever", "headache", "sore throat", "toothache",
                                                            "cold")},
     "herb": {herb: (f"a spoon of {herb}", f"a pinch of {herb}", f"three leaves of {herb}")
              for herb in ("sage", "mint", "thyme", "rue", "nettle", "fennel", "rosemary", "parsley")},
     "in": {"wine": ("in warm wine", "with red wine"), "milk": ("in hot milk", "with fresh milk"),
            "water": ("in clear water", "with cold water"), "honey": ("in honey", "with a little honey")},
     "when": {"morning": ("in the morning", "before breakfast"), "night": ("at night", "before going to bed"),
              "noon": ("at noon", "after dinner")},
     "avoid": {"meat": ("Eat no meat.", "Keep away from meat."), "wind": ("Stay out of the wind.", "Shun the wind."),
               "work": ("Do no work.", "Rest from all work.")}},
    ("when", "avoid"),
    ("Against {ill} take {herb} {in}, {when}. {avoid}",
     "Who suffers from {ill} should drink {herb} {in} {when}. {avoid}",
     "My remedy for {ill} is {herb} {in}, taken {when}. {avoid}"))
TRADES = {trade.name: trade for trade in (HERALD, APOTHECARY)}
# the adapters that come with fable: two made by `python -m lora_edu.record trade_adapters`, the bistro's by its own
SHIPPED = {"bistro": BISTRO_ADAPTER} | {name: FABLE / f"{name}_lora" for name in TRADES}
