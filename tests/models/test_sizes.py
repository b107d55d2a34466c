"""Sizes: published parameter counts, transformers and PEFT on the meta device as oracles, and every refusal."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from lora_edu.lora.inject import apply_lora
from lora_edu.measure.memory import bill
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import FABLE, load_pretrained
from lora_edu.models.sizes import PRESETS, Sizes, sizes_of
from tests.hub import local_hub

PUBLISHED = {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-65b": 65_285_660_672,
             "llama-3.1-8b": 8_030_261_248,
             "llama-3.1-70b": 70_553_706_496, "gpt2": 124_439_808, "gpt2-medium": 354_823_168,
             "gpt2-large": 774_030_080,
             "gpt2-xl": 1_557_611_200, "smollm2-135m": 134_515_008, "fable": 3_688_704}
LLAMA = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=64)


def in_transformers(sizes):
    """The same model as transformers builds it, without memory."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
    from transformers import LlamaConfig as HFLlamaConfig
    s = sizes
    with torch.device("meta"):
        if s.kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=s.vocab, n_embd=s.hidden, n_layer=s.layers, n_head=s.heads,
                                              n_positions=s.context))
        return LlamaForCausalLM(HFLlamaConfig(
            vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.wide, num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads, head_dim=s.head_dim, max_position_embeddings=s.context,
            tie_word_embeddings=s.tied))


@pytest.mark.parametrize("name, published", PUBLISHED.items())
def test_the_counts_are_the_published_ones(name, published):
    assert PRESETS[name].parameters() == published


def test_gpt3_by_its_own_table_is_near_what_the_papers_call_175_billion():
    """96 · 12 · 12288² and what is around it; Hu et al. (2021) print 175,255.8 million, which no such count gives."""
    assert PRESETS["gpt3-175b"].parameters() == 174_604_259_328


@pytest.mark.parametrize("name", PRESETS)
def test_counts_and_adapters_agree_with_transformers_and_peft(name):
    from peft import LoraConfig, get_peft_model
    sizes = PRESETS[name]
    model = in_transformers(sizes)
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters()
    if sizes.kind == "gpt2":
        ours, theirs = ("attn.c_attn", "mlp.c_fc"), ["c_attn", "c_fc"]
    else:
        ours, theirs = ("q_proj", "v_proj", "down_proj"), ["q_proj", "v_proj", "down_proj"]
    with torch.device("meta"):
        peft = get_peft_model(model, LoraConfig(r=8, target_modules=theirs, fan_in_fan_out=sizes.kind == "gpt2"))
    assert peft.get_nb_trainable_parameters()[0] == sizes.adapter(ours, 8)


def test_targets_by_their_endings_count_as_apply_lora_counts():
    config = LlamaConfig(**LLAMA)
    sizes = Sizes.from_config(LLAMA | {"model_type": "llama"})
    for targets in ("all-linear", ("q_proj",), ("k_proj", "up_proj")):
        model = Llama(config)
        apply_lora(model, targets if isinstance(targets, str) else list(targets), rank=3, alpha=6)
        assert sizes.adapter(targets, 3) == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sizes.linear() == sum(p.numel() for name, p in Llama(config).named_parameters() if "proj" in name)


def test_gpt2s_c_proj_names_two_matrices():
    assert list(PRESETS["gpt2"].adapted(("c_proj",), 4)) == ["attn.c_proj", "mlp.c_proj"]
    assert list(PRESETS["gpt2"].adapted(("mlp.c_proj",), 4)) == ["mlp.c_proj"]


def test_a_config_is_read_from_a_file_and_a_folder(tmp_path):
    want = sum(p.numel() for p in load_pretrained("fable")[0].parameters())
    assert sizes_of(FABLE) == sizes_of(FABLE / "config.json") == PRESETS["fable"]
    assert sizes_of(FABLE).parameters() == want
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
                                "n_positions": 1024}))
    assert sizes_of(str(file)) == PRESETS["gpt2"]
    # a llama without the entries that have a default
    assert Sizes.from_config({key: value for key, value in (LLAMA | {"model_type": "llama"}).items()
                              if key not in ("num_key_value_heads", "max_position_embeddings")}).kv_heads == 4


@pytest.mark.parametrize("content, said", [
    ('{"model_type": "mamba"}', "architecture 'mamba' cannot be counted"), ("{}", "architecture None"),
    ("[1]", "holds no settings"),
    ("{", "is not JSON"), ('{"model_type": "llama", "vocab_size": 10}', "does not say hidden_size, num_hidden_layers"),
    (json.dumps(LLAMA | {"model_type": "llama", "hidden_size": -24}), "hidden=-24"),
    (json.dumps(LLAMA | {"model_type": "llama", "vocab_size": 2.5}), "vocab=2.5"),
    (json.dumps(LLAMA | {"model_type": "llama", "num_key_value_heads": 3}), "cannot share 3")])
def test_a_config_that_cannot_be_counted_is_refused(tmp_path, content, said):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        sizes_of(file)


