"""What no LoRA fits is refused by name, and a call that raises or is stopped has changed nothing."""
import copy
import sys

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lora_edu import (
    LoRALinear,
    LoRASettings,
    LoRAStack,
    apply_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    set_strength,
    unmerge_lora,
)
from lora_edu.lora import inject, merge
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inject import unfreeze_matrices
from tests.lora.tiny import hf_llama, logits, names, our_llama, shake


def state_of(model):
    return ([(name, type(m), id(m)) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
            {name: t.clone().to_dense().contiguous() for name, t in model.state_dict().items() if not t.is_meta},
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()])


def same(before, after):
    return before[0] == after[0] and before[1] == after[1] and before[3] == after[3] and all(
        torch.equal(before[2][name].view(torch.uint8), t.view(torch.uint8)) for name, t in after[2].items())


def of_dtype(dtype):
    def change(layer):
        layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
        return layer
    return change


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


STRANGE = {"weight_norm": weight_norm, "spectral_norm": spectral_norm, "orthogonal": orthogonal, "pruned": pruned,
           "old weight_norm": nn.utils.weight_norm, "meta": lambda layer: layer.to("meta"),
           "sparse": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.to_sparse())) or layer,
           **{str(dtype): of_dtype(dtype) for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64)}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_weight_that_is_no_plain_floating_tensor_is_refused_everywhere(kind):
    model = nn.Sequential(nn.Linear(8, 8), STRANGE[kind](nn.Linear(8, 8)), nn.Linear(8, 3))
    before = state_of(model)
    calls = {"apply_lora": lambda: apply_lora(model, ["0", "1"], rank=2), "unfreeze": lambda: unfreeze_matrices(model),
             "stack": lambda: LoRAStack(model, [LoRASettings(rank=2)]), "wrap": lambda: LoRALinear.wrap(model[1], 2)}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=("" if name == "wrap" else "1: ") + "its weight (is|has)"):
            call()
        assert same(before, state_of(model)), name


@pytest.mark.parametrize("method", [peft.LoraConfig(r=2, target_modules=["q_proj"]),
                                    peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
                                    peft.LoHaConfig(r=2, target_modules=["q_proj"])])
def test_a_model_with_an_adapter_of_peft_is_refused_by_name(method, tmp_path):
    model = hf_llama()
    peft.get_peft_model(model, method)
    before = state_of(model)
    for call in (lambda: apply_lora(model, ["v_proj"]), lambda: unfreeze_matrices(model, ["v_proj"]),
                 lambda: LoRAStack(model, [LoRASettings(rank=2)]), lambda: merge_lora(model),
                 lambda: save_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="adapter of PEFT already, on .*(q|k)_proj.*unload"):
            call()
    assert same(before, state_of(model))


def test_a_layer_of_a_class_that_was_reloaded_is_known():
    model = our_llama()
    apply_lora(model, ["q_proj"])
    old = type("LoRALinear", (nn.Module,), {"__module__": "lora_edu.lora.layer"})
    for _, layer in list(lora_layers(model)):
        layer.__class__ = old
    for call in (lambda: apply_lora(model), lambda: merge_lora(model), lambda: lora_parameters(model)):
        with pytest.raises(ValueError, match="of before lora_edu was reloaded"):
            call()


@pytest.mark.parametrize("rank, alpha, dropout", [
    (np.int64(4), np.float32(8), np.float64(0.0)), (np.int32(4), torch.tensor(8.0), 0),
    (torch.tensor(4), np.int64(8), 0)])
def test_numbers_of_other_makes_are_taken_as_numbers_and_saved(rank, alpha, dropout, tmp_path):
    model = our_llama()
    report = apply_lora(model, ["q_proj"], rank, alpha, dropout)
    layer = model.model["layers"][0].self_attn.q_proj
    assert (layer.rank, layer.alpha, report.scaling) == (4, 8, 2)
    assert all(type(value) in (int, float) for value in (layer.rank, layer.alpha, layer.dropout))
    save_adapter(model, tmp_path)
    assert type(LoRASettings(rank, alpha).alpha) in (int, float)


