"""Bistro: a small task in the manner of E2E. A card of slots goes in, a sentence or two about a restaurant comes out.

The grammar speaks every slot in several ways, and each can be read back, so what is written is judged slot by slot.
A card is a dict: always a name, and three to five of the other slots. What is absent must not be said, so a model that
always says everything is wrong. Read `sentence`, then `slots_said` and `slot_accuracy`.

Source: Novikova, Dusek, Rieser (2017), "The E2E Dataset", arXiv:1706.09254, for the form; names and phrases are this
project's.
"""
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from lora_edu.models.bridge import ask
from lora_edu.training.corpora import Batch, completions
from lora_edu.training.pairs import collate as pairs_as_batch

Card = dict[str, str]
SPLITS = ("train", "valid", "test")
NAMES = (
    "The Blue Lantern", "The Golden Pear", "The Silver Swan", "The Red Fox", "The White Rose", "The Black Bear",
    "The Green Door", "The Old Mill", "The Little Oak", "The Merry Goose", "The Happy Cat", "The Quiet Moon",
    "The Brave Tailor", "The Wise Raven", "The Lucky Horse", "The Tall Window", "The Iron Gate", "The Stone Tower",
    "The Glass Ring", "The Seven Birds", "Willow House", "Apple Garden", "Honey Hall", "Winter Palace", "Summer Table",
    "Deer Park", "Bell Cottage", "Fairy Wood", "Snow Hill", "Hare Spring", "Queen Anna", "King Peter", "Storm Island",
    "Morning Wind", "Rabbit Well", "Clover", "Feather", "Fiddle", "Robin", "Candle")
FOODS = ("French", "Indian", "Greek", "Spanish", "Chinese", "Turkish", "Russian", "Dutch")
# slot -> value -> the ways to say it. The words after the verb say this value and no other (`_said_by` reads them so).
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "food": {food: (f"serves {food} food", f"cooks {food} dishes", f"offers {food} meals") for food in FOODS},
    "price": {"cheap": ("is cheap", "has low prices"),
              "moderate": ("has fair prices", "asks middling prices"),
              "expensive": ("is expensive", "has high prices")},
    "area": {place: (f"is by the {place}", f"lies near the {place}", f"stands beside the {place}")
             for place in ("river", "market", "castle", "forest")},
    "rating": {stars: (f"has {said}", f"earned {said}", f"is worth {said}")
               for stars, said in (("one", "one star"), ("three", "three stars"), ("five", "five stars"))},
    "family": {"yes": ("is good for families", "is kind to children"),
               "no": ("is not for families", "is no place for children")},
}
SLOTS = ("name", *PHRASES)
TEMPLATES = (   # the order of the slots belongs to the template
    ("{name} {first}. It {second}.", ("food", "price", "area", "rating", "family")),
    ("There is a house called {name} that {first}. It {second}.", ("area", "food", "price", "family", "rating")),
    ("{name} is a house that {first}. It {second}.", ("rating", "food", "area", "price", "family")),
    ("Come to {name}, for it {first}. It {second}.", ("price", "food", "rating", "area", "family")),
)


def _split_of(card: Card) -> str:
    """The split of a card, fixed by its name, food and area together: no such triple is in two splits.

    A tenth of the triples is "test", a tenth "valid". Every name occurs in all three, in other company.
    """
    triple = "|".join(["bistro", *(card.get(slot, "-") for slot in ("name", "food", "area"))])
    return {0: "test", 1: "valid"}.get(zlib.crc32(triple.encode()) % 10, "train")


