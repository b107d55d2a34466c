"""Texts, tokens and windows: nothing overlaps, nothing is lost, the same seed gives the same."""
import gzip
import re
import sys
from itertools import islice

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_edu.training import corpora
from lora_edu.training.corpora import packed_batches, python_docs, tokenize, windows
from lora_edu.course.records.pretrain import train_tokenizer

TALE = "Once upon a time there was a king, and the king had a daughter.\n\nShe lived in the castle by the river.\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of 512 tokens, end-of-text first; the row of blanks gives it tokens for several line breaks
    at once.
    """
    return train_tokenizer([TALE, "a\n\n\n\tb \n\n  c\n \n.\n\n\n\n" * 500, python_docs("valid")], vocab_size=512)


def paragraphs(text: str) -> set[str]:
    return {p.strip() for p in re.split(r"\n\s*\n|<\|endoftext\|>", text) if p.strip()}


def test_python_docs_are_there_in_three_parts_that_share_no_paragraph():
    parts = {split: python_docs(split) for split in ("train", "valid", "test")}
    assert len(parts["train"]) > 150_000 and min(map(len, parts.values())) > 10_000
    found = {split: paragraphs(text) for split, text in parts.items()}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not found[one] & found[other]


def test_python_docs_keep_every_paragraph_of_the_source_once():
    from pydoc_data.topics import topics
    everything = [p for split in ("train", "valid", "test")
                  for p in re.split(r"\n\s*\n|<\|endoftext\|>", python_docs(split)) if p.strip()]
    source = {p.strip() for text in topics.values() for p in re.split(r"\n\s*\n", corpora.clean(text)) if p.strip()}
    assert {p.strip() for p in everything} == source
    across = "".join(everything)
    assert "****" not in re.sub(r"[^\n*]\**", "", across), "no row of stars under a heading"


def test_python_docs_are_the_same_every_time_and_refuse_another_split():
    assert python_docs("test") == python_docs("test")
    with pytest.raises(ValueError, match="train, valid, test"):
        python_docs("dev")


def test_clean_drops_underlines_and_trailing_spaces_only():
    assert corpora.clean("Title\n*****\n\nText  \n   a ** b\n") == "Title\n\nText\n   a ** b\n"


def test_read_text_plain_and_gzip(tmp_path):
    (tmp_path / "a.txt").write_text("Märchen\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("Märchen\n")
    assert corpora.read_text(tmp_path / "a.txt") == corpora.read_text(str(tmp_path / "b.txt.gz")) == "Märchen\n"
    with pytest.raises(FileNotFoundError, match="give the path of a .txt or .gz file"):
        corpora.read_text(tmp_path / "c.txt")


def test_tokenize_puts_one_token_between_documents(tokenizer):
    ids = tokenize(tokenizer, "A king.\n<|endoftext|>\nA queen.\n<|endoftext|>\n")
    first, second = tokenizer.encode("A king.\n").ids, tokenizer.encode("A queen.\n").ids
    assert ids.tolist() == first + [0] + second + [0] and ids.dtype == torch.long
    assert tokenize(tokenizer, "A king.").tolist() == tokenizer.encode("A king.").ids
    assert tokenize(tokenizer, "").tolist() == []


@settings(deadline=None, max_examples=60)
@example(text="a\n\n\n\n\tb \n\n  c\n\n\n\n", piece=1)
@given(text=st.text(alphabet="ab \n\t.'", max_size=200), piece=st.integers(1, 20))
def test_cutting_into_pieces_changes_no_token(tokenizer, text, piece):
    """Oracle: the whole text encoded at once."""
    assert len(tokenizer.encode("\n\n\n").ids) < 3, (
        "a tokenizer without tokens for several line breaks would prove nothing"
    )
    was, corpora.PIECE = corpora.PIECE, piece
    try:
        assert tokenize(tokenizer, text).tolist() == tokenizer.encode(text).ids
    finally:
        corpora.PIECE = was


def test_a_long_text_is_cut_and_shows_its_progress(tokenizer, monkeypatch, capfd):
    whole = tokenizer.encode(TALE).ids
    assert tokenize(tokenizer, TALE).tolist() == whole and "tokenize" not in capfd.readouterr().err
    monkeypatch.setattr(corpora, "PIECE", 50)
    monkeypatch.setattr(corpora, "SHOW_PROGRESS", 100)
    assert len(list(corpora.pieces(TALE))) > 10
    assert tokenize(tokenizer, TALE).tolist() == whole
    assert "tokenize" in capfd.readouterr().err


@settings(deadline=None)
@given(n=st.integers(2, 300), length=st.integers(1, 40), batch_size=st.integers(1, 7), seed=st.integers(0, 2**40))
def test_packed_batches_are_windows_of_the_text_and_repeat_with_their_seed(n, length, batch_size, seed):
    tokens = torch.arange(n, dtype=torch.int32)
    if n < length + 1:
        with pytest.raises(ValueError, match="shorter window"):
            next(packed_batches(tokens, length, batch_size, seed))
        return
    made, again = (list(packed_batches(tokens, length, batch_size, seed, steps=4)) for _ in range(2))
    assert len(made) == 4
    for (inputs, targets), (same, _) in zip(made, again):
        assert inputs.shape == targets.shape == (batch_size, length) and inputs.dtype == torch.long
        assert torch.equal(targets, inputs + 1) and torch.equal(inputs, same)
        assert torch.equal(inputs - inputs[:, :1], torch.arange(length).expand(batch_size, -1))
        assert int(targets.max()) < n


def test_a_pass_takes_every_window_once_and_the_next_pass_starts_elsewhere():
    tokens = torch.arange(10 * 64 + 1)
    rows = torch.cat([inputs for inputs, _ in islice(packed_batches(tokens, 64, 1, seed=3), 36)])
    one, two, three, four = (rows[9 * i:9 * i + 9] for i in range(4))       # an offset above 0 leaves 9 whole windows
    for part in (one, two, three, four):
        assert len(part.unique()) == 9 * 64, "nothing twice in one pass"
    assert len({int(part.min()) % 64 for part in (one, two, three, four)}) > 1
    assert not torch.equal(one[:, 0], one[:, 0].sort().values)


def test_another_seed_is_another_order_and_no_steps_means_no_end():
    tokens = torch.arange(5000)
    one, other = (next(packed_batches(tokens, 16, 8, seed))[0] for seed in (0, 1))
    assert not torch.equal(one, other)
    assert len(list(islice(packed_batches(tokens, 16, 8, 0), 100))) == 100


@settings(deadline=None)
@given(n=st.integers(2, 300), length=st.integers(1, 40), batch_size=st.integers(1, 7))
def test_windows_make_every_token_but_the_first_a_target_once(n, length, batch_size):
    tokens = torch.arange(1000, 1000 + n)
    if n < length + 1:
        with pytest.raises(ValueError, match="shorter window"):
            windows(tokens, length, batch_size)
        return
    batches = windows(tokens, length, batch_size)
    inputs, targets = (torch.cat(side) for side in zip(*batches))
    assert max(len(side) for side, _ in batches) <= batch_size and inputs.shape[1] == length
    counted = targets != -100
    assert targets[counted].tolist() == list(range(1001, 1000 + n))
    assert torch.equal(inputs[counted] + 1, targets[counted])


@pytest.mark.parametrize("tokens, length",
                         [(torch.arange(20).view(2, 10), 4), (torch.arange(20), 0), (torch.arange(0), 1)])
def test_tokens_that_hold_no_window_are_refused(tokens, length):
    with pytest.raises(ValueError, match="one row of at least"):
        windows(tokens, length)


class Teller(nn.Module):
    """Stands in for the base: a next-token table, sampled with the seed it is given."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 3)

    def forward(self, ids):
        return self.table[ids]

    def generate(self, ids, max_new_tokens, temperature, seed):
        assert temperature == 1.0 and not self.training
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            p = self(ids[:, -1]).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
        return ids


