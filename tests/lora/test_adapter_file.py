"""Adapters go both ways between us and PEFT, and wrong files are refused where PEFT warns or says nothing."""
import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from lora_edu import (
    LoRALinear,
    apply_lora,
    load_pretrained,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_strength,
    unmerge_lora,
)
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from lora_edu.lora.conv import LoRAConv
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.fingerprint import fingerprint_of
from lora_edu.models.pretrained import BISTRO_ADAPTER
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
    (lambda f: set_key(f, target_modules=["v_porj"]), ValueError, "Did you mean 'v_proj'"),
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


def set_half(model):
    set_strength(model, 0.5)


def set_by_hand(model):
    for _, layer in lora_layers(model):
        layer.scaling = layer.alpha / layer.rank**0.5


def set_two_alphas(model):
    for _, layer in list(lora_layers(model))[::2]:
        layer.alpha, layer.scaling = 32.0, 32.0 / layer.rank


def set_unlike_ranks(model):
    remove_lora(model, merge=False)
    for i, block in enumerate(model.model.layers):
        block.self_attn.q_proj = LoRALinear.wrap(block.self_attn.q_proj, rank=2 + 3 * i, alpha=8)
        block.mlp.up_proj = LoRALinear.wrap(block.mlp.up_proj, rank=4, alpha=5, rslora=bool(i))


@pytest.mark.parametrize("change", [set_half, set_by_hand, set_two_alphas, set_unlike_ranks])
def test_what_the_model_computes_is_what_comes_back(change, tmp_path):
    """Oracles: the model's own logits before saving, and PEFT's of the same files."""
    model = MODELS["transformers' Llama"]().eval()
    apply_lora(model, ["q_proj", "up_proj"], rank=4, alpha=8)
    change(model)
    shake(model)
    save_adapter(model, tmp_path)
    load_adapter(again := MODELS["transformers' Llama"](), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-7)
    theirs = peft.PeftModel.from_pretrained(MODELS["transformers' Llama"](), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


def classifier(seed):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24,
                                                       num_hidden_layers=2, num_attention_heads=2, num_labels=2,
                                                       num_key_value_heads=1, pad_token_id=0))
    torch.manual_seed(seed)
    nn.init.normal_(model.score.weight)          # a head is new in every process
    return model.eval()


@pytest.mark.parametrize("beside", ["score", "model.norm", "model.embed_tokens"])
def test_what_was_trained_beside_the_lora_comes_back(beside, tmp_path):
    """Oracles: the saved model's logits, and PEFT's of the same files."""
    model = classifier(1)
    report = apply_lora(model, "all-linear", rank=2)
    assert report.head == report.left_out == ["score"]
    shake(model)
    model.score.requires_grad_(True)
    module = model.get_submodule(beside).requires_grad_(True)
    with torch.no_grad():
        module.weight += 0.1
    save_adapter(model, tmp_path)
    load_adapter(again := classifier(2), tmp_path)
    assert torch.equal(logits(again), logits(model))
    theirs = peft.PeftModel.from_pretrained(classifier(3), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"score", beside} and config["task_type"] is None


def test_heads_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = classifier(1)
    apply_lora(model, "all-linear", rank=2)
    model.score.requires_grad_(True)
    save_adapter(model, tmp_path)
    other = classifier(2)
    other.score = nn.Linear(16, 3, bias=False)
    before = logits(other)
    with pytest.raises(ValueError, match=r"another shape \(first: score.weight"):
        load_adapter(other, tmp_path)
    assert torch.equal(logits(other), before) and not names(other)
    with pytest.raises(ValueError, match="saves a module 'score' whole, and this LlamaForCausalLM has none"):
        load_adapter(MODELS["transformers' Llama"](), tmp_path)


def test_what_the_format_cannot_hold_is_refused_when_saving(tmp_path):
    model = our_llama()
    apply_lora(model, ["q_proj"], rank=2)
    model.model["layers"][0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="q_proj.base_layer has numbers that train beside the factors"):
        save_adapter(model, tmp_path / "a")
    model.requires_grad_(False)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bf16", None):
        with pytest.raises(ValueError, match="cannot hold an adapter"):
            save_adapter(model, tmp_path / "a", dtype=dtype)
    for value, dtype in ((float("nan"), torch.float32), (1e6, torch.float16)):
        model.model["layers"][1].self_attn.q_proj.lora_B.data[0, 0] = value
        with pytest.raises(ValueError, match="layers.1.self_attn.q_proj.lora_B.weight hold numbers that are not"):
            save_adapter(model, tmp_path / "a", dtype=dtype)
    assert not (tmp_path / "a").exists()


