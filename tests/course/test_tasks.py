"""Trained nulls: what each leaves alone, what it breaks, and that its data can still be told from the task's."""
import random

import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course import tasks
from lora_edu.course.tasks import full_fine_tune, training_batches
from lora_edu.training import bistro
from lora_edu.training.loop import evaluate


@pytest.fixture(scope="module")
def tokenizer():
    return load_pretrained()[1]


def listed(tokenizer, null, steps=3, seed=5, task="bistro"):
    return list(training_batches(tokenizer, task, steps, seed, null))


def test_random_targets_keep_inputs_and_places_and_change_the_tokens(tokenizer):
    real, null = listed(tokenizer, None), listed(tokenizer, "random_targets")
    for (inputs, targets), (same, drawn) in zip(real, null, strict=True):
        assert torch.equal(inputs, same) and torch.equal(targets == -100, drawn == -100)
        counted = targets != -100
        assert (drawn[counted] == targets[counted]).float().mean() < 0.02
    drawn = torch.cat([targets[targets != -100] for _, targets in null])
    assert 0 <= drawn.min() and drawn.max() < 2048 and drawn.unique().numel() > 0.5 * min(2048, drawn.numel())


def spoken(tokenizer, batch):
    """(prompt, sentence) of every row, read back from the tokens."""
    inputs, targets = batch
    return [(tokenizer.decode(x[t == -100].tolist()), tokenizer.decode(t[t != -100].tolist()))
            for x, t in zip(inputs, targets)]


def test_mismatched_has_the_same_records_and_sentences_otherwise_paired(tokenizer):
    for real, null in zip(listed(tokenizer, None), listed(tokenizer, "mismatched"), strict=True):
        real, null = spoken(tokenizer, real), spoken(tokenizer, null)
        assert sorted(text for _, text in real) == sorted(text for _, text in null)
        assert [text for _, text in real[1:]] == [text for _, text in null[:-1]] and null[-1][1] == real[0][1]
        assert all(mine[0].split("\n")[0] == its[0].split("\n")[0] for mine, its in zip(real, null))


def test_mismatched_sentences_are_wrong_as_often_as_strangers(tokenizer):
    """Slots of the sentences against the records they stand beside: about the floor, not the 100 % of the real
    pairs.
    """
    records = bistro.cards("train", 64)
    rng = random.Random(0)
    said = [bistro.sentence(record, rng) for record in records]
    assert bistro.slot_accuracy(said, records).slots == 1
    assert bistro.slot_accuracy(said[1:] + said[:1], records).slots < 0.35


def test_more_of_the_same_is_what_fable_would_say(tokenizer, monkeypatch):
    tasks.tales.cache_clear()
    batches = listed(tokenizer, "more_of_the_same", steps=2)
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(16, 64)] * 2
    base = load_pretrained()[0]
    assert abs(evaluate(base, batches) - 3.14) < 0.35      # fable's own entropy, as the record has it


@pytest.mark.parametrize("null", [None, "random_targets", "mismatched"])
def test_one_seed_one_stream(tokenizer, null):
    for (a, b), (c, d) in zip(listed(tokenizer, null), listed(tokenizer, null)):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(listed(tokenizer, null)[0][1].flatten()[:200],
                           listed(tokenizer, null, seed=6)[0][1].flatten()[:200])


def test_documentation_has_random_targets_and_no_sentences_to_exchange(tokenizer):
    (inputs, targets), = listed(tokenizer, "random_targets", steps=1, task="python_docs")
    assert inputs.shape == targets.shape == (16, 128)
    with pytest.raises(ValueError, match="python_docs has no cards"):
        listed(tokenizer, "mismatched", task="python_docs")


@pytest.mark.parametrize("wrong", [{"task": "poems"}, {"null": "noise"}])
def test_unknown_names_are_refused(tokenizer, wrong):
    with pytest.raises(ValueError, match="choose a task of bistro, python_docs and a null of None, random_targets"):
        listed(tokenizer, **({"null": None} | wrong))


def test_only_what_should_train_has_moved():
    base = load_pretrained()[0]
    moved = {}
    for trains in ("matrices", "everything"):
        tuned = full_fine_tune("bistro", 2, 1e-3, trains=trains)
        moved[trains] = {n for (n, p), (_, q) in zip(base.named_parameters(), tuned.named_parameters())
                         if not torch.equal(p, q)}
        assert not any(p.requires_grad for p in tuned.parameters()) and next(tuned.parameters()).device.type == "cpu"
    assert len(moved["matrices"]) == 28 and all(name.endswith("_proj.weight") for name in moved["matrices"])
    assert moved["everything"] == {n for n, _ in base.named_parameters()}
    with pytest.raises(ValueError, match="'matrices'"):
        full_fine_tune("bistro", 1, trains="norms")
