"""Llama against transformers.LlamaForCausalLM on the same folder; cached against uncached; a published checkpoint."""
import json
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama import modeling_llama

from lora_edu.models.llama import Llama, LlamaConfig

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZES = dict(vocab_size=97, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=64)
CONFIGS = {
    "as many key heads as query heads, tied": SIZES | dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
                                                           tie_word_embeddings=True),
    "grouped queries, untied": SIZES
    | dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False),
    "one key head, wide heads, other theta": SIZES
    | dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
                                                          rope_parameters={"rope_type": "default",
                                                                           "rope_theta": 500_000.0},
                                                          rms_norm_eps=1e-5, tie_word_embeddings=False),
}


def reference(folder, dtype=torch.float32):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(params=CONFIGS, scope="module")
def hf_folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS[request.param]))
    for parameter in model.parameters():      # the default 0.02 makes logits so small that most mistakes hide
        nn.init.normal_(parameter, std=0.1) if parameter.ndim == 2 else nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def ids(model, batch=2, time=40):
    return torch.randint(model.config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_equal_transformers_in_float32(hf_folder):
    ours, theirs = Llama.from_folder(hf_folder), reference(hf_folder)
    x = ids(ours)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_equal_transformers_in_float64(hf_folder, monkeypatch):
    """transformers runs RMSNorm in float32 whatever the weights; patched to keep float64, the two agree to 1e-10."""
    ours, theirs = Llama.from_folder(hf_folder, torch.float64), reference(hf_folder, torch.float64)
    x = ids(ours)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-6, atol=1e-6)

    def norm(self, h):
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_bfloat16_computes_in_bfloat16(hf_folder):
    ours, theirs = Llama.from_folder(hf_folder, torch.bfloat16), reference(hf_folder, torch.bfloat16)
    x = ids(ours)
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0.05, atol=0.2)


@torch.no_grad()
def test_transformers_reads_the_folder_we_write(hf_folder, tmp_path):
    ours = Llama.from_folder(hf_folder)
    ours.save_folder(tmp_path)
    x = ids(ours)
    torch.testing.assert_close(reference(tmp_path)(x).logits, ours(x), rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob("*.part"))


@torch.no_grad()
def test_a_sharded_folder_gives_the_same_model(hf_folder, tmp_path):
    whole = Llama.from_folder(hf_folder)
    reference(hf_folder).save_pretrained(tmp_path, max_shard_size="30kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(Llama.from_folder(tmp_path)(ids(whole)), whole(ids(whole)))


@torch.no_grad()
def test_cached_logits_equal_uncached_in_pieces_of_any_size(hf_folder):
    model = Llama.from_folder(hf_folder, torch.float64)
    x = ids(model)
    cache, pieces = model.new_cache(), []
    for piece in x.split([1, 7, 1, 1, 20, 10], dim=1):
        pieces.append(model(piece, cache))
    torch.testing.assert_close(torch.cat(pieces, 1), model(x), rtol=1e-10, atol=1e-10)


def test_cached_generation_equals_uncached_token_by_token(hf_folder):
    model = Llama.from_folder(hf_folder, torch.float64)
    prompt = ids(model, time=7)
    for how in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_k": 5, "seed": 4}):
        cached = list(model.stream(prompt, 30, **how))
        again = list(model.stream(prompt, 30, use_cache=False, **how))
        assert all(torch.equal(a, b) for a, b in zip(cached, again, strict=True))


def test_greedy_text_equals_transformers_generate(hf_folder):
    ours, theirs = Llama.from_folder(hf_folder, torch.float64), reference(hf_folder, torch.float64)
    prompt = ids(ours, batch=1, time=5)
    want = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, 12, temperature=0), want)


def small():
    torch.manual_seed(0)
    return Llama(LlamaConfig(**SIZES, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)).eval()


