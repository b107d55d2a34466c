"""LoRALinear against one dense matrix, PEFT and loralib; what it refuses; what a merge may not do."""
import copy

import loralib
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu import LoRALinear


def linear(in_features=12, out_features=8, bias=True):
    return nn.Linear(in_features, out_features, bias=bias)


BASES = {
    "linear": lambda: linear(12, 8),
    "no bias": lambda: linear(12, 8, bias=False),
    "square": lambda: linear(9, 9),          # a transposed square layer would go unnoticed elsewhere
    "conv1d": lambda: Conv1D(8, 12),         # transformers' Conv1D(out, in) stores (in, out)
    "square conv1d": lambda: Conv1D(9, 9),
}


def trained(base, rank=3, alpha=5.0, dtype=torch.float64, **how):
    """A layer whose B is not zero: with B = 0 a wrong forward would pass."""
    layer = LoRALinear.wrap(base.to(dtype), rank, alpha, **how)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank, alpha", [(1, 3.0), (4, 8.0), (8, 2.0)])  # never alpha == rank
def test_forward_equals_one_dense_matrix(base, rank, alpha):
    """Oracle: fold the update into a single matrix, by a sum of outer products, and multiply once."""
    torch.manual_seed(0)
    layer = trained(BASES[base](), rank, alpha)
    W = layer.weight.T if "conv1d" in base else layer.weight
    dense = W + alpha / rank * sum(torch.outer(layer.lora_B[:, i], layer.lora_A[i]) for i in range(rank))
    x = torch.randn(5, 3, layer.in_features, dtype=torch.float64)
    want = x @ dense.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.delta_weight(), dense - W)


class PeftModel(nn.Module):
    """The smallest model PEFT can wrap."""

    def __init__(self, base):
        super().__init__()
        self.proj = base

    def forward(self, x):
        return self.proj(x)


def peft_layer(base, rank, alpha):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"], fan_in_fan_out=isinstance(base, Conv1D))
    return peft.get_peft_model(PeftModel(base), config)


def loralib_layer(base, rank, alpha):
    if isinstance(base, Conv1D):
        layer = loralib.Linear(*base.weight.shape, r=rank, lora_alpha=alpha, fan_in_fan_out=True, merge_weights=False)
        layer.weight.data = base.weight.data.clone()
    else:
        layer = loralib.Linear(base.in_features, base.out_features, r=rank, lora_alpha=alpha,
                               bias=base.bias is not None)
        layer.weight.data = base.weight.data.clone()
    if base.bias is not None:
        layer.bias.data = base.bias.data.clone()
        layer.bias.requires_grad_(False)
    return layer.double()


def factors(other, kind):
    if kind == "peft":
        proj = other.base_model.model.proj
        return proj.lora_A["default"].weight, proj.lora_B["default"].weight
    return other.lora_A, other.lora_B


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["peft", "loralib"])
def test_outputs_gradients_and_20_adamw_steps_equal_those_of(kind, base):
    """Oracle: the two established implementations on the same tensors, in float64 to 1e-10."""
    torch.manual_seed(0)
    rank, alpha = 4, 11
    layer = trained(BASES[base](), rank, alpha)
    twin_base = copy.deepcopy(layer.base_layer)
    other = (peft_layer if kind == "peft" else loralib_layer)(twin_base, rank, alpha).double()
    A, B = factors(other, kind)
    A.data, B.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
    close = {"rtol": 0, "atol": 1e-10}

    optimizers = [torch.optim.AdamW(p, lr=1e-2) for p in ([layer.lora_A, layer.lora_B], [A, B])]
    for _ in range(20):
        x, target = torch.randn(6, layer.in_features, dtype=torch.float64), torch.randn(6, layer.out_features,
                                                                                        dtype=torch.float64)
        for module, optimizer in zip((layer, other), optimizers):
            optimizer.zero_grad()
            y = module(x)
            ((y - target) ** 2).mean().backward()
            if module is layer:
                ours = y
        torch.testing.assert_close(ours, y, **close)
        torch.testing.assert_close(layer.lora_A.grad, A.grad, **close)
        torch.testing.assert_close(layer.lora_B.grad, B.grad, **close)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(layer.lora_A, A, **close)
    torch.testing.assert_close(layer.lora_B, B, **close)


def test_a_new_layer_returns_what_its_base_returns():
    base = linear()
    want = base(x := torch.randn(4, 12))
    assert torch.equal(LoRALinear.wrap(base)(x), want)


def test_the_classs_own_base_is_frozen_and_random():
    layer = LoRALinear(12, 8, rank=2, alpha=6)
    assert layer.scaling == 3 and layer.weight.shape == (8, 12) and layer.weight.std() > 0
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.shape == (2, 12) and layer.lora_B.shape == (8, 2)


def test_A_is_kaiming_uniform_as_in_loralib():
    torch.manual_seed(0)
    A = LoRALinear(400, 100, rank=50).lora_A
    bound = 400**-0.5                      # kaiming_uniform with a = sqrt(5): U(-1/sqrt(in), 1/sqrt(in))
    assert A.abs().max() <= bound and abs(A.std().item() - bound / 3**0.5) < 0.02 * bound


def test_only_the_factors_get_gradients():
    layer = trained(linear())
    layer(torch.randn(2, 12, dtype=torch.float64)).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (1, 1, 12), (2, 3, 4, 12)])