def nll(model, batches) -> float:
    return float(torch.cat([nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
                            for x, y in batches]).mean())


def test_tales_are_the_base_s_own_and_any_change_makes_their_loss_higher(tokenizer):
    """Oracle: with a table, entropy along the tales and the divergence of a changed table have closed forms."""
    base = Teller().train()
    tales = corpora.tales_from(base, tokenizer, n=40, seed=1, length=200, batch_size=16)
    assert [tuple(x.shape) for x, _ in tales] == [(16, 200), (16, 200), (8, 200)] and base.training
    assert all(torch.equal(x[:, 1:], y[:, :-1]) and (x[:, 0] == 0).all() for x, y in tales)
    again, other = (corpora.tales_from(base, tokenizer, n=40, seed=seed, length=200) for seed in (1, 2))
    assert torch.equal(again[0][0], tales[0][0]) and not torch.equal(other[0][0], tales[0][0])

    changed = Teller()
    with torch.no_grad():
        changed.table += torch.randn(512, 512, generator=torch.Generator().manual_seed(5))
        p, q = base.table.log_softmax(-1), changed.table.log_softmax(-1)
        seen = torch.cat([x.flatten() for x, _ in tales])
        entropy = -(p.exp() * p).sum(-1)[seen].mean()
        divergence = (p.exp() * (p - q)).sum(-1)[seen].mean()
        assert nll(base, tales) == pytest.approx(float(entropy), abs=0.05)
        assert nll(changed, tales) - nll(base, tales) == pytest.approx(float(divergence), abs=0.05)
        assert divergence > 0.2


def test_tales_refuse_a_model_that_carries_an_adapter(tokenizer):
    model = Teller()
    model.lora_A = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="before apply_lora"):
        corpora.tales_from(model, tokenizer, n=1)


def test_a_python_without_its_reference_gets_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="comes without pydoc_data"):
        corpora.python_docs()
