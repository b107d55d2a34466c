"""Four bits: bitsandbytes' numbers (a stored run of it, on a CPU), LoRA beside them, and what a merge may write."""
import base64
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_edu import (LoRALinear, apply_lora, lora_state_dict, merge_lora, remove_lora, save_adapter, load_adapter,
                      unmerge_lora)
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.quantized import plain_layer
from lora_edu.measure.memory import NF4_DOUBLE
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.quantize import (QuantLinear, dequantize_nf4, dynamic_values, nf4_values, quantize_, quantize_int8,
                                      quantize_nf4)
from lora_edu.training.loop import loss_on

THEIRS = json.loads((Path(__file__).parent / "bitsandbytes.json").read_text(encoding="utf-8"))
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def unpacked(name: str, dtype) -> torch.Tensor:
    return torch.tensor(np.frombuffer(base64.b64decode(THEIRS[name]), dtype))


def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return 0.02 * torch.randn(96, 200)


def model(tied: bool = False) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(50, 64, 96, 2, 4, 2, 32, tie_word_embeddings=tied)).eval()


IDS = torch.arange(24).view(2, 12)


# -- the numbers of bitsandbytes ---------------------------------------------------------------------------------------

def test_the_values_are_theirs():
    assert torch.allclose(nf4_values(), torch.tensor(THEIRS["values"]), atol=2e-7) and nf4_values()[7] == 0
    assert torch.equal(dynamic_values(), torch.tensor(THEIRS["dynamic"])) and len(dynamic_values().unique()) == 256


def test_the_codes_are_theirs_and_the_weight_that_comes_back():
    """Codes without an exception; the largest entries in eight bits differ by one place in two of a thousand."""
    ours = quantize_nf4(weight())
    assert torch.equal(ours["codes"], unpacked("codes", np.uint8))
    largest = unpacked("largest", np.uint8)
    assert len(ours["largest"]) == len(largest) == 300 and (ours["largest"] != largest).float().mean() < 0.02
    assert (ours["largest"].int() - largest.int()).abs().max() <= 1
    assert float(ours["offset"]) == pytest.approx(THEIRS["offset"], rel=1e-6)
    assert torch.allclose(ours["scales"], torch.tensor(THEIRS["scales"]), rtol=1e-6)
    back, theirs = dequantize_nf4(**ours, shape=(96, 200)), unpacked("dequantised", np.float16).view(96, 200).float()
    assert (back - theirs).norm() / theirs.norm() < 1e-3
    assert 0.08 < (back - weight()).norm() / weight().norm() < 0.1, "NF4's error on a Gaussian"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 1), (10, 100), (33, 65)])
