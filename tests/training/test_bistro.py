"""The grammar against its own reader, and the reader against sentences written by hand."""
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import nn

from lora_edu.training import bistro
from lora_edu.training.bistro import SLOTS, slot_accuracy, slots_said
from lora_edu.course.records.pretrain import train_tokenizer

FULL = {"name": "The Red Fox", "food": "Greek", "price": "cheap", "area": "river", "rating": "five", "family": "no"}
SAID = {"name": "The Red Fox", "food": "serves Greek food", "price": "has low prices", "area": "is by the river",
        "rating": "has five stars", "family": "is no place for children"}
WRONG = {"name": "The Red Swan", "food": "serves Dutch food", "price": "has high prices", "area": "is by the castle",
         "rating": "has three stars", "family": "is kind to children"}


def by_hand(said: dict[str, str]) -> str:
    """A text that says these phrases, in an order and in words around them that no template has."""
    rest = [said[slot] for slot in ("family", "area", "rating", "price", "food") if slot in said]
    return f"Well, they told me that {said.get('name', 'it')} {', '.join(rest)}."


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 512 tokens, end-of-text first, trained on sentences of the grammar."""
    return train_tokenizer([text for _, text in bistro.examples("train", 60)], vocab_size=512)


def test_the_grammar_is_of_the_size_promised_and_unambiguous():
    assert len(set(bistro.NAMES)) == 40 and len(bistro.FOODS) == 8
    assert [len(bistro.PHRASES[slot]) for slot in ("price", "area", "rating", "family")] == [3, 4, 3, 2]
    for slot, words in bistro.WORDS.items():
        for word, value in words.items():
            assert slots_said(f"It has {word}.") == {slot: value}, "words of one value must not sound like another"


@pytest.mark.parametrize("split", bistro.SPLITS)
def test_every_sentence_says_its_record_and_nothing_else(split):
    for record, text in bistro.examples(split, 600, seed=3):
        assert slots_said(text) == record, text
        assert text.count(".") == 2 and 11 <= len(text.split()) <= 31, text
        assert "{" not in text and "  " not in text and ", and" not in text


def test_every_phrasing_and_template_is_used():
    text = "\n".join(text for _, text in bistro.examples("train", 2000))
    for slot, values in bistro.PHRASES.items():
        for phrase in (phrase for phrases in values.values() for phrase in phrases):
            assert phrase in text, (slot, phrase)
    for template, _ in bistro.TEMPLATES:
        assert template.format(name="Clover", first="|", second="").split("|")[0] in text


def test_splits_share_no_prompt_and_no_triple_but_all_names():
    found = {split: bistro.cards(split, 2000) for split in bistro.SPLITS}
    triples = {split: {(r["name"], r.get("food"), r.get("area")) for r in part} for split, part in found.items()}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not triples[one] & triples[other]
        assert not set(map(bistro.prompt, found[one])) & set(map(bistro.prompt, found[other]))
    assert all({r["name"] for r in part} == set(bistro.NAMES) for part in found.values())


def test_records_are_different_keep_the_name_and_drop_at_most_two():
    found = bistro.cards("test", 400, seed=1)
    assert len({bistro.prompt(r) for r in found}) == 400
    assert {len(r) for r in found} == {4, 5, 6} and all(list(r) == [s for s in SLOTS if s in r] for r in found)
    assert all("name" in r for r in found)


def test_the_same_seed_gives_the_same_and_another_seed_others(tokenizer):
    assert bistro.examples("train", 50, seed=5) == bistro.examples("train", 50, seed=5) != bistro.examples("train", 50,
                                                                                                           seed=6)
    one, same, other = (list(bistro.batches(tokenizer, 3, 4, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for x, y in zip(one, same) for a, b in zip(x, y))
    assert not torch.equal(one[0][0], other[0][0])
    assert not torch.equal(one[0][0], one[1][0])


def test_known_examples_do_not_move():
    """A stored adapter and stored records rest on these: changing the grammar means making them again."""
    assert bistro.prompt(bistro.cards("test", 1)[0]) == (
        "name: The Black Bear | food: Turkish | price: expensive | area: forest\n=>")
    assert bistro.examples("train", 1)[0][1] == (
        "Rabbit Well is a house that earned one star, serves Indian food and lies near the market. It is expensive and "
        "is not for families.")


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 9))
def test_targets_are_the_shifted_sentence_and_nothing_else(tokenizer, seed, size):
    """Oracle: read prompt and sentence back out of the batch, row by row."""
    pairs = bistro.examples("train", size, seed)
    inputs, targets = bistro.collate(tokenizer, pairs)
    assert inputs.shape == targets.shape and inputs.dtype == targets.dtype == torch.long
    for row, wanted, (record, text) in zip(inputs.tolist(), targets.tolist(), pairs):
        counted = [t for t, token in enumerate(wanted) if token != -100]
        first, last = counted[0], counted[-1]
        assert counted == list(range(first, last + 1))
        assert tokenizer.decode(row[:first + 1]) == bistro.prompt(record)
        assert tokenizer.decode(wanted[first:last]) == " " + text and wanted[last] == 0
        assert row[first + 1:last + 1] == wanted[first:last], "targets are inputs, one later"
        assert set(row[last + 1:]) <= {0}


def test_heldout_is_fixed_unseen_and_complete(tokenizer):
    batches = bistro.heldout(tokenizer, 25, seed=2, batch_size=10)
    assert [len(inputs) for inputs, _ in batches] == [10, 10, 5]
    ends = sum(int((targets == 0).sum()) for _, targets in batches)
    assert ends == 25
    prompts = {bistro.prompt(r) for r in bistro.cards("valid", 25, seed=2)}
    read = {tokenizer.decode(row[row != 0].tolist()).split("=>")[0] + "=>" for inputs, _ in batches for row in inputs}
    assert read == prompts


def test_a_right_text_scores_one_in_words_of_its_own():
    result = slot_accuracy([by_hand(SAID)], [FULL])
    assert (result.slots, result.all_slots, result.right, result.shares) == (1.0, 1.0, [1], [1.0])
    assert result.per_slot == dict.fromkeys(SLOTS, 1.0)


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("fault", ["wrong", "left out", "said twice, differently", "not given"])
def test_one_fault_in_one_slot_is_found_there_and_only_there(slot, fault):
    record, said = dict(FULL), dict(SAID)
    if fault == "wrong":
        said[slot] = WRONG[slot]
    elif fault == "left out":
        del said[slot]
    elif fault == "said twice, differently":
        said[slot] = f"{SAID[slot]}, Candle" if slot == "name" else f"{SAID[slot]} and {WRONG[slot]}"
    elif slot != "name":        # a name is always given
        del record[slot]
    else:
        said[slot] = "Robin"
    result = slot_accuracy([by_hand(said), by_hand(SAID)], [record, FULL])
    assert result.shares == pytest.approx([5 / 6, 1.0]) and result.slots == pytest.approx(11 / 12)
    assert result.right == [0, 1] and result.all_slots == 0.5
    assert result.per_slot == {s: 0.5 if s == slot else 1.0 for s in SLOTS}


def test_a_slot_neither_given_nor_said_does_not_count():
    record = {"name": "Clover", "food": "Dutch", "price": "cheap", "area": "river"}
    result = slot_accuracy(["Clover serves Greek food, is cheap and is by the river."], [record])
    assert result.slots == 3 / 4 and set(result.per_slot) == {"name", "food", "price", "area"}


def test_a_text_about_something_else_scores_nothing():
    result = slot_accuracy(["Once upon a time there was a king who had three daughters.", ""], [FULL, FULL])
    assert result.slots == result.all_slots == 0.0


@pytest.mark.parametrize("texts, records", [([], []), (["a"], []), (["a"], [FULL, FULL])])
def test_texts_and_records_must_go_together(texts, records):
    with pytest.raises(ValueError, match="one text for each card"):
        slot_accuracy(texts, records)


def test_floor_equals_brute_force_over_written_sentences():
    """Oracle: write the sentences out, and read them, instead of comparing records."""
    given = bistro.cards("test", 12, seed=9)
    rng = random.Random(0)
    ordered = [(a, b) for a in given for b in given if a is not b]
    spoken = slot_accuracy([bistro.sentence(a, rng) for a, _ in ordered], [b for _, b in ordered])
    found = bistro.floor(given)
    assert found["random"].slots == pytest.approx(spoken.slots) and found["random"].all_slots == 0.0
    commonest = {s: Counter(r[s] for r in given if s in r).most_common(1)[0][0] for s in SLOTS}
    constant = slot_accuracy([bistro.sentence(commonest, rng)] * 12, given)
    assert found["constant"] == constant


def test_floor_is_low_and_needs_two_records():
    found = bistro.floor(bistro.cards("test", 150))
    assert 0.1 < found["random"].slots < found["constant"].slots < 0.3
    assert found["constant"].all_slots < 0.02
    with pytest.raises(ValueError, match="at least 2"):
        bistro.floor([FULL])


@pytest.mark.parametrize("call", [lambda: bistro.cards("dev", 3), lambda: next(bistro.stream("all", 0))])
def test_an_unknown_split_is_refused(call):
    with pytest.raises(ValueError, match="train, valid, test"):
        call()


@pytest.mark.parametrize("n", [0, -1, 2001])
def test_a_number_of_records_that_cannot_be_had_is_refused(n):
    with pytest.raises(ValueError, match="choose 1 to 2,000"):
        bistro.cards("test", n)


class Waiter(nn.Module):
    """Stands in for a model: answers each prompt with the sentence it was given for it, then rambles on."""

    def __init__(self, tokenizer, answers: dict[str, str]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answers, self.calls = tokenizer, answers, []

    def generate(self, ids, max_new_tokens, temperature, stop_token):
        assert temperature == 0.0 and not self.training
        self.calls.append(tuple(ids.shape))
        rows = [self.tokenizer.encode(" " + self.answers[self.tokenizer.decode(row.tolist())]).ids for row in ids]
        after = self.tokenizer.encode(" It is expensive.").ids
        new = [(row + [stop_token] + after + [stop_token] * max_new_tokens)[:max_new_tokens] for row in rows]
        return torch.cat([ids, torch.tensor(new)], dim=1)


def test_write_returns_texts_in_order_groups_by_length_and_stops_at_the_end_token(tokenizer):
    pairs = bistro.examples("test", 40)
    model = Waiter(tokenizer, {bistro.prompt(record): text for record, text in pairs}).train()
    texts = bistro.write(model, tokenizer, [record for record, _ in pairs], batch_size=3, max_new_tokens=200)
    assert texts == [text for _, text in pairs]
    assert slot_accuracy(texts, [record for record, _ in pairs]).all_slots == 1.0
    assert max(rows for rows, _ in model.calls) <= 3 and sum(rows for rows, _ in model.calls) == 40
    assert len(model.calls) < 40 and model.training, "prompts of one length share a call, and the mode is put back"


def test_write_keeps_what_was_said_when_the_end_never_comes(tokenizer):
    record, text = bistro.examples("test", 1)[0]
    model = Waiter(tokenizer, {bistro.prompt(record): text})
    cut, = bistro.write(model, tokenizer, [record], max_new_tokens=6)
    assert cut and text.startswith(cut)


def test_a_tokenizer_without_end_of_text_is_refused():
    with pytest.raises(ValueError, match="no <|endoftext|> token"):
        bistro.collate(Tokenizer(models.BPE()), bistro.examples("train", 1))