def test_sampling_follows_seed_temperature_and_top_k():
    model, prompt = small(), torch.zeros(400, 1, dtype=torch.long)
    a, b, c = (model.generate(prompt, 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with torch.no_grad():
        likeliest = model(prompt[:1])[0, -1].topk(4).indices.tolist()
    drawn = model.generate(prompt, 1, top_k=4, temperature=2.0, seed=0)[:, 1].tolist()
    assert set(drawn) == set(likeliest)
    assert set(model.generate(prompt, 1, top_k=1, seed=0)[:, 1].tolist()) == {likeliest[0]}


def test_sampled_frequencies_are_the_models_probabilities():
    model, prompt = small(), torch.zeros(4000, 1, dtype=torch.long)
    model.lm_head.weight.data *= 20                  # far from uniform, so that a lost temperature shows
    with torch.no_grad():
        want = (model(prompt[:1])[0, -1] / 0.5).softmax(-1)
    drawn = model.generate(prompt, 1, temperature=0.5, seed=0)[:, 1]
    torch.testing.assert_close(torch.bincount(drawn, minlength=97) / 4000, want, rtol=0, atol=0.03)


def test_rows_stop_at_the_stop_token_and_stay_there():
    model, prompt = small(), torch.arange(8)[:, None]
    free = model.generate(prompt, 30, seed=0)
    stop = free[0, 5].item()
    stopped = model.generate(prompt, 30, seed=0, stop_token=stop)
    for row, unstopped in zip(stopped, free):
        where = (unstopped[1:] == stop).nonzero()
        end = where[0].item() + 1 if len(where) else stopped.shape[1]
        assert torch.equal(row[:end], unstopped[:end]) and (row[end:] == stop).all()


def test_a_stream_leaves_gradients_on_between_tokens():
    for _ in small().stream(torch.zeros(1, 1, dtype=torch.long), 2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("call, message", [
    (lambda m: m(torch.zeros(5, dtype=torch.long)), r"ids\[None\]"),
    (lambda m: m(torch.zeros(1, 65, dtype=torch.long)), "65 tokens do not fit a context of 64"),
    (lambda m: m.generate(torch.zeros(1, 60, dtype=torch.long), 5), "at most 4 new tokens"),
    (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.long), 5), "at least one token"),
    (lambda m: m.generate(torch.zeros(1, 1, dtype=torch.long), 5, temperature=-1), "temperature=-1"),
    (lambda m: m.generate(torch.zeros(1, 1, dtype=torch.long), 5, top_k=0), "top_k=0"),
    (lambda m: LlamaConfig(**SIZES, hidden_size=32, num_attention_heads=4, num_key_value_heads=3), "divides"),
    (lambda m: LlamaConfig(**SIZES, hidden_size=12, num_attention_heads=4, num_key_value_heads=4), "odd"),
])
def test_bad_calls_say_what_fits(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


@pytest.mark.parametrize("change, message", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling 'llama3'"),
    ({"model_type": "gpt2"}, "'gpt2'"), ({"hidden_act": "gelu"}, "'gelu'"), ({"hidden_size": None}, "hidden_size"),
])
def test_unsupported_configs_are_refused_by_name(change, message, tmp_path):
    small().save_folder(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        Llama.from_folder(tmp_path)


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("spoil, error, message", [
    (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), ValueError,
     "damaged"),
    (lambda f: (f / "model.safetensors").write_bytes(b"not tensors"), ValueError, "damaged"),
    (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), ValueError, "missing .'model.norm.weight'"),
    (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))), ValueError, "not expected .'extra'"),
    (lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(3)})), ValueError, r"is \(3,\)"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), ValueError,
     "in the folder itself"),
    (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(
        [n for n, _ in small().named_parameters()], "gone.safetensors")})), FileNotFoundError, "gone.safetensors"),
])
def test_damaged_folders_say_what_is_wrong(spoil, error, message, tmp_path):
    small().save_folder(tmp_path)
    Llama.from_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        Llama.from_folder(tmp_path)


def test_loaded_weights_train_and_a_tied_head_is_one_tensor(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True)
    Llama(config).save_folder(tmp_path)
    model = Llama.from_folder(tmp_path)
    assert model.lm_head.weight is model.model["embed_tokens"].weight and not model.training
    model(ids(model)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- a real, published checkpoint in llama2.c's format, converted here ----

def llama2c_folder(source: Path, folder: Path) -> None:
    """stories260K.bin: seven int32, then float32 tensors in a fixed order.

    Its rotary pairs are neighbours (2i, 2i+1).
    """
    raw = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    numbers = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    at = 0

    def take(*shape):
        nonlocal at
        size = torch.Size(shape).numel()
        at += size
        return numbers[at - size:at].view(shape)

    def halves(w, n):         # neighbouring rotary pairs -> Hugging Face's two halves
        return w.view(layers, n, dim // heads // 2, 2, dim).transpose(2, 3).reshape(layers, -1, dim)

    kv = dim // heads * kv_heads
    embed, norm1 = take(vocab, dim), take(layers, dim)
    q, k = halves(take(layers, dim, dim), heads), halves(take(layers, kv, dim), kv_heads)
    v, o = take(layers, kv, dim), take(layers, dim, dim)
    norm2, gate, down, up = take(layers, dim), take(layers, hidden, dim), take(layers, dim, hidden), take(layers,
                                                                                                          hidden, dim)
    config = LlamaConfig(vocab, dim, hidden, layers, heads, kv_heads, length, rms_norm_eps=1e-5,
                         tie_word_embeddings=True)
    model = Llama(config)
    state = {"model.embed_tokens.weight": embed, "lm_head.weight": embed, "model.norm.weight": take(dim)}
    for i in range(layers):
        state |= {f"model.layers.{i}.{name}.weight": w[i] for name, w in {
            "input_layernorm": norm1, "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": o,
            "post_attention_layernorm": norm2, "mlp.gate_proj": gate, "mlp.down_proj": down, "mlp.up_proj": up}.items()}
    model.load_state_dict(state)
    model.save_folder(folder)


def pieces(source: Path, vocab: int) -> list[bytes]:
    raw, at, found = source.read_bytes(), 4, []
    for _ in range(vocab):
        _, size = struct.unpack("fi", raw[at:at + 8])
        found.append(raw[at + 8:at + 8 + size])
        at += 8 + size
    return found


EXPECTED_TALE = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One "
                 "day, she saw a big, red ball. She wanted to play with it, but it was too high.")


def test_a_published_llama_tells_a_tale(tmp_path):
    """stories260K (Karpathy's TinyStories model): converted to a folder, its greedy text is a sensible tale, stored
    here.
    """
    source = SHARED / "stories260K"
    if not source.is_dir():
        pytest.skip("needs the checkpoint shared/data/stories260K beside the project")
    llama2c_folder(source / "stories260K.bin", tmp_path)
    model = Llama.from_folder(tmp_path)
    text = pieces(source / "tok512.bin", model.config.vocab_size)
    said = model.generate(torch.tensor([[1]]), 80, temperature=0)[0, 1:].tolist()     # 1 begins a text
    assert b"".join(text[i] for i in said).decode().strip().startswith(EXPECTED_TALE)
    x = torch.tensor([said])
    with torch.no_grad():
        torch.testing.assert_close(reference(tmp_path)(x).logits, model(x), rtol=1e-4, atol=1e-4)
