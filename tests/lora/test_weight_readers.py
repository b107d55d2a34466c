"""Layers whose weight is read past their forward, and layers that compute something else than x Wᵀ + b."""
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from lora_edu import LoRALinear, LoRASettings, LoRAStack, apply_lora, layers_without_gradient, lora_off, merge_lora
from lora_edu import remove_lora, unmerge_lora
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.targets import weight_readers
from tests.lora.tiny import shake

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Goes past the forward of its layer, as several attention modules do."""

    def __init__(self):
        super().__init__()
        self.read, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.read.weight, self.read.bias))


class Hides(Reads):
    """The same in a way that no code tells."""

    def forward(self, x):
        return self.head(F.linear(x, vars(self)["_modules"]["read"].base_layer.weight))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 5))


def attention():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])
    return Attends()


def mamba():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    return nn.Sequential(model.backbone.layers[0], nn.Linear(16, 3))


def dense(model):
    """Oracle: the base with W₀ + scaling B A written into its weights by hand."""
    plain = copy.deepcopy(model)
    updates = {name: layer.scaling * layer.lora_B @ layer.lora_A for name, layer in lora_layers(plain)}
    remove_lora(plain, merge=False)
    for name, update in updates.items():
        plain.get_submodule(name).weight.data += update.detach()
    return plain


@pytest.mark.parametrize("build", [encoder, attention, mamba, Reads])
def test_the_update_counts_in_train_eval_merged_and_removed(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        base = model(X)
        apply_lora(model, "all-linear", rank=1)
        assert torch.equal(model(X), base)
        shake(model)
        want = dense(model)(X)
    assert (want - base).abs().max() > 0.01
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(training)(X), want, rtol=1e-4, atol=1e-5)
    model(X).square().sum().backward()
    assert not layers_without_gradient(model)
    with lora_off(model):
        torch.testing.assert_close(model(X), base, rtol=1e-4, atol=1e-5)
    merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    remove_lora(model, merge=True)
    with torch.no_grad():
        torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)


def test_the_encoder_takes_its_fused_path_here(monkeypatch):
    """Else the test above would not show anything."""
    calls = []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd",
                        lambda *args, real=torch._transformer_encoder_layer_fwd: calls.append(1) or real(*args))
    model = encoder().eval()
    apply_lora(model, rank=1)
    with torch.no_grad():
        model(X)
    assert len(calls) == 2


def test_who_reads_is_told_by_the_parents_code():
    assert weight_readers(Reads()) == {"read"} and not weight_readers(nn.Sequential(nn.Linear(4, 4)))
    assert {name for name in weight_readers(mamba()) if "dt_proj" in name} == {"0.mixer.dt_proj"}


def test_a_layer_that_no_code_tells_is_found_after_the_backward_pass():
    model = Hides()
    apply_lora(model, ["read", "head"], rank=1)
    model(X).sum().backward()
    assert layers_without_gradient(model) == ["read"]


def test_what_cannot_work_there_is_refused():
    with pytest.raises(ValueError, match="attention.out_proj: attention reads .* dropout=0.1 would do nothing"):
        apply_lora(attention(), ["out_proj"], rank=1, dropout=0.1)
    with pytest.raises(ValueError, match="adapter 0: the layer around read reads the weight"):
        LoRAStack(Reads(), [LoRASettings(rank=1)])


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_forward_of_its_own_is_used_apart_and_not_merged():
    model = nn.Sequential(Own(16, 8), nn.Linear(8, 3)).eval()
    apply_lora(model, ["0"], rank=2, alpha=4)
    shake(model)
    layer = model[0]
    want = model[1](layer.base_layer(X) + 2 * X @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(model(X), want)
    state = copy.deepcopy(model.state_dict())
    for call in (merge_lora, lambda m: remove_lora(m, merge=True)):
        with pytest.raises(ValueError, match="0: a Own has a forward of its own"):
            call(model)
    assert not layer.merged and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    remove_lora(model, merge=False)
    assert type(model[0]) is Own


def test_a_forward_put_on_the_instance_is_its_own_too():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its own"):
        LoRALinear.wrap(layer, rank=1).merge()


@pytest.mark.parametrize("when", ["before", "after", "on the base layer"])
def test_hooks_run_apart_and_merged(when):
    model, calls = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)).eval(), []

    def double(module, inputs, output):
        calls.append(1)
        return output * 2
    handle = model[0].register_forward_hook(double) if when == "before" else None
    apply_lora(model, ["0"], rank=2)
    if handle is None:
        handle = (model[0] if when == "after" else model[0].base_layer).register_forward_hook(double)
    shake(model)
    apart = model(X)
    merge_lora(model)
    merged = model(X)
    assert len(calls) == 2
    if when != "on the base layer":                  # a hook there sees the base's output apart, the sum merged
        torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
    remove_lora(model, merge=True)
    torch.testing.assert_close(model(X), merged, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
    handle.remove()
    model(X)
    assert len(calls) == 3, "the handle knows where its hook has gone"