@pytest.mark.parametrize("name, said", [("lama-7b", "did you mean 'llama-7b'"), ("zzz", "no preset and no file"),
                                        ("a/b/c", "no preset and no file"),
                                        ("gone/config.json", "no preset and no file")])
def test_an_unknown_name_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        sizes_of(name)


@pytest.mark.parametrize("targets, rank, said", [(("q_prj",), 8, "no matrix is named 'q_prj'"), ((), 8, "no target"),
                                                 (("proj",), 8, "no matrix is named 'proj'"),
                                                 ("all-linear", 0, "rank=0"),
                                                 ("all-linear", 4097, "rank <= 4096"),
                                                 (("q_proj",), True, "rank=True")])
def test_targets_and_ranks_that_do_not_fit_are_refused(targets, rank, said):
    with pytest.raises(ValueError, match=said):
        PRESETS["llama-7b"].adapter(targets, rank)


@pytest.mark.slow
def test_a_name_on_the_hub_needs_its_config_alone(tmp_path):
    repo = tmp_path / "hub" / "owner" / "small"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text(json.dumps(LLAMA | {"model_type": "llama"}))
    (repo / "model.safetensors").write_bytes(b"not wanted")
    want = sum(p.numel() for p in Llama(LlamaConfig(**LLAMA)).parameters())

    def asked_for(name, **more):
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1",
                            "HF_HUB_OFFLINE": "0",
                            "PYTHONPATH": os.pathsep.join(filter(None,
                                                                 [os.getcwd(), os.environ.get("PYTHONPATH")]))} | more
        return subprocess.run([sys.executable, "-m", "lora_edu.cli", "memory", name, "--length", "8", "--rank", "2"],
                              env=env,
                              capture_output=True, text=True, timeout=120)
    with local_hub(tmp_path / "hub") as (endpoint, asked):
        found, nowhere = asked_for("owner/small"), asked_for("owner/nowhere")
    assert found.returncode == 0 and f"owner/small: {want:,} parameters" in found.stdout
    assert not [line for line in asked if "model.safetensors" in line]
    assert nowhere.returncode == 1
    assert nowhere.stderr.splitlines()[-1].startswith("lora-edu: 'owner/nowhere' is neither a folder nor a file, and "
                                                      "the hub did not give")
    again = asked_for("owner/small", HF_HUB_OFFLINE="1")                    # the server is gone: from the cache
    assert again.stdout == found.stdout


SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=16)


@pytest.mark.parametrize("config", [
    transformers.LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True),
    transformers.LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    transformers.LlamaConfig(**SMALL, num_key_value_heads=2, mlp_bias=True, tie_word_embeddings=True),
    transformers.GPT2Config(**GPT2, tie_word_embeddings=False), transformers.GPT2Config(**GPT2, n_inner=40),
    transformers.GPT2Config(**GPT2, add_cross_attention=True)])
def test_every_key_that_changes_the_count_is_read(config, tmp_path):
    """Oracle: transformers' own count."""
    config.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sizes_of(tmp_path).parameters() == model.num_parameters()


@pytest.mark.parametrize("quantisation, recipe", [
    ({"load_in_4bit": True}, "nf4"), ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "nf4-double"),
    (None, "bf16-mixed")])
def test_a_config_that_says_how_it_is_stored_is_billed_so(quantisation, recipe, tmp_path):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2).to_dict() | {"quantization_config": quantisation}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    said = bill(str(tmp_path))
    assert said.recipe == recipe and said.parts == bill(str(tmp_path), recipe=recipe).parts


def test_what_cannot_be_billed_is_said(tmp_path):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2).to_dict() | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="recipe='gptq quantisation': choose one of"):
        bill(str(tmp_path))
    bill(str(tmp_path), recipe="nf4")
    transformers.GPT2Config(**GPT2, add_cross_attention=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cross-attention"):
        bill(str(tmp_path))


@pytest.mark.parametrize("change, message", [
    ({"num_attention_heads": 12}, "cannot share"), ({"hidden_size": "32"}, "whole number"),
    ({"num_attention_heads": 0}, "whole number"), ({"intermediate_size": [1, 2]}, "a size is a whole number"),
    ({"num_hidden_layers": None}, "a size is a whole number"),
    ({"hidden_size": 10**400, "head_dim": 64}, "hidden=1000.*to 2"),
    ({"quantization_config": "x"}, "names and values"), ({"vocab_size": 1.5}, "a size is a whole number")])
def test_a_size_that_is_none_is_refused(change, message, tmp_path):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=8 if "cannot" in message else 2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"} | change))
    with pytest.raises(ValueError, match=message):
        bill(str(tmp_path))


def test_a_short_context_and_numbers_of_numpy(tmp_path):
    assert bill("fable").length == 512 and bill("gpt2").length == 1024 and bill("llama-7b").length == 2048
    assert bill("gpt2", rank=np.int64(4), batch=np.int64(2), length=np.int64(8)).parts == bill(
        "gpt2", rank=4, batch=2, length=8).parts
