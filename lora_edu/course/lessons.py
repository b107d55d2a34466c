"""What a model is to learn, as questions and answers: two lessons of the course's, and the reader's own file.

    mine = lessons.from_pairs("my.csv")         # said: how many, what was left out, what an answer is judged by
    fit(model, mine.batches(tokenizer, steps=60), steps=60, lr=2e-3)
    mine.score(mine.answers(model, tokenizer))  # beside mine.floor(), which ignores the question

A question is in one part only, training, validation or test. The loss counts on the answer alone (`training.pairs`).
"""
import functools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_edu.course.pair_files import counted, read_pairs
from lora_edu.models.bridge import ask, encode, end_token
from lora_edu.tables import ShowsTables, Table
from lora_edu.training import bistro
from lora_edu.training.corpora import completions
from lora_edu.training.loop import Batch
from lora_edu.training.pairs import Pair, pad, row

ORDERS = Path(__file__).parent / "orders.csv"      # made by tools/orders.py
SHARE, MOST, LEAST = 0.1, 200, 10                  # of the questions for validation and for test; at most; pairs in all
LONGEST = 256                                      # tokens of a row
ROOM = 16                                          # tokens that an answer may be longer than the longest one learned


@dataclass(frozen=True, repr=False)
class Lesson(ShowsTables):
    """Questions and answers, and how an answer is judged.

    Args:
        name: how the pages call it.
        train, valid, test: pairs (question, answer); a question "" is plain text.
        judged: what a score counts, such as "slots right". judge: (written, wanted) -> a share from 0 to 1; None where
            there is nothing to judge but the loss.
        notes: what was noticed in the file, one sentence each.
    """

    name: str
    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    judged: str = ""
    judge: Callable[[str, str], float] | None = None
    notes: tuple[str, ...] = field(default=())

    def batches(self, tokenizer, steps: int, seed: int = 0, rows: int = 4, longest: int = LONGEST) -> Iterator[Batch]:
        """`steps` batches of `rows` pairs, each pass over the pairs in a new order; the same seed, the same batches.

        Raises:
            ValueError: no answer fits into `longest` tokens behind its question.
        """
        order, waiting, barren = random.Random(f"batches {seed}"), [], 0
        for _ in range(steps):
            made = []
            while len(made) < rows:
                if not waiting:
                    waiting = order.sample(self.train, len(self.train))
                ids, before, _ = row(tokenizer, waiting.pop(), longest)
                barren = 0 if before < len(ids) else barren + 1
                if barren > len(self.train):
                    raise ValueError(f"no answer fits into {longest} tokens behind its question: give a larger "
                                     "longest=.")
                if not barren:
                    made.append((ids, before))
            yield pad(made, end_token(tokenizer))

    def heldout(self, tokenizer, split: str = "valid", n: int | None = None, rows: int = 8,
                longest: int = LONGEST) -> list[Batch]:
        """Batches to measure a loss on: the first `n` pairs of "valid" or "test", without those that do not fit.

        Raises:
            ValueError: none fits.
        """
        found = [row(tokenizer, pair, longest)[:2] for pair in getattr(self, split)[:n]]
        found = [(ids, before) for ids, before in found if before < len(ids)]
        if not found:
            raise ValueError(f"no {split} answer fits into {longest} tokens behind its question: give a larger "
                             "longest=.")
        return [pad(found[i:i + rows], end_token(tokenizer)) for i in range(0, len(found), rows)]

    def lengths(self, tokenizer, longest: int = LONGEST) -> str:
        """What does not fit into `longest` tokens, in a sentence."""
        found = [row(tokenizer, pair, longest) for pair in self.train]
        cut = sum(was_cut for _, _, was_cut in found)
        lost = sum(before >= len(ids) for ids, before, _ in found)
        return (f"{self.name}: {len(found):,} rows of {min(len(ids) for ids, _, _ in found)} to "
                f"{max(len(ids) for ids, _, _ in found)} tokens; {cut:,} were longer than {longest} and are cut, and "
                f"{lost:,} of them are left out, because nothing of the answer remains.")

    def answers(self, model, tokenizer, n: int | None = None, split: str = "test") -> list[str]:
        """What the model writes to the first `n` questions of a part, the likeliest token at every step."""
        pairs = getattr(self, split)[:n]
        room = max(len(encode(tokenizer, answer)) for _, answer in self.train[:200]) + ROOM
        return completions(model, tokenizer, [ask(tokenizer, question) for question, _ in pairs], 16, room)

    def score(self, written: list[str], split: str = "test") -> float:
        """The mean share from 0 to 1 that `judged` names, over the first questions of a part, one for each text.

        Raises:
            ValueError: plain text, which has no answers.
        """
        if self.judge is None:
            raise ValueError(f"{self.name} is plain text and has no answers to judge: look at the loss.")
        wanted = [answer for _, answer in getattr(self, split)]
        return sum(self.judge(text, answer) for text, answer in zip(written, wanted)) / len(written)

    @functools.cached_property
    def constant(self) -> str:
        """The one answer of the 50 commonest that scores best on validation when it is given to every question."""
        common = [answer for answer, _ in Counter(answer for _, answer in self.train).most_common(50)]
        return max(common, key=lambda answer: self.score([answer] * len(self.valid), "valid"))

    def floor(self) -> float:
        """What scores who ignores the question, on test: always the same answer, the best one for validation."""
        return self.score([self.constant] * len(self.test))

    def tables(self) -> list[Table]:
        rows = [(part, f"{len(pairs):,}", shortened(pairs[0][0]), shortened(pairs[0][1]))
                for part, pairs in (("training", self.train), ("validation", self.valid), ("test", self.test))]
        floor = "" if self.judge is None else (f"Judged by {self.judged}: {self.floor():.0%} without reading the "
                                               "question. ")
        notes = "".join(f"{note[0].upper()}{note[1:]}. " for note in self.notes)
        return [Table((self.name, "pairs", "the first one's question", "and answer"), rows, (floor + notes).strip())]


