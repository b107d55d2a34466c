"""An adapter's files: what is known to leave the numbers alone is read, everything else is refused by name."""
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edu import apply_lora, load_adapter, save_adapter
from lora_edu.lora.adapter_config import read_config
from lora_edu.lora.adapter_file import PREFIX
from lora_edu.lora.factors import lora_layers
from tests.lora.test_refusals import same, state_of
from tests.lora.tiny import hf_llama, logits, our_llama, shake


@pytest.fixture
def saved(tmp_path):
    model = our_llama()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    save_adapter(model, tmp_path, base_name="tiny")
    return tmp_path


def set_keys(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def refused(folder, message, error=ValueError):
    model = our_llama()
    before = state_of(model)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert same(before, state_of(model)) and model.training


@pytest.mark.parametrize("keys", [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": ["x"]}, {"alora_invocation_tokens": [1, 2]}, {"use_dora": True}, {"use_qalora": True},
    {"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}, {"target_parameters": ["x"]}, {"use_bdlora": {"a": 1}},
    {"layer_replication": [[0, 1]]},
    {"trainable_token_indices": [1]}, {"megatron_config": {"a": 1}}, {"arrow_config": {"a": 1}},
    {"kasa_config": {"a": 1}}, {"velora_config": {"a": 1}}, {"monteclora_config": {"a": 1}}, {"peft_type": "VERA"},
    {"peft_type": None}, {"a_key_of_next_year": 7}])
def test_a_key_that_asks_for_more_is_refused_by_its_name(keys, saved):
    set_keys(saved, **keys)
    refused(saved, "asks for .*" + re.escape(next(iter(keys))) + ".*PEFT")


def test_every_default_of_peft_is_known(saved):
    """Oracle: what PEFT writes for a plain LoRA, every key of it; a key of next year at its empty value, too."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"]).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    set_keys(saved, **config, a_key_of_next_year=None, another=[], a_third=False)
    assert load_adapter(our_llama(), saved).rank == 2


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_load(start, saved):
    set_keys(saved, init_lora_weights=start)
    load_adapter(our_llama(), saved)


@pytest.mark.parametrize("keys", [
    {"r": None}, {"r": "2"}, {"r": 2.5}, {"r": 0}, {"r": True}, {"r": [2]}, {"lora_alpha": None}, {"lora_alpha": "16"},
    {"lora_alpha": float("nan")}, {"lora_alpha": [1]}, {"lora_dropout": "0.1"}, {"lora_dropout": 1.0},
    {"lora_dropout": -0.1}, {"lora_dropout": None}, {"use_rslora": "yes"}, {"use_rslora": 1}, {"target_modules": None},
    {"target_modules": 5}, {"target_modules": []}, {"target_modules": [5]}, {"target_modules": {"a": 1}},
    {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"q_proj": "4"}}, {"rank_pattern": {"q_proj": 0}},
    {"alpha_pattern": {"q_proj": None}}, {"alpha_pattern": 3}, {"modules_to_save": "score"}, {"modules_to_save": [1]}])
def test_a_value_of_a_wrong_type_is_refused_with_file_and_key(keys, saved):
    set_keys(saved, **keys)
    refused(saved, "adapter_config.json has " + next(iter(keys)) + "=")


def test_a_pattern_that_is_no_expression(saved):
    set_keys(saved, rank_pattern={"q_proj(": 2})
    refused(saved, "pattern of the config is no regular expression")


@pytest.mark.parametrize("body, message", [(b"[1, 2]", "holds no settings"), (b"", "is not JSON"),
                                           (b"[" * 100_000, "is not JSON"), (b"\xff\xfe\x00", "is not JSON"),
                                           (b'"text"', "holds no settings"), (b"{'r': 2}", "is not JSON")])
def test_a_config_that_is_none(body, message, saved):
    (saved / "adapter_config.json").write_bytes(body)
    refused(saved, "adapter_config.json " + message)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_config_in_another_encoding_is_read(encoding, saved):
    file = saved / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    assert read_config(saved)["r"] == 2


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t[A].fill_(torch.nan), "not finite"), (lambda t: t[A].fill_(-torch.inf), "not finite"),
    (lambda t: t.update({A: t[A].int()}), "torch.int32 numbers"),
    (lambda t: t.update({A: t[A].to(torch.complex64)}), "torch.complex64 numbers"),
    (lambda t: t.update({A.removeprefix(PREFIX): t[A].clone()}), "twice, with and without a prefix"),
    (lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}), "DoRA's magnitude"),
    (lambda t: t.update({A.replace("lora_A", "lora_diag"): torch.ones(2)}), "variant of LoRA that is not computed"),
    (lambda t: t.update({A.replace("lora_A.weight", "lora_B.bias"): torch.ones(16)}), "bias of the factors"),
    (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 50)}),
     "LoRA on an embedding"),
    (lambda t: t.update({A.replace("lora_A.weight", "bias"): torch.ones(16)}), "bias that was trained"),
    (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 16)}), "of a whole module"),
    (lambda t: [t.update({n.replace(PREFIX, PREFIX + "module."): t.pop(n)}) for n in list(t)],
     "With 'module.' taken from the front"),
    (lambda t: [t.update({n.replace(PREFIX + "model.", PREFIX): t.pop(n)}) for n in list(t)],
     "With 'model.' put to the front"),
])
def test_the_true_reason_is_given_for_tensors_that_do_not_fit(change, message, saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    refused(saved, message)


def test_names_from_a_compiled_model_are_read(saved):
    file = saved / "adapter_model.safetensors"
    save_file({n.replace(PREFIX, PREFIX + "_orig_mod."): t for n, t in load_file(file).items()}, file)
    assert len(load_adapter(our_llama(), saved).matched) == 2


def test_an_old_bin_file_is_read_and_nothing_else_in_it(saved):
    file = saved / "adapter_model.safetensors"
    want = our_llama()
    load_adapter(want, saved)
    torch.save(load_file(file), saved / "adapter_model.bin")
    file.unlink()
    load_adapter(again := our_llama(), saved)
    assert torch.equal(logits(again), logits(want))
    torch.save({"x": print}, saved / "adapter_model.bin")
    refused(saved, "could run code")


def test_the_model_is_in_eval_mode_after_loading_as_pefts(saved):
    model = our_llama()
    assert model.training
    load_adapter(model, saved)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_writes_after_a_start_that_changed_the_base_is_refused(init, tmp_path):
    theirs = peft.get_peft_model(hf_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}"):
        load_adapter(hf_llama(), tmp_path)


@pytest.mark.parametrize("rslora", [True, False])
def test_ranks_and_alphas_of_pefts_patterns_are_read(rslora, tmp_path):
    """Oracle: PEFT's logits. A rank above the smaller side is taken from a file, with a note."""
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj", "up_proj"], use_rslora=rslora,
                             init_lora_weights=False, alpha_pattern={r"layers\.1\..*up_proj": 5, "q_proj": 2},
                             rank_pattern={r".*\.0\.self_attn\.q_proj": 5, "k_proj": 12})
    theirs = peft.get_peft_model(hf_llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = hf_llama()
    report = load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    ranks = {name.removeprefix("model.layers."): layer.rank for name, layer in lora_layers(ours)}
    assert ranks["0.self_attn.q_proj"] == 5 and ranks["1.self_attn.q_proj"] == 3 and ranks["0.self_attn.k_proj"] == 12
    assert "above the smaller side of model.layers.0.self_attn.k_proj" in report.summary()
    assert "rank 3 to 12" in report.summary() and "no fingerprint" in report.summary()