def test_input_shapes(shape):
    layer = trained(linear())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_16_bit_base_with_float32_factors_equals_peft(low):
    """Oracle: PEFT's cast rules; same bits, not merely close."""
    torch.manual_seed(0)
    layer = trained(linear(32, 32), 4, 6, dtype=low)
    assert layer.lora_A.dtype == torch.float32
    other = peft_layer(copy.deepcopy(layer.base_layer), 4, 6)
    for mine, theirs in zip((layer.lora_A, layer.lora_B), factors(other, "peft")):
        theirs.data = mine.data.clone()
    x = torch.randn(7, 32).to(low)
    y = layer(x)
    assert y.dtype == low
    torch.testing.assert_close(y, other(x), rtol=torch.finfo(low).eps, atol=1e-6)   # one rounding at the end


def test_autocast_makes_the_numbers_of_peft_and_the_same_gradients():
    """Oracle: PEFT, which widens the input and lets autocast narrow it again."""
    torch.manual_seed(0)
    layer = trained(linear(32, 32), 4, 6, dtype=torch.bfloat16)
    other = peft_layer(copy.deepcopy(layer.base_layer), 4, 6)
    theirs = factors(other, "peft")
    for mine, its in zip((layer.lora_A, layer.lora_B), theirs):
        its.data = mine.data.clone()
    x = torch.randn(7, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, reference = layer(x), other(x)
        (ours.float() ** 2).sum().backward()
        (reference.float() ** 2).sum().backward()
    torch.testing.assert_close(ours, reference, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)
    for mine, its in zip((layer.lora_A, layer.lora_B), theirs):
        assert (mine.grad - its.grad).norm() < 0.01 * its.grad.norm()


def test_autocast_gives_16_bits_and_stays_near():
    layer = trained(linear(32, 16), dtype=torch.float32)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_dropout_only_in_training_and_on_the_update_only():
    torch.manual_seed(0)
    layer = trained(linear(), dropout=0.5)
    x = torch.randn(3, 12, dtype=torch.float64)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta_weight()).T + layer.bias)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    average = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(average, layer.eval()(x), rtol=0, atol=0.25)
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer.train()(x), layer.base_layer(x))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}


@settings(max_examples=40, deadline=None)
@given(in_features=st.integers(1, 12), out_features=st.integers(1, 12), data=st.data(), alpha=st.floats(-8, 8),
       dtype=st.sampled_from(list(TOLERANCE)), conv=st.booleans(), bias=st.booleans())
def test_merged_equals_unmerged(in_features, out_features, data, alpha, dtype, conv, bias):
    torch.manual_seed(0)
    rank = data.draw(st.integers(1, min(in_features, out_features)))
    base = Conv1D(out_features, in_features) if conv else linear(in_features, out_features, bias)
    layer = trained(base, rank, alpha, dtype).eval()
    x = torch.randn(3, in_features).to(dtype)
    with torch.no_grad():
        apart = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), apart, rtol=TOLERANCE[dtype],
                                   atol=TOLERANCE[dtype] * max(1.0, apart.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unmerge_restores_the_bits_after_1000_cycles_with_a_changing_adapter(dtype):
    layer = trained(linear(16, 16), dtype=dtype).eval()
    before = layer.weight.clone()
    for _ in range(1000):
        layer.lora_B.data.normal_()
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_merged_or_not_the_state_dict_is_the_same_and_the_merged_weight_moves_with_the_layer():
    layer = trained(linear(), dtype=torch.float32)
    apart = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    assert layer.state_dict().keys() == apart.keys()
    assert all(torch.equal(v, apart[k]) for k, v in layer.state_dict().items())
    assert layer.double().merged_weight.dtype == torch.float64


def test_training_a_merged_layer_is_refused_and_says_what_to_do():
    layer = trained(linear())
    layer.merge()
    x = torch.randn(2, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"unmerge\(\), or eval\(\)"):
        layer.train()(x)
    with torch.no_grad():
        layer.train()(x)
    layer.eval()(x)
    layer.unmerge()
    layer.train()(x)


def test_merge_twice_and_unmerge_of_what_is_apart_are_refused():
    layer = trained(linear())
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_update_is_not_merged(bad):
    layer = trained(linear())
    before = layer.weight.clone()
    layer.lora_A.data[0, 0] = bad
    with pytest.raises(ValueError, match="not finite.*smaller learning rate"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, before)


def test_a_sum_that_overflows_16_bits_is_not_merged():
    layer = trained(linear(), dtype=torch.float16)
    layer.lora_B.data.fill_(1e4)
    layer.lora_A.data.fill_(1e3)
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()


@pytest.mark.parametrize("rank", [0, -1, 9, 2.0, True, "4"])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank=.*8 x 12 weight.*1 <= rank <= 8"):
        LoRALinear(12, 8, rank=rank)
    with pytest.raises(ValueError, match=r"1 <= rank <= 8"):
        LoRALinear.wrap(linear(), rank=rank)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(alpha):
    with pytest.raises(ValueError, match="not finite"):
        LoRALinear(12, 8, alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_share_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout"):
        LoRALinear(12, 8, dropout=dropout)


def test_wrapping_twice_and_wrapping_other_layers_are_refused():
    with pytest.raises(ValueError, match="already"):
        LoRALinear.wrap(LoRALinear(12, 8))
    with pytest.raises(TypeError, match="Embedding.*nn.Linear"):
        LoRALinear.wrap(nn.Embedding(5, 4))


def test_rslora_is_pefts():
    """Oracle: PEFT's `use_rslora`, at a rank where alpha / rank and alpha / sqrt(rank) differ."""
    base = linear()
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)),
                                 peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=True))
    ours = LoRALinear.wrap(base, rank=4, alpha=6, rslora=True)
    nn.init.normal_(ours.lora_B)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = ours.lora_A.data, ours.lora_B.data
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.scaling == layer.scaling["default"] == 3 and "rslora=True" in repr(ours)
    ours.set_strength(0.5)
    assert ours.scaling == 1.5
