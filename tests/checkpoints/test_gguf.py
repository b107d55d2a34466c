"""An adapter for llama.cpp, read back with the package gguf; and its logits, where llama.cpp itself is there."""
import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edu import apply_lora, cli, load_adapter, load_pretrained, save_adapter
from lora_edu.checkpoints.gguf_file import adapter_to_gguf
from lora_edu.lora.factors import lora_layers
from lora_edu.models.pretrained import BISTRO_ADAPTER, FABLE
from tests.lora.tiny import our_llama, shake


TINY = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
        "hidden_size": 16, "intermediate_size": 24}                # of our_llama


def read(file):
    reader = gguf.GGUFReader(file)
    return reader, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def turned(rows, heads):
    """llama.cpp's order of a head's rows, written as a loop: pairs of neighbours are a row and the one half a head on.
    """
    size, order = len(rows) // heads, []
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + size // 2 + i]
    return rows[order]


def test_names_alpha_and_the_order_of_rows(tmp_path):
    assert adapter_to_gguf(BISTRO_ADAPTER, FABLE, tmp_path / "bistro.gguf") == 28
    reader, tensors = read(tmp_path / "bistro.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 12
    stored = {name: t.float() for name, t in load_file(BISTRO_ADAPTER / "adapter_model.safetensors").items()}
    config = json.loads((FABLE / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    ours = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "output": "self_attn.o_proj"}
    for theirs, name in ours.items():
        there = f"base_model.model.model.layers.2.{name}"
        called = f"blk.2.attn_{theirs}.weight"
        assert torch.equal(tensors[f"{called}.lora_a"], stored[f"{there}.lora_A.weight"])
        B = stored[f"{there}.lora_B.weight"]
        assert torch.equal(tensors[f"{called}.lora_b"], turned(B, heads[theirs]) if theirs in heads else B)
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"],
                       stored["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"])
    assert len(tensors) == 56


@pytest.mark.parametrize("rslora", [True, False])
def test_one_alpha_for_the_file_and_still_every_scaling(rslora, tmp_path):
    """A reader divides by each layer's rank; ranks, alphas and the rule of scaling are in the numbers then."""
    model = our_llama()
    apply_lora(model, ["v_proj", "up_proj"], rank=3, alpha=5, rslora=rslora)
    layers = dict(lora_layers(model))
    layers["model.layers.1.mlp.up_proj"].set_strength(0.3)
    shake(model)
    save_adapter(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    adapter_to_gguf(tmp_path, tmp_path, tmp_path / "a.gguf")
    reader, tensors = read(tmp_path / "a.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    for name, theirs in (("model.layers.0.mlp.up_proj", "blk.0.ffn_up"), ("model.layers.1.mlp.up_proj", "blk.1.ffn_up"),
                         ("model.layers.1.self_attn.v_proj", "blk.1.attn_v")):
        A, B = (tensors[f"{theirs}.weight.lora_{end}"] for end in "ab")
        torch.testing.assert_close(alpha / len(A) * B @ A, layers[name].delta_weight().detach(), atol=1e-6, rtol=1e-5)


def test_what_has_no_place_is_refused_and_nothing_is_written(tmp_path):
    model = our_llama(tied=False)
    apply_lora(model, ["q_proj"], rank=2)
    model.lm_head.requires_grad_(True)
    save_adapter(model, tmp_path / "head")
    fable = json.loads((FABLE / "config.json").read_text())
    for folder, config, message in ((tmp_path / "head", TINY, "brings lm_head.weight, and only updates"),
                                    (BISTRO_ADAPTER, fable | {"num_hidden_layers": 2}, "layers.2.* has no place"),
                                    (BISTRO_ADAPTER, fable | {"num_attention_heads": 4}, "has no place of its size"),
                                    (BISTRO_ADAPTER, TINY, "has no place of its size"),
                                    (BISTRO_ADAPTER, fable | {"num_attention_heads": None}, "does not say its sizes"),
                                    (BISTRO_ADAPTER, fable | {"num_hidden_layers": "4"}, "does not say its sizes"),
                                    (BISTRO_ADAPTER, {"model_type": "llama"}, "does not say its sizes"),
                                    (BISTRO_ADAPTER, TINY | {"model_type": "qwen2"}, "is a 'qwen2'")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            adapter_to_gguf(folder, tmp_path, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("a.gguf*"))


def test_the_command_line(tmp_path, capsys):
    assert cli.main(["gguf", str(BISTRO_ADAPTER), "--base", "fable", "--out", str(tmp_path / "b.gguf")]) == 0
    assert "28 matrices" in capsys.readouterr().out
    assert cli.main(["gguf", str(BISTRO_ADAPTER), "--base", "fable", "--out", str(tmp_path / "no" / "b.gguf")]) == 1
    assert "no folder" in capsys.readouterr().err


def base_to_gguf(file):
    """fable itself for llama.cpp, without a vocabulary: the test speaks in token ids."""
    config = json.loads((FABLE / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(load_pretrained()[0].config.rope_theta)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(FABLE / "model.safetensors").items():
        module, weight = name.removesuffix(".weight"), tensor.float()
        ending = module.rpartition(".")[2]
        weight = turned(weight, heads[ending]) if ending in heads else weight
        writer.add_tensor(f"{names.get_name(module)}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.optional
def test_llama_cpp_says_what_we_say(tmp_path):
    """Logits within 5e-3, of up to 15; the cache is in 32 bits, where llama.cpp by itself keeps it in 16."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it builds for ten minutes)")
    base_to_gguf(tmp_path / "fable.gguf")
    adapter_to_gguf(BISTRO_ADAPTER, FABLE, tmp_path / "bistro.gguf")
    model, tokenizer = load_pretrained()
    ids = tokenizer.encode("name: Clover | food: Greek\n=>").ids
    for adapter in (None, tmp_path / "bistro.gguf"):
        if adapter:
            load_adapter(model, BISTRO_ADAPTER)
        there = llama_cpp.Llama(str(tmp_path / "fable.gguf"), lora_path=str(adapter) if adapter else None,
                                logits_all=True, verbose=False, n_ctx=64, type_k=llama_cpp.GGML_TYPE_F32,
                                type_v=llama_cpp.GGML_TYPE_F32)
        there.eval(ids)
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0]
        torch.testing.assert_close(torch.from_numpy(np.array(there.scores[:len(ids)])), ours, atol=5e-3, rtol=0)


def test_an_adapter_whose_ranks_are_not_its_configs_is_refused(tmp_path):
    stored = load_file(BISTRO_ADAPTER / "adapter_model.safetensors")
    config = json.loads((BISTRO_ADAPTER / "adapter_config.json").read_text())
    first = next(name for name in stored if "lora_A" in name)
    for i, (change, settings) in enumerate([({}, {"r": 3}), ({first: None}, {}), ({first: stored[first][:0]}, {})]):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({name: t for name, t in (stored | change).items() if t is not None},
                  folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))
        with pytest.raises(ValueError, match="do not fit each other, or the config's rank|only updates of linear"):
            adapter_to_gguf(folder, FABLE, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