def stream(split: str, seed: int) -> Iterator[tuple[Card, random.Random]]:
    """Endless cards of one split, each with the random numbers that made it; the same seed, the same cards."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}.")
    rng = random.Random(f"bistro {split} {seed}")
    while True:
        dropped = rng.sample(SLOTS[1:], rng.randint(0, 2))
        card = {"name": rng.choice(NAMES)} | {slot: rng.choice(list(values)) for slot, values in PHRASES.items()}
        card = {slot: value for slot, value in card.items() if slot not in dropped}
        if _split_of(card) == split:
            yield card, rng


def cards(split: str, n: int, seed: int = 0) -> list[Card]:
    """`n` different cards of one split: "train", "valid" (to choose a learning rate) or "test" (to report)."""
    if not 1 <= n <= 2000:
        raise ValueError(f"n={n}: choose 1 to 2,000 different cards; `batches` draws training examples without end.")
    found: dict[str, Card] = {}
    source = stream(split, seed)
    while len(found) < n:
        card = next(source)[0]
        found.setdefault(prompt(card), card)
    return list(found.values())


def in_words(card: Card) -> str:
    """`name: Clover | food: Greek | ...`"""
    return " | ".join(f"{slot}: {card[slot]}" for slot in SLOTS if slot in card)


def prompt(card: Card) -> str:
    """What fable reads: the card in words, and an arrow on the next line."""
    return f"{in_words(card)}\n=>"


def sentence(card: Card, rng: random.Random) -> str:
    """One way to say the whole card and nothing else: two sentences, 11 to 31 words."""
    template, order = rng.choice(TEMPLATES)
    said = [rng.choice(PHRASES[slot][card[slot]]) for slot in order if slot in card]
    half = (len(said) + 1) // 2
    first, second = (" and ".join(", ".join(part).rsplit(", ", 1)) for part in (said[:half], said[half:]))
    return template.format(name=card["name"], first=first, second=second)


def examples(split: str, n: int, seed: int = 0) -> list[tuple[Card, str]]:
    """`n` different cards of one split, each with a sentence."""
    rng = random.Random(f"bistro sentences {seed}")
    return [(card, sentence(card, rng)) for card in cards(split, n, seed)]


def collate(tokenizer, pairs: list[tuple[Card, str]]) -> Batch:
    """(card, sentence) pairs as one batch (inputs, targets), each (B, T), padded on the right.

    The loss counts on the sentence and the end-of-text token that closes it; see `pairs.pad`.
    """
    return pairs_as_batch(tokenizer, [(in_words(card), text) for card, text in pairs])


def batches(tokenizer, steps: int | None = None, batch_size: int = 16, seed: int = 0,
            split: str = "train") -> Iterator[Batch]:
    """`steps` batches of fresh examples, or no end of them (None); the same seed gives the same batches."""
    source, made = stream(split, seed), 0
    while steps is None or made < steps:
        yield collate(tokenizer,
                      [(card, sentence(card, rng)) for card, rng in (next(source) for _ in range(batch_size))])
        made += 1


def heldout(tokenizer, n: int = 400, seed: int = 0, batch_size: int = 50, split: str = "valid") -> list[Batch]:
    """The batches to measure a loss on: `n` different cards of a split that training never sees."""
    pairs = examples(split, n, seed)
    return [collate(tokenizer, pairs[i:i + batch_size]) for i in range(0, n, batch_size)]


def write(model, tokenizer, cards: list[Card], batch_size: int = 64, max_new_tokens: int = 80) -> list[str]:
    """What the model says of each card, the likeliest token at every step; see `corpora.completions`."""
    return completions(model, tokenizer, [ask(tokenizer, in_words(card)) for card in cards], batch_size, max_new_tokens)


def _said_by(slot: str) -> dict[str, str]:
    """The words that say a slot -> the value they say. Names and foods say themselves."""
    if slot in ("name", "food"):
        return {word: word for word in (NAMES if slot == "name" else FOODS)}
    return {phrase.split(" ", 1)[1]: value for value, phrases in PHRASES[slot].items() for phrase in phrases}


WORDS = {slot: _said_by(slot) for slot in SLOTS}
PATTERNS = {slot: re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b") for slot, words in WORDS.items()}


def slots_said(text: str) -> Card:
    """Read a text back into slots. Two values for one slot come out as "cheap / expensive", which equals no value."""
    found = {slot: dict.fromkeys(WORDS[slot][said] for said in pattern.findall(text))
             for slot, pattern in PATTERNS.items()}
    return {slot: " / ".join(values) for slot, values in found.items() if values}


@dataclass(frozen=True)
class SlotScore:
    """Shares from 0 to 1, no unit. `slots` is the figure to report as slot accuracy; `all_slots` is stricter."""

    slots: float                # mean over texts of (slots right / slots given or said)
    all_slots: float            # share of texts with every slot right and none added
    per_slot: dict[str, float]  # slot -> share right, over the texts in which it is given or said
    shares: list[float]         # one per text; their mean is `slots` (for a paired bootstrap over prompts)
    right: list[int]            # one 0 or 1 per text; their mean is `all_slots`


def slot_accuracy(texts: list[str], cards: list[Card]) -> SlotScore:
    """Judge each text against its card. A slot counts if it is given or said, and is right if both, with one value.

    So a slot left out, a wrong value, and a slot that was not given are one error each (E2E's slot error rate counts
    the same three), and a text about something else scores 0.
    """
    if len(texts) != len(cards) or not cards:
        raise ValueError(f"{len(texts)} texts for {len(cards)} cards: give one text for each card, and at least one.")
    return _score([slots_said(text) for text in texts], cards)


def _score(said: list[Card], given: list[Card]) -> SlotScore:
    right = [{slot: s.get(slot) == g.get(slot) for slot in SLOTS if slot in s or slot in g}
             for s, g in zip(said, given)]
    shares = [sum(r.values()) / len(r) for r in right]
    perfect = [int(all(r.values())) for r in right]
    verdicts = {slot: [r[slot] for r in right if slot in r] for slot in SLOTS}
    return SlotScore(sum(shares) / len(shares), sum(perfect) / len(perfect),
                     {slot: sum(v) / len(v) for slot, v in verdicts.items() if v}, shares, perfect)


def floor(cards: list[Card]) -> dict[str, SlotScore]:
    """What a fluent model scores that ignores its input, computed on these cards.

    "constant": always one sentence, with the commonest value of every slot. "random": the sentence of another card,
    exactly, over all pairs of cards.
    """
    if len(cards) < 2:
        raise ValueError(f"{len(cards)} card: a floor needs at least 2, to speak of another one.")
    values = {slot: Counter(r[slot] for r in cards if slot in r) for slot in SLOTS}
    constant = {slot: counts.most_common(1)[0][0] for slot, counts in values.items() if counts}
    pairs = [(said, given) for i, given in enumerate(cards) for j, said in enumerate(cards) if i != j]
    return {"constant": _score([constant] * len(cards), cards),
            "random": _score([said for said, _ in pairs], [given for _, given in pairs])}