@pytest.mark.parametrize("wrong", [{"rank": 4.0}, {"rank": True}, {"rank": "4"}, {"rank": np.array([2, 4])},
                                   {"alpha": "16"}, {"alpha": None}, {"alpha": np.nan}, {"alpha": True},
                                   {"dropout": "0.1"}, {"dropout": None}, {"target_modules": "q_proj("},
                                   {"target_modules": None}, {"target_modules": 5}, {"target_modules": [5]}])
def test_arguments_that_are_none_are_refused_in_a_sentence(wrong):
    model = our_llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        apply_lora(model, **({"target_modules": ["q_proj"]} | wrong))
    assert same(before, state_of(model))


def test_a_model_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match="this Sequential has no linear layer"):
        apply_lora(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_a_rank_that_some_layers_are_too_narrow_for_offers_to_leave_them_out():
    with pytest.raises(ValueError, match="Narrower than rank 12 are .*k_proj.*target_modules without them"):
        apply_lora(our_llama(), rank=12)


def test_stacks_of_matrices_are_counted_in_a_sentence():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.head = nn.Parameter(torch.zeros(4, 6, 5)), nn.Linear(6, 4), nn.Linear(5, 2)
    said = apply_lora(Experts(), rank=1).summary()
    assert "120 numbers lie in stacks of matrices that it does not reach: up." in said


class Stop:
    """Raises KeyboardInterrupt at the n-th call of what it stands for."""

    def __init__(self, real, at, after):
        self.real, self.at, self.after, self.calls = real, at, after, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise KeyboardInterrupt
        result = self.real(*args, **kwargs)
        if self.calls == self.at:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("spot", ["wrap", "replace"])
def test_apply_lora_stopped_at_any_layer_has_changed_nothing(spot, at, after, monkeypatch):
    model = our_llama()
    model.model["layers"][0].self_attn.q_proj.register_forward_hook(lambda *args: None)
    before = state_of(model)
    with monkeypatch.context() as patch:
        where = {"wrap": (inject.LoRALinear, "wrap"), "replace": (inject, "replace")}[spot]
        patch.setattr(*where, Stop(getattr(*where), at, after))
        with pytest.raises(KeyboardInterrupt):
            apply_lora(model, ["q_proj", "v_proj"], rank=2)
    assert same(before, state_of(model))
    apply_lora(model, ["q_proj", "v_proj"], rank=2)
    assert len(names(model)) == 4


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("spot", ["folded_weight", "replace"])
def test_remove_lora_stopped_at_any_layer_goes_on_and_adds_nothing_twice(spot, at, after, monkeypatch):
    model = our_llama().eval()
    apply_lora(model, ["q_proj", "v_proj"], rank=2)
    shake(model)
    reference = copy.deepcopy(model)
    remove_lora(reference, merge=True)
    with monkeypatch.context() as patch:
        if spot == "replace":
            patch.setattr(merge, "replace", Stop(merge.replace, at, after))
        else:
            stop = Stop(LoRALinear.folded_weight, at, after)
            patch.setattr(LoRALinear, "folded_weight", lambda layer: stop(layer))
        with pytest.raises(KeyboardInterrupt):
            remove_lora(model, merge=True)
    remove_lora(model, merge=True)
    assert not names(model)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("call", [merge_lora, unmerge_lora])
def test_merging_stopped_on_the_way_can_be_given_again(call, at, monkeypatch):
    """Stopped while the merged weights are handed out, between two layers."""
    model = our_llama().eval()
    apply_lora(model, ["q_proj", "v_proj"], rank=2)
    shake(model)
    if call is unmerge_lora:
        merge_lora(model)
    was, real, count = [layer.merged for _, layer in lora_layers(model)], nn.Module.__setattr__, [0]

    def stop(module, name, value):
        if name == "merged_weight":
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
        real(module, name, value)
    with monkeypatch.context() as patch:
        patch.setattr(LoRALinear, "__setattr__", stop)
        with pytest.raises(KeyboardInterrupt):
            call(model)
    assert [layer.merged for _, layer in lora_layers(model)] == was
    call(model)


def test_the_stack_stopped_on_the_way_has_changed_nothing(monkeypatch):
    model = our_llama()
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["lora_edu.lora.stack"], "replace", Stop(inject.replace, 3, False))
        with pytest.raises(KeyboardInterrupt):
            LoRAStack(model, [LoRASettings(rank=2)])
    assert same(before, state_of(model))


