"""Pretraining on a few made-up tales: it learns, resumes to the same weights, and leaves a folder that loads."""
import gzip
import json
import random

import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.models.llama import LlamaConfig
from lora_edu.course.records import pretrain
from lora_edu.training.corpora import END

CONFIG = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)


@pytest.fixture
def texts(tmp_path):
    rng = random.Random(0)
    words = "king queen fox crow wood river gold bread said went saw gave the a and to in of".split()

    def tale():
        return "\n\n".join(" ".join(rng.choices(words, k=40)) + "." for _ in range(4)) + "\n"

    text = f"{END}\n".join(tale() for _ in range(60))
    (tmp_path / "tales.txt").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "novels.txt.gz", "wt", encoding="utf-8") as f:
        f.write(text.upper())
    return {str(tmp_path / "tales.txt"): 0.75, str(tmp_path / "novels.txt.gz"): 0.25}


def run(texts, out, tokens=12 * 4096, **how):
    return pretrain.pretrain(texts, next(iter(texts)), str(out), tokens=tokens, lr=0.02, config=CONFIG, **how)


def test_it_learns_and_leaves_a_folder_that_loads(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "EVALUATE_EVERY", 6)
    final = run(texts, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert final < 4.6 < 5.7 and report["tokens"] == 12 * 4096 and len(report["curve"]["rows"]) == 2    # ln 300 = 5.70
    assert report["curve"]["rows"][0][1] > report["curve"]["rows"][1][1]
    model, tokenizer = load_pretrained(tmp_path / "out")
    assert tokenizer.token_to_id(END) == 0 and tokenizer.decode(tokenizer.encode("Zebra, čau!").ids) == "Zebra, čau!"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "curve.json", "model.safetensors",
                                                                    "tokenizer.json"]


def test_an_interrupted_run_goes_on_to_the_same_weights(texts, tmp_path, monkeypatch):
    run(texts, tmp_path / "whole")
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 5)
    original = pretrain.train

    def stops_at_7(*args, **how):
        for step in original(*args, **how):
            yield step
            if step.step == 7:
                raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "train", stops_at_7)
    with pytest.raises(KeyboardInterrupt):
        run(texts, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint.pt").exists() and not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(pretrain, "train", original)
    run(texts, tmp_path / "parts")
    whole, parts = (load_pretrained(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_the_order_follows_seed_and_shares_and_reads_every_window_before_any_again():
    def order(seed, shares=(3.0, 1.0)):
        return list(pretrain.reading_order([50_000, 20_000], list(shares), 30, 64, seed))

    assert order(1) == order(1) != order(2)
    places = [place for batch, _ in order(1) for place in batch]
    assert sum(text == 0 for text, _ in places) / len(places) == pytest.approx(0.75, abs=0.05)
    assert [length for _, length in order(1)] == [32] * 20 + [64] * 10
    assert all(len(batch) * length == pretrain.TOKENS_A_STEP for batch, length in order(1))
    first = [start for batch, length in order(1) for text, start in batch if text == 0 and length == 32]
    windows = (50_000 - 1) // 32 - 1                      # one pass; the offset may cost one window
    assert len(set(first[:windows])) == windows
    assert all(start + length < size for batch, length in order(1) for text, start in batch
               for size in [[50_000, 20_000][text]])


def test_a_share_is_read_off_the_argument():
    assert pretrain.text_and_share("tales.txt.gz=0.5") == ("tales.txt.gz", 0.5)
    assert pretrain.text_and_share("tales.txt.gz") == ("tales.txt.gz", 1.0)