def test_a_model_in_wrappers_is_saved_under_plain_names(tmp_path):
    model = our_llama().eval()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    save_adapter(model, tmp_path / "plain")
    want = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    model.model["layers"][0] = torch.compile(model.model["layers"][0], backend="eager")
    for i, wrapped in enumerate((model, torch.compile(model, backend="eager"), nn.DataParallel(model))):
        save_adapter(wrapped, tmp_path / str(i))
        assert load_file(tmp_path / str(i) / "adapter_model.safetensors").keys() == want.keys()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_known_again_and_another_is_refused(kind, dtype, tmp_path):
    model = MODELS[kind]()
    apply_lora(model, rank=2)
    save_adapter(model, tmp_path)
    assert "fingerprint" not in load_adapter(MODELS[kind]().to(dtype), tmp_path).summary()
    other = MODELS[kind]()
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="made for another base: .* holds other numbers here.*any_base=True"):
        load_adapter(other, tmp_path)
    assert not names(other) and all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
    load_adapter(other, tmp_path, any_base=True)


def test_the_base_of_linear_layers_alone_and_a_vocabulary_that_grew(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False))
    plain = [copy.deepcopy(model) for _ in range(2)]
    apply_lora(model, ["0"], rank=2)
    save_adapter(model, tmp_path / "a")
    load_adapter(plain[0], tmp_path / "a")
    plain[1][0].weight.data += 1
    with pytest.raises(ValueError, match="0.weight holds other numbers"):
        load_adapter(plain[1], tmp_path / "a")
    model = MODELS["transformers' Llama"]()
    apply_lora(model, ["q_proj"], rank=2)
    save_adapter(model, tmp_path / "b")
    grown = MODELS["transformers' Llama"]()
    grown.resize_token_embeddings(57)
    load_adapter(grown, tmp_path / "b")


def test_the_shipped_adapter_knows_fable(tmp_path):
    load_adapter(load_pretrained()[0], BISTRO_ADAPTER)
    other = load_pretrained()[0]
    other.model["embed_tokens"].weight.data.mul_(1.1)
    with pytest.raises(ValueError, match="made for another base: model.embed_tokens.weight"):
        load_adapter(other, BISTRO_ADAPTER)


def test_peft_says_nothing_about_the_fingerprint(saved, recwarn):
    peft.PeftModel.from_pretrained(MODELS["transformers' Llama"](), saved)
    assert not [w for w in recwarn if "fingerprint" in str(w.message) or "lora_edu" in str(w.message)]


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), lambda: nn.Conv1d(3, 5, 4)])
def test_convolutions_are_read_merged_and_taken_out(build, tmp_path):
    """Oracle: PEFT's outputs of the files that it wrote."""
    torch.manual_seed(0)
    base = nn.Sequential(build(), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)[..., :9] if isinstance(base[0], nn.Conv2d) else torch.randn(2, 3, 9)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours, plain = copy.deepcopy(base), base(x)
    load_adapter(ours, tmp_path)
    want = theirs(x)
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    merge_lora(ours)
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    unmerge_lora(ours)
    save_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")(x), want)
    twin = copy.deepcopy(ours)
    remove_lora(twin, merge=True)
    torch.testing.assert_close(twin(x), want, rtol=1e-4, atol=1e-5)
    remove_lora(ours, merge=False)
    assert torch.equal(ours(x), plain)


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_a_name_that_is_the_ending_of_another_keeps_its_own_rank(ranks, tmp_path):
    """Oracle: PEFT, which takes the first pattern that matches an ending."""
    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(6, 6), "b": nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)})})
    model = build()
    for parent, rank in zip((model, model["b"]), ranks, strict=True):
        parent["q"] = LoRALinear.wrap(parent["q"], rank, alpha=rank)
    model["b"]["k"] = LoRALinear.wrap(model["b"]["k"], 2, alpha=3)
    save_adapter(model, tmp_path)
    load_adapter(again := build(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).base_model.model
    for name in ("q", "b.q", "b.k"):
        want = model.get_submodule(name)
        assert torch.equal(again.get_submodule(name).delta_weight(), want.delta_weight())
        assert theirs.get_submodule(name).r["default"] == want.rank
        assert theirs.get_submodule(name).scaling["default"] == want.scaling


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Linear(4, 4),
                                  nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
def test_what_no_two_convolutions_can_stand_beside_is_refused(conv):
    with pytest.raises(TypeError, match="cannot be wrapped: LoRAConv takes convolutions without groups"):
        LoRAConv.wrap(conv, 2)


@pytest.mark.parametrize("size", [1, 2, 33, 2**24 + 1, 49_152 * 576])
def test_a_fingerprint_of_a_large_tensor_takes_numbers_from_its_first_to_its_last(size):
    """Counts above 2**24 have no float32 of their own; one number of each is known by its place."""
    tensor = torch.zeros(size, dtype=torch.bfloat16)
    tensor[0], tensor[-1] = 1.0, 2.0
    (values,) = [values for _, values in json.loads(fingerprint_of({"x": tensor})).values()]
    assert len(values) == min(size, 32) and values[-1] == 2.0 and (size == 1 or values[0] == 1.0)