def shortened(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most - 1] + "…"


def from_pairs(source: str | Path | list[Pair], name: str | None = None, seed: int = 0) -> Lesson:
    """The reader's own data as a lesson: a CSV of two columns, JSON lines of prompts and answers, plain text, or a list
    of pairs.

    A tenth of the questions, at most 200, is kept for validation, as many for test, chosen by the seed; the same
    question is never in two parts. An answer is judged by its fields where all are JSON objects, by being the same
    where they are short, else by its words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not hold pairs, or fewer than ten different ones.

    >>> from_pairs([(f"{n} and 1?", str(n + 1)) for n in range(30)], "sums")
    sums        pairs  the first one's question  and answer
    training       24                 27 and 1?          28
    validation      3                  8 and 1?           9
    test            3                 15 and 1?          16
    Judged by answers right: 0% without reading the question.
    """
    if isinstance(source, (str, Path)):
        (pairs, notes), name = read_pairs(Path(source)), name or Path(source).stem
    else:
        pairs, notes, name = [tuple(pair) for pair in source], [], name or "pairs"
    unique = list(dict.fromkeys(pairs))
    if len(unique) < len(pairs):
        notes.append(f"{counted(len(pairs) - len(unique), 'row')} there twice counted once")
    of: dict[Pair | str, list[Pair]] = {}
    for pair in unique:
        of.setdefault(pair[0] or pair, []).append(pair)              # plain text has no question to be grouped by
    if len(of) < LEAST:
        noticed = f" ({notes[-1]})" if notes else ""
        raise ValueError(f"{name} has {counted(len(of), 'different question')}{noticed}: give at least {LEAST}, so "
                         "that some can be kept for a test.")
    if len(of) < len(unique):
        notes.append(f"{counted(len(unique) - len(of), 'second answer')} to a question kept in the part of the first")
    order = random.Random(f"split {seed}").sample(list(of), len(of))
    kept = min(MOST, max(1, round(SHARE * len(order))))
    test, valid, train = ([pair for key in part for pair in of[key]]
                          for part in (order[:kept], order[kept:2 * kept], order[2 * kept:]))
    return Lesson(name, train, valid, test, *judged_by([answer for _, answer in unique], bool(unique[0][0])),
                  notes=tuple(notes))


def judged_by(answers: list[str], asked: bool) -> tuple[str, Callable[[str, str], float] | None]:
    """What suits these answers."""
    if not asked:
        return "", None
    if all(isinstance(as_json(answer), dict) for answer in answers):
        return "fields right", fields_right
    if sorted(len(answer.split()) for answer in answers)[len(answers) // 2] <= 3:
        return "answers right", lambda text, wanted: float(plain(text) == plain(wanted))
    return "words right", words_right


def as_json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return None


def plain(text: str) -> list[str]:
    """Its words, without capitals and punctuation."""
    return re.findall(r"\w+", text.lower())


def fields_right(text: str, wanted: str) -> float:
    """The share of the fields, wanted or written, that are the same; 0 for what is not one JSON object."""
    found, right = as_json(text), as_json(wanted)
    if not isinstance(found, dict):
        return 0.0
    fields = found.keys() | right.keys()
    return sum(key in found and key in right and found[key] == right[key] for key in fields) / max(1, len(fields))


def words_right(text: str, wanted: str) -> float:
    """Words that both have, twice over the words of both together (F1, as reading tests for machines use it)."""
    found, right = Counter(plain(text)), Counter(plain(wanted))
    both = (found & right).total()
    return 2 * both / max(1, found.total() + right.total())


def restaurants(n: int = 2000) -> Lesson:
    """The bistro's cards, as for fable: `n` cards to learn from, 100 for validation, 200 for test; judged by slots."""
    train, valid, test = ([(bistro.in_words(card), text) for card, text in bistro.examples(split, count)]
                          for split, count in (("train", n), ("valid", 100), ("test", 200)))
    return Lesson("restaurants", train, valid, test, "slots right", slots_right)


def slots_right(text: str, wanted: str) -> float:
    return bistro.slot_accuracy([text], [bistro.slots_said(wanted)]).slots


def orders() -> Lesson:
    """400 guests and what the kitchen is told, one line of JSON each: a format to learn. Of this project's making."""
    return from_pairs(ORDERS, "orders")