def test_a_merged_layer_follows_load_state_dict():
    """Oracle: a model that was loaded apart and merged then."""
    model, other = our_llama().eval(), our_llama().eval()
    for each in (model, other):
        apply_lora(each, ["q_proj"], rank=2)
    shake(other)
    merge_lora(model)
    model.load_state_dict(other.state_dict())
    merge_lora(other)
    assert torch.equal(logits(model), logits(other))
    broken = other.state_dict() | {"model.layers.0.self_attn.q_proj.lora_B": torch.full((16, 2), torch.nan)}
    with pytest.raises(ValueError, match="not finite"):
        model.load_state_dict(broken)
    assert not model.model["layers"][0].self_attn.q_proj.merged


def test_nothing_that_a_merged_weight_would_not_follow_can_be_set():
    model = our_llama().eval()
    apply_lora(model, ["q_proj"], rank=2)
    factors = {name: t.clone() for name, t in lora_state_dict(model).items()}
    merge_lora(model)
    layer = model.model["layers"][0].self_attn.q_proj
    for call in (lambda: layer.set_strength(0.5), lambda: setattr(layer, "scaling", 1.0),
                 lambda: load_lora_state_dict(model, factors), lambda: set_strength(model, 0.5)):
        with pytest.raises(RuntimeError, match="merged.*unmerge"):
            call()


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.pop(next(iter(t))), "1 tensors are missing"), (lambda t: t.update(x=torch.zeros(2)), "x"),
    (lambda t: t.update({next(iter(t)): torch.zeros(3, 3)}), "another shape"),
    (lambda t: t.update({next(iter(t)): torch.full((2, 16), torch.inf)}), "not finite"),
    (lambda t: t.update({next(iter(t)): torch.zeros(2, 16, dtype=torch.int32)}), "no floating numbers")])
def test_load_lora_state_dict_is_strict(spoil, message):
    model = our_llama()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    before, tensors = state_of(model), {name: torch.zeros_like(t) for name, t in lora_state_dict(model).items()}
    good = dict(tensors)
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        load_lora_state_dict(model, tensors)
    assert same(before, state_of(model))
    load_lora_state_dict(model, good)
    assert not any(p.any() for p in lora_parameters(model))


def test_wrappers_are_looked_through():
    """Oracle: the same model without the wrapper."""
    plain, model = our_llama(), our_llama()
    apply_lora(plain, ["q_proj"], rank=2)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        apply_lora(wrapped, ["q_proj"], rank=2)
        assert names(model) == names(plain) and len(lora_parameters(wrapped)) == 4
        assert set(lora_state_dict(wrapped)) == set(lora_state_dict(plain))
        remove_lora(wrapped, merge=False)
        assert not names(model)
    model.model["layers"][0].self_attn = torch.compile(model.model["layers"][0].self_attn, backend="eager")
    assert len(apply_lora(model, r"model\.layers\.\d\.self_attn\.q_proj", rank=2).matched) == 2
    assert set(lora_state_dict(model)) == set(lora_state_dict(plain))


def test_a_base_that_is_offloaded_before_or_after_is_refused(tmp_path):
    """accelerate leaves the weights on the meta device, and brings them when a layer is called."""
    model = cpu_offload(hf_llama(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="q_proj: its weight has no values .*meta"):
        apply_lora(model, ["q_proj"], rank=2)
    model = hf_llama()
    apply_lora(model, ["q_proj"], rank=2)
    model = cpu_offload(model.eval(), execution_device=torch.device("cpu"))
    for call in (lambda: merge_lora(model), lambda: remove_lora(model, merge=True)):
        with pytest.raises(ValueError, match="q_proj: its weight has no values .*meta"):
            call()
    with pytest.raises(ValueError, match="q_proj.lora_A.weight.* have no values"):
        save_adapter(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
