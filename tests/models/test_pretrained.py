"""load_pretrained: fable, folders, hub names; and best_device."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from lora_edu import best_device, load_pretrained
from lora_edu.models.folder import read_chat
from lora_edu.models.pretrained import FABLE
from tests.hub import local_hub


def test_fable_loads_offline_in_eval_mode_as_float32():
    model, tokenizer = load_pretrained("fable")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert sum(p.numel() for p in model.parameters()) == 3_688_704
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 2048 and tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.decode(tokenizer.encode("Once upon a time…").ids) == "Once upon a time…"
    assert load_pretrained("fable", dtype=torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16


def test_fable_loads_in_under_a_second():
    """A promise to the reader, with room: the median of five was about a tenth of it."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        load_pretrained("fable")
        times.append(time.perf_counter() - began)
    assert sorted(times)[2] < 1.0


@torch.no_grad()
def test_fable_is_a_transformers_llama_too():
    """Oracle: transformers on the same folder; float32 to 1e-4, and float64 with its float32 norms to 1e-6 of the
    largest logit.
    """
    x = torch.randint(2048, (2, 200), generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 2e-5)):
        ours, _ = load_pretrained("fable", dtype=dtype)
        theirs = transformers.LlamaForCausalLM.from_pretrained(FABLE, dtype=dtype).eval()
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=tolerance)


def test_fable_has_learned_its_language():
    """A sentence in order is far likelier than its words shuffled; random weights cannot tell (ln 2048 = 7.6 nats)."""
    model, tokenizer = load_pretrained("fable")

    def loss(text):
        ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()

    told = "Once upon a time there was a king who had three sons, and he loved them all."
    assert loss(told) < 3.5 < loss(" ".join(sorted(told.split())))


def test_a_folder_loads_like_fable(tmp_path):
    model, tokenizer = load_pretrained("fable")
    model.save_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again, same = load_pretrained(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert isinstance(same, Tokenizer)


def from_local_hub(tmp_path, name: str, code: str) -> str:
    """What a process says that loads `name` from a server that answers like the hub; its client reads the address
    once.
    """
    code = ("from lora_edu import load_pretrained; from lora_edu.models import bridge\n"
            f"model, tokenizer = load_pretrained({name!r})\n"
            f"print(type(model).__module__.partition('.')[0], type(model).__name__, model.training, {code})")
    with local_hub(tmp_path / "hub") as (endpoint, _):
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fast_tokenizer(**more):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=load_pretrained()[1], eos_token="<|endoftext|>",
                                                **more)


@pytest.mark.slow
def test_a_llama_on_the_hub_is_ours_with_its_template_and_end(tmp_path):
    """The template and the end token as transformers reads them from the same files."""
    model, tokenizer = load_pretrained("fable")
    folder = tmp_path / "hub" / "owner" / "fable"
    model.save_folder(folder)
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %} :"
    theirs = fast_tokenizer(bos_token="=>", chat_template=template)
    theirs.save_pretrained(folder)
    said = from_local_hub(tmp_path, "owner/fable", "bridge.encode(tokenizer, 'the king'), bridge.end_token(tokenizer), "
                          "bridge.ask(tokenizer, 'Who?')")
    assert said == f"lora_edu Llama False {tokenizer.encode('the king').ids} 0 =>Who?<|endoftext|> :"
    assert theirs.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False) == said[-21:]


@pytest.mark.slow
def test_what_is_no_llama_comes_through_transformers(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "owner" / "gpt"
    config = transformers.GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    fast_tokenizer().save_pretrained(folder)
    assert from_local_hub(tmp_path, "owner/gpt", "bridge.end_token(tokenizer)") == (
        "transformers GPT2LMHeadModel False 0")
    monkeypatch.setattr("lora_edu.models.pretrained.fetch", lambda name: folder)
    monkeypatch.setattr("lora_edu.models.pretrained.from_hub", lambda name, patterns: folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"'owner/gpt' is no LLaMA.*pip install \"lora-edu\[hub\]\""):
        load_pretrained("owner/gpt")


@pytest.mark.parametrize("settings, file, template, end", [
    ({}, None, None, None),
    ({"chat_template": "A{{ x }}", "eos_token": {"content": "<e>"}}, None, "A{{ x }}", "<e>"),
    ({"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}, None, "D", None),
    ({"chat_template": [{"name": "tools", "template": "T"}]}, None, None, None),
    ({"chat_template": "old", "eos_token": "<e>"}, "new", "new", "<e>")])
def test_where_a_folder_keeps_its_template(settings, file, template, end, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if file:
        (tmp_path / "chat_template.jinja").write_text(file, encoding="utf-8")
    found = read_chat(tmp_path)
    assert found["chat_template"] == template and found["eos_token"] == end


def test_a_name_that_is_nowhere_says_what_to_do(monkeypatch):
    # at once, and not after the hub client's retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="'no/such-model' is neither a folder nor a file.*network"):
        load_pretrained("no/such-model")


def test_best_device_honours_the_variable(monkeypatch):
    monkeypatch.setenv("LORA_EDU_DEVICE", "cpu")
    assert best_device() == torch.device("cpu")
    monkeypatch.delenv("LORA_EDU_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == torch.device("cuda")


@pytest.mark.gpu
def test_fable_gives_the_same_logits_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model, _ = load_pretrained("fable")
    x = torch.randint(2048, (2, 100))
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), want, rtol=0, atol=1e-2)


@pytest.mark.slow
def test_importing_the_library_needs_neither_widgets_nor_plots():
    """torch, numpy, safetensors, tokenizers and tqdm are enough; the page loads when it is used."""
    code = ("import sys\nfor name in ('ipywidgets', 'matplotlib', 'IPython', 'transformers', 'peft', "
            "'huggingface_hub'): sys.modules[name] = None\nimport lora_edu\nmodel, _ = lora_edu.load_pretrained()\n"
            "lora_edu.apply_lora(model)\nassert not any(name.startswith('lora_edu.course') for name in sys.modules)\n")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("asked, message", [("gpu", "names no device: set it to cpu"),
                                            ("cuda:77", "torch sees .* such"), ("", None), ("cpu", None)])
def test_the_variable_is_named_where_it_names_no_device(asked, message, monkeypatch):
    monkeypatch.setenv("LORA_EDU_DEVICE", asked)
    if message is None:
        assert best_device().type in ("cpu", "cuda", "mps")
        return
    with pytest.raises(RuntimeError, match=f"LORA_EDU_DEVICE='{asked}'.*{message}"):
        best_device()


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setenv("LORA_EDU_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="LORA_EDU_DEVICE='cuda', and torch sees 0 such devices here"):
        best_device()
