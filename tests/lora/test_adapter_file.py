"""Adapters go both ways between us and PEFT, and wrong files are refused where PEFT warns or says nothing."""
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edu import LoRALinear, apply_lora, lora_state_dict
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from tests.lora.tiny import IDS, MODELS, logits, names, our_llama, shake


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["model.layers.1.self_attn.v_proj"]])
def test_peft_reads_what_we_write(targets, tmp_path):
    """Oracle: PEFT's logits with our files on the same base."""
    model = MODELS["transformers' Llama"]().eval()
    apply_lora(model, targets, rank=3, alpha=5)
    shake(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS["transformers' Llama"](), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind, targets",
                         [("transformers' Llama", ["q_proj", "up_proj"]), ("GPT-2", ["c_attn"]), ("GPT-2", ["c_proj"])])
def test_we_read_what_peft_writes(kind, targets, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False,
                             fan_in_fan_out=kind == "GPT-2")
    theirs = peft.get_peft_model(MODELS[kind](), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = MODELS[kind]().eval()
    report = load_adapter(ours, tmp_path)
    assert report.scaling == pytest.approx(7 / 3)
    torch.testing.assert_close(logits(ours), theirs(IDS).logits.detach(), rtol=1e-5, atol=1e-6)


def test_bf16_halves_the_file_and_rounds_once(tmp_path):
    model = our_llama()
    apply_lora(model, rank=2)
    shake(model)
    wide, small = save_adapter(model, tmp_path / "a"), save_adapter(model, tmp_path / "b", dtype=torch.bfloat16)
    assert 0.4 < small / wide < 0.9          # a header of names stays
    other = our_llama()
    load_adapter(other, tmp_path / "b")
    for name, tensor in lora_state_dict(other).items():
        assert torch.equal(tensor, lora_state_dict(model)[name].bfloat16().float())


@pytest.fixture
def saved(tmp_path):
    model = our_llama()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    save_adapter(model, tmp_path)
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def set_key(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rename(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("base_model.model.model.")] = tensors.pop(name)


@pytest.mark.parametrize("spoil, error, message", [
    (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "no adapter_config.json"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), ValueError, "damaged"),
    (lambda f: edit(f, lambda t: t.popitem()), ValueError, "1 tensors are missing"),
    (lambda f: edit(f, lambda t: t.update(more=torch.zeros(2))), ValueError, "1 tensors have no place"),
    (lambda f: edit(f, rename), ValueError, "missing.*no place"),
    (lambda f: set_key(f, r=3), ValueError, "another shape"),
    (lambda f: set_key(f, target_modules=["q_proj", "v_porj"]), ValueError, "Did you mean 'v_proj'"),
    (lambda f: set_key(f, use_dora=True), ValueError, "use_dora"),
    (lambda f: set_key(f, rank_pattern={"q_proj": 4}), ValueError, "another shape"),
    (lambda f: set_key(f, peft_type="IA3"), ValueError, "IA3"),
])
def test_wrong_files_are_refused_and_the_model_stays_plain(spoil, error, message, saved):
    spoil(saved)
    model = our_llama()
    with pytest.raises(error, match=message):
        load_adapter(model, saved)
    assert not names(model)


def test_another_base_is_refused(saved):
    model = our_llama()
    model.model["layers"] = model.model["layers"][:1]
    with pytest.raises(ValueError, match="another base"):
        load_adapter(model, saved)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@pytest.mark.parametrize("kind", ["transformers' Llama", "GPT-2"])
def test_rslora_goes_both_ways(kind, tmp_path):
    """Oracle: PEFT's logits, whoever wrote the files; alpha / sqrt(rank) is in the config and not folded into alpha."""
    targets = ["c_attn"] if kind == "GPT-2" else ["q_proj", "down_proj"]
    model = MODELS[kind]().eval()
    assert apply_lora(model, targets, rank=4, alpha=6, rslora=True).scaling == 3
    shake(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    back = MODELS[kind]().eval()
    assert load_adapter(back, tmp_path / "theirs").rslora
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-6, atol=1e-7)
