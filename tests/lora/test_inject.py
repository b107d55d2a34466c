"""apply_lora, merge_lora, unmerge_lora, remove_lora on whole models: ours, transformers' GPT-2 and Llama, plain
ones.
"""
import copy

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from lora_edu import LoRALinear, apply_lora, lora_parameters, lora_state_dict, merge_lora, remove_lora, unmerge_lora
from lora_edu.lora.inject import share_weights
from lora_edu.lora.merge import set_strength
from tests.lora.tiny import MODELS, hf_llama, logits, names, our_llama, shake


def peft_matches(model, target_modules):
    config = peft.LoraConfig(r=2, target_modules=target_modules, fan_in_fan_out=isinstance(model, GPT2LMHeadModel))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    return {name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("kind, targets", [
    ("transformers' Llama", ["q_proj", "v_proj"]), ("transformers' Llama", ["layers.0.self_attn.q_proj"]),
    ("transformers' Llama", r".*\.1\.mlp\.(up|down)_proj"), ("transformers' Llama", "all-linear"),
    ("GPT-2", ["c_attn"]), ("GPT-2", ["c_proj"]), ("GPT-2", "all-linear"),
])
def test_the_same_layers_match_as_in_peft(kind, targets):
    """Oracle: PEFT's matching on the same model."""
    model = MODELS[kind]()
    want = peft_matches(model, targets)
    apply_lora(model, targets, rank=2)
    assert names(model) == want


def test_all_linear_leaves_the_output_head_out_on_any_model():
    model = our_llama(tied=False)
    report = apply_lora(model, "all-linear", rank=2)
    assert len(names(model)) == 14 and report.left_out == ["lm_head"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    apply_lora(plain, rank=2)
    assert names(plain) == {"0", "2"}


@pytest.mark.parametrize("kind", MODELS)
def test_a_fresh_adapter_changes_nothing_and_only_factors_train(kind):
    model = MODELS[kind]()
    before = logits(model)
    apply_lora(model, "all-linear", rank=3, alpha=5)
    assert torch.equal(logits(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{f}" for n in names(model) for f in "AB"}
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", MODELS)
def test_merge_unmerge_remove(kind):
    """Merged = unmerged up to rounding; unmerged and removed (merge=False) are the old bits; removed (merge=True) =
    merged, to the bit.
    """
    model = MODELS[kind]().eval()
    plain, weights = logits(model), copy.deepcopy(model.state_dict())
    tree = [(name, type(module)) for name, module in model.named_modules()]
    apply_lora(model, "all-linear", rank=3, alpha=5)
    shake(model)
    apart = logits(model)
    assert (apart - plain).abs().max() > 1e-2
    merge_lora(model)
    merged = logits(model)
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(logits(model), apart)

    twin = copy.deepcopy(model)
    remove_lora(twin, merge=True)
    assert torch.equal(logits(twin), merged)
    assert [(name, type(module)) for name, module in twin.named_modules()] == tree
    remove_lora(model, merge=False)
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_remove_while_merged_gives_the_merged_or_the_old_weights():
    for merge in (True, False):
        model = our_llama().eval()
        plain = logits(model)
        apply_lora(model, rank=2)
        shake(model)
        merge_lora(model)
        want = logits(model) if merge else plain
        remove_lora(model, merge=merge)
        assert torch.equal(logits(model), want)


def test_the_report_counts_what_numel_counts():
    model = our_llama()
    report = apply_lora(model, ["q_proj", "down_proj"], rank=3, alpha=6)
    assert report.trainable == sum(p.numel() for p in model.parameters()
                                   if p.requires_grad) == 2 * 3 * ((16 + 16) + (16 + 24))
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.adapter_bytes == 4 * report.trainable and report.merge_bytes == 4 * 2 * (16 * 16 + 16 * 24)
    assert report.scaling == 2 and report.matched["model.layers.0.mlp.down_proj"] == (16, 24)
    assert f"{report.trainable:,}" in str(report) and "q_proj" in str(report) and "<table>" in report._repr_html_()


def test_peft_counts_the_same():
    model = hf_llama()
    theirs = peft.get_peft_model(copy.deepcopy(model),
                                 peft.LoraConfig(r=3, target_modules="all-linear")).get_nb_trainable_parameters()
    report = apply_lora(model, rank=3)
    assert (report.trainable, report.total) == theirs


def test_the_state_dict_goes_round():
    model = our_llama()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    saved = {k: v.clone() for k, v in lora_state_dict(model).items()}
    assert set(saved) == {f"model.layers.{i}.self_attn.q_proj.lora_{f}" for i in (0, 1) for f in "AB"}
    other = our_llama()
    apply_lora(other, ["q_proj"], rank=2)
    missing = other.load_state_dict(saved, strict=False)
    assert not missing.unexpected_keys and torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("targets, message", [
    (["q_proj", "v_porj"], "'v_porj' matches no linear layer. Did you mean 'v_proj'"),
    (["embed_tokens"], "'embed_tokens' matches no linear layer"),
    (["xyz"], "endings here are q_proj"),
    ("q_proj", "regular expression for whole names"),
    ([], "empty"),
])
def test_targets_that_match_nothing_are_named(targets, message):
    model = our_llama()
    with pytest.raises(ValueError, match=message):
        apply_lora(model, targets)
    assert not names(model) and all(p.requires_grad for p in model.parameters())


def test_a_tied_weight_is_refused_by_name():
    with pytest.raises(ValueError, match="embed_tokens.weight and lm_head.weight are one tensor"):
        apply_lora(our_llama(tied=True), ["lm_head"])
    with pytest.raises(ValueError, match="tied"):
        apply_lora(hf_llama(tied=True), ["lm_head"])
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="0.weight and 1.weight"):
        apply_lora(shared)


def test_a_layer_used_in_two_places_is_tied_too():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="tied"):
        apply_lora(nn.ModuleDict({"a": layer, "b": layer, "head": nn.Linear(4, 4)}), ["a"])


def test_a_second_wrapping_is_refused():
    model = our_llama()
    apply_lora(model, ["q_proj"])
    with pytest.raises(ValueError, match="has LoRA already.*remove_lora"):
        apply_lora(model, ["v_proj"])


def test_a_rank_too_large_for_one_layer_names_it_and_changes_nothing():
    model = our_llama()
    with pytest.raises(ValueError, match=r"k_proj: rank=12 does not fit a 8 x 16"):
        apply_lora(model, rank=12)
    assert not names(model) and all(p.requires_grad for p in model.parameters())


def test_a_model_that_is_one_linear_layer_is_refused():
    with pytest.raises(ValueError, match="LoRALinear.wrap"):
        apply_lora(nn.Linear(4, 4), [""])
    with pytest.raises(ValueError, match="output head"):
        apply_lora(nn.Sequential(nn.Linear(4, 4)))


def test_a_non_finite_update_anywhere_leaves_the_whole_model_as_it_was():
    model = our_llama().eval()
    apply_lora(model, rank=2)
    shake(model)
    before = copy.deepcopy(model.state_dict())
    lora_parameters(model)[-1].data[0, 0] = float("nan")
    for attempt in (lambda: merge_lora(model), lambda: remove_lora(model, merge=True)):
        with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: .*not finite"):
            attempt()
        assert names(model) and not any(m.merged for m in model.modules() if isinstance(m, LoRALinear))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "lora_" not in k)


def test_merge_twice_unmerge_apart_and_models_without_lora_are_refused():
    model = our_llama()
    for call in (merge_lora, unmerge_lora, lora_parameters, lora_state_dict, lambda m: remove_lora(m, merge=True)):
        with pytest.raises(ValueError, match="apply_lora"):
            call(model)
    apply_lora(model)
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="merged already"):
        merge_lora(model)


def test_strength_is_a_dial_from_the_base_to_the_adapter():
    """Oracle: the update of a dense matrix, times the strength."""
    model = our_llama().eval()
    plain = logits(model)
    apply_lora(model, ["q_proj"], rank=2, alpha=6)
    shake(model)
    layer = model.model["layers"][0].self_attn.q_proj
    full = 3 * layer.lora_B @ layer.lora_A
    for strength in (0.0, 0.5, -1.0, 1.0):
        set_strength(model, strength)
        torch.testing.assert_close(layer.delta_weight(), strength * full)
    set_strength(model, 0.0)
    assert torch.equal(logits(model), plain)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        set_strength(model, 0.5)


def test_wrapping_keeps_each_layers_mode():
    model = our_llama().eval()
    apply_lora(model)
    assert not any(m.training for m in model.modules())


def test_shared_weights_are_one_storage_under_two_models():
    model = our_llama()
    twin = share_weights(model)
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (
            ours is not theirs
            and ours.data_ptr() == theirs.data_ptr()
            and theirs.requires_grad
            and not ours.requires_grad
        ), name
    assert twin.lm_head.weight is twin.model["embed_tokens"].weight, "what was tied stays tied"
    apply_lora(twin)
    assert names(twin) and not names(model)
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)