def test_any_shape_comes_back_in_its_shape(shape):
    """Blocks that are not full, an odd number of codes."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored = quantize_nf4(numbers)
    back = dequantize_nf4(**stored, shape=shape)
    assert back.shape == shape and len(stored["codes"]) == (numbers.numel() + 1) // 2
    block = numbers.flatten()[:64]
    assert (back.flatten()[:64] - block).abs().max() < 0.2 * block.abs().max()


def test_zeros_stay_zeros():
    assert not dequantize_nf4(**quantize_nf4(torch.zeros(8, 64)), shape=(8, 64)).any()
    assert not QuantLinear(nn.Linear(4, 4, bias=False).requires_grad_(False), "int8").weight.isnan().any()


def test_int8_is_off_by_half_a_step_at_most():
    stored = quantize_int8(weight())
    off = (stored["codes"].float() * stored["scales"] - weight()).abs()
    assert (off <= stored["scales"] / 2 + 1e-7).all() and stored["codes"].abs().max() == 127


def test_the_bytes_are_those_of_the_ledger():
    """4 bits, 1 byte for 64, a float32 for 256 of those; the offset, 4 bytes a matrix, is not in the ledger."""
    layer = QuantLinear(nn.Linear(512, 256, bias=False), "nf4")
    assert layer.nbytes - 4 == 512 * 256 * NF4_DOUBLE
    assert QuantLinear(nn.Linear(512, 256, bias=False), "int8").nbytes == 512 * 256 + 4 * 256


# -- the layer ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_the_weight_that_it_shows(kind, dtype):
    plain = nn.Linear(96, 64, dtype=dtype)
    layer, x = QuantLinear(plain, kind), torch.randn(3, 5, 96, dtype=dtype)
    assert layer.weight.dtype == dtype and torch.equal(layer(x), nn.functional.linear(x, layer.weight, plain.bias))
    assert not list(layer.parameters())[0].requires_grad and plain.weight.requires_grad, "the plain one stays as it is"
    again = QuantLinear(nn.Linear(96, 64, dtype=dtype), kind)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    back = plain_layer(layer)
    assert torch.equal(back.weight, layer.weight) and torch.equal(back(x), layer(x)) and type(back) is nn.Linear


@pytest.mark.parametrize("wrong, says", [
    (lambda: QuantLinear(nn.Linear(4, 4), "fp4"), "kind='fp4': choose one of 'nf4'"),
    (lambda: quantize_(model(), keep=["head_x"]), "keep='head_x' names no nn.Linear"),
    (lambda: quantize_(broken()), "the weight is not finite"),
    (lambda: quantize_(under_lora()), "is under LoRA already: quantise the model")])
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def broken():
    made = model()
    made.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    return made


def under_lora():
    made = model()
    apply_lora(made, rank=2)
    return made


def test_a_refused_model_is_as_it_was():
    made = broken()
    with pytest.raises(ValueError):
        quantize_(made)
    assert not any(isinstance(module, QuantLinear) for module in made.modules())


# -- a model -----------------------------------------------------------------------------------------------------------

def test_every_linear_layer_is_stored_and_a_tied_head_is_not():
    made = quantize_(model())
    names = {name.rpartition(".")[2] for name, module in made.named_modules() if isinstance(module, QuantLinear)}
    assert names == {*MATRICES, "lm_head"}
    tied = quantize_(model(tied=True), keep=["q_proj"])
    names = {name.rpartition(".")[2] for name, module in tied.named_modules() if isinstance(module, QuantLinear)}
    assert names == {*MATRICES} - {"q_proj"} and tied.lm_head.weight is tied.model.embed_tokens.weight
    alone = nn.Linear(8, 8)
    assert isinstance(quantize_(alone, "int8"), QuantLinear)


def test_the_model_still_says_much_the_same():
    plain, small = model(), quantize_(model())
    with torch.no_grad():
        there, here = plain(IDS), small(IDS)
    assert 0 < (there - here).norm() / there.norm() < 0.35


# -- LoRA beside it ----------------------------------------------------------------------------------------------------

@pytest.fixture
def adapted():
    made = quantize_(model(tied=True))
    apply_lora(made, "all-linear", rank=3, alpha=6)
    for _, layer in lora_layers(made):
        nn.init.normal_(layer.lora_B, std=0.05)
    return made


def test_all_linear_is_what_it_is_on_the_plain_model(adapted):
    plain = model(tied=True)
    assert apply_lora(plain, "all-linear", rank=3, alpha=6).trainable == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad)
    assert {name for name, _ in lora_layers(plain)} == {name for name, _ in lora_layers(adapted)}


def test_gradients_reach_the_factors_and_nothing_else_moves(adapted):
    """Oracle: the same LoRA on a plain model whose weights are those that four bits give back."""
    plain = copy.deepcopy(adapted)
    for _, layer in lora_layers(plain):
        layer.base_layer = plain_layer(layer.base_layer)
    for each in (adapted, plain):
        loss_on(each, (IDS, IDS.roll(-1, 1))).backward()
    ours, theirs = ({name: p.grad for name, p in each.named_parameters() if p.requires_grad}
                    for each in (adapted, plain))
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert all("lora_" in name for name in ours) and all(grad.any() for grad in ours.values())


def test_a_sixteen_bit_model_in_four_bits_has_float32_factors():
    made = quantize_(model().bfloat16())
    apply_lora(made, rank=2)
    assert {p.dtype for p in lora_state_dict(made).values()} == {torch.float32}
    assert LoRALinear.wrap(QuantLinear(nn.Linear(8, 4).double()), rank=2).lora_A.dtype == torch.float32


def test_a_merge_goes_into_the_weight_that_four_bits_give_back(adapted):
    """And not into four bits: what the update changes would be rounded away there."""
    with torch.no_grad():
        apart = adapted(IDS)
        merge_lora(adapted)
        merged = adapted(IDS)
        unmerge_lora(adapted)
        assert torch.equal(adapted(IDS), apart) and torch.allclose(merged, apart, atol=1e-4)
    name, layer = next(iter(lora_layers(adapted)))
    stored, want = layer.base_layer, layer.base_layer.weight + layer.delta_weight().detach()
    remove_lora(adapted, merge=True)
    plain = adapted.get_submodule(name)
    assert type(plain) is nn.Linear and torch.allclose(plain.weight, want, atol=1e-7)
    assert not isinstance(stored, nn.Linear) and torch.allclose(adapted(IDS), apart, atol=1e-4)
    naive = QuantLinear(plain, "nf4").weight - stored.weight
    lost = (naive - (want - stored.weight)).norm() / (want - stored.weight).norm()
    assert lost > 0.1, "back into four bits much of a large update is lost, and more of a small one"


def test_taken_off_the_four_bits_are_what_they_were(adapted):
    before = {name: values.clone() for name, values in quantize_(model(tied=True)).state_dict().items()}
    remove_lora(adapted, merge=False)
    after = adapted.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_is_saved_and_loaded_beside_four_bits(adapted, tmp_path):
    save_adapter(adapted, tmp_path)
    other = quantize_(model(tied=True))
    load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS), adapted(IDS))
