"""The merge lab: every number against arithmetic done by hand in numpy, and the model stays as it is."""
import base64
import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from lora_edu.course.labs import merge_lab as lab
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.merge import merge_lora, remove_lora, set_strength
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.training.loop import evaluate

pytestmark = pytest.mark.slow

NAME = "model.layers.0.self_attn.q_proj"       # 64 x 64: larger than the corner
SMALL = "model.layers.0.self_attn.k_proj"      # 32 x 64: fewer rows than the corner
IDS = torch.arange(48).view(2, 24) % 30
TASK, TALES = (IDS, IDS.roll(-1, 1)), (IDS.flip(1), IDS.flip(1).roll(-1, 1))


def adapted():
    """A tiny Llama with LoRA that says something; the update is about half of its matrix, as the shipped adapter's
    is.
    """
    torch.manual_seed(0)
    model = Llama(LlamaConfig(30, 64, 72, 1, 2, 1, 32)).eval()
    for parameter in model.parameters():
        # a new model says nearly nothing, whatever its weights
        parameter.data *= 5 if parameter.ndim == 2 else 1
    apply_lora(model, ["q_proj", "k_proj", "down_proj"], rank=3, alpha=6)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.2)
        layer.weight.data = layer.weight.data.bfloat16().float()       # as fable's, which are stored in 16 bits
    return model


def in_bfloat16(x):
    """float32 rounded to 8 binary digits, to the nearest, ties to even: by hand on the bits."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


ROUND = {"float32": lambda x: np.asarray(x, np.float32), "bfloat16": in_bfloat16,
         "float16": lambda x: np.asarray(x, np.float32).astype(np.float16).astype(np.float32)}


def by_hand(model, name, dtype, strength):
    """(W₀, ΔW, merged) of one layer, as float64 arrays; the sum is made in float32 and rounded once."""
    layer = model.get_submodule(name)
    W, A, B = (ROUND[dtype](t.detach()) if t is layer.weight else t.detach().numpy()
               for t in (layer.weight, layer.lora_A, layer.lora_B))
    delta = (strength * layer.alpha / layer.rank * (B.astype(float) @ A.astype(float))).astype(np.float32)
    return tuple(np.asarray(t, float) for t in (W, delta, ROUND[dtype](W + delta)))


def error_by_hand(*case):
    W, delta, merged = by_hand(*case)
    return np.linalg.norm(merged - W - delta) / np.linalg.norm(delta)


def losses_by_hand(model, dtype, strength):
    """A plain model with the merged weights written in, in float32."""
    plain = copy.deepcopy(model)
    remove_lora(plain, merge=False)
    for name, _ in lora_layers(model):
        plain.get_submodule(name).weight.data = torch.tensor(by_hand(model, name, dtype, strength)[2],
                                                             dtype=torch.float32)
    return [evaluate(plain, [batch]) for batch in (TASK, TALES)]


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture(scope="module")
def few():
    """Three strengths and three scales: what is measured at one is measured at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "STRENGTHS", [-1.0, 0.0, 1.0])
        patch.setattr(lab, "SCALES", {"1": 1.0, "1/30": 1 / 30, "1/100": 0.01})
        yield


@pytest.fixture(scope="module")
def built(model, few):
    return lab.merge_lab(model, NAME, TASK, TALES)


CASES = [("bfloat16", 1.0, "1"), ("bfloat16", 1.0, "1/100"), ("float16", -1.0, "1/30"), ("float32", 1.0, "1/30")]
SHARE = {"1": 1.0, "1/30": 1 / 30, "1/100": 0.01}


@pytest.mark.parametrize("dtype, strength, scaled", CASES)
def test_what_was_rounded_away_and_the_error_are_those_of_numpy(built, model, dtype, strength, scaled):
    found, _ = lab.at(built.data, {"dtype": dtype, "strength": strength, "scaled": scaled})
    W, delta, merged = by_hand(model, NAME, dtype, strength * SHARE[scaled])
    lost = (merged == W) & (delta != 0)
    assert found["lost"] == lost.sum() and found["away"] == pytest.approx(lost.mean(), abs=1e-3)
    assert built.data["entries"] == 4096
    assert found["size"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(W), rel=1e-3)
    assert found["error"] == pytest.approx(np.linalg.norm(merged - W - delta) / np.linalg.norm(delta), rel=0.02)


def test_small_updates_are_lost_in_bfloat16_and_only_there(built):
    """What the lab is for: at a hundredth of a trained update much is rounded away in bfloat16, little in float16,
    nothing in float32.
    """
    shares = [lab.at(built.data, {"dtype": dtype, "strength": 1.0, "scaled": "1/100"})[0]["away"]
              for dtype in ("bfloat16", "float16", "float32")]
    assert shares[0] > 0.2 and 0 < shares[1] < shares[0] / 4 and shares[2] < 5e-4


@pytest.mark.parametrize("dtype, strength, scaled", CASES)
def test_the_losses_are_those_of_a_plain_model_with_the_merged_weights(built, model, dtype, strength, scaled):
    found, kept = lab.at(built.data, {"dtype": dtype, "strength": strength, "scaled": scaled})
    effective, apart = strength * SHARE[scaled], copy.deepcopy(model)
    assert found["merged"] == pytest.approx(losses_by_hand(model, dtype, effective), abs=2e-5)
    for at, losses in ((0.0, built.data["base"]), (effective, kept)):
        set_strength(apart, at)
        assert losses == pytest.approx([evaluate(apart, [batch]) for batch in (TASK, TALES)], abs=1e-5)


def test_each_line_of_errors_is_of_its_own_dtype(built, model):
    W, full, _ = by_hand(model, NAME, "float32", 1.0)
    own = np.linalg.norm(full) / np.linalg.norm(W)
    assert built.data["own"] == pytest.approx(own, rel=1e-4)
    for dtype in ROUND:
        for i in (0, 9, 19):
            size, error = built.data["lines"][dtype][i]
            assert error == pytest.approx(error_by_hand(model, NAME, dtype, size / own), rel=0.05), dtype


def test_the_corner_is_that_of_the_matrix_and_of_the_update(built, model, few):
    W, delta, _ = by_hand(model, NAME, "float32", 1.0)
    small = lab.merge_lab(model, SMALL, TASK, TALES)
    assert (small.data["corner"]["height"], small.data["corner"]["width"]) == (32, 48), "shown whole"
    for name, want in (("weight", W), ("delta", delta)):
        found = np.frombuffer(base64.b64decode(built.data["corner"][name]), "<f4").reshape(48, 48)
        assert np.allclose(found, want[:48, :48], rtol=1e-5, atol=1e-7)


def test_the_stored_cell_says_where_it_starts_and_samples_go_over_in_order(model, few):
    made = lab.merge_lab(model, NAME, TASK, TALES, {1: "a waiter", -1: "a riddle"})
    assert made.data["samples"] == [(-1, "a riddle"), (1, "a waiter")]
    said = made._repr_mimebundle_()[0]["text/plain"]
    found, kept = lab.at(made.data, made.state)
    assert said.startswith(f"bfloat16, strength 1.00: ‖ΔW‖/‖W₀‖ = {found['size']:.2g} in {NAME}; rounded away ")
    assert f"{kept[0]:.3f} with it kept apart, {found['merged'][0]:.3f} merged" in said


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_stays_as_it_is_bit_for_bit(merged, few):
    """In training mode, with its dial at 0.4, merged or not: weights, factors, scalings, mode and gradients' flags."""
    model = adapted().train()
    set_strength(model, 0.4)
    if merged:
        merge_lora(model)

    def everything():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return ({name: (t.data_ptr(), t.requires_grad, t.detach().clone()) for name, t in tensors.items()},
                [(layer.scaling, layer.merged) for _, layer in lora_layers(model)],
                [module.training for module in model.modules()])
    before = everything()
    lab.merge_lab(model, NAME, TASK, TALES)
    after = everything()
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    for name, (place, trains, values) in before[0].items():
        assert (place, trains) == after[0][name][:2] and torch.equal(values, after[0][name][2]), name


def test_the_dial_of_the_model_does_not_move_the_lab(model, few):
    turned = copy.deepcopy(model)
    set_strength(turned, 0.3)
    labs = [lab.merge_lab(each, SMALL, TASK, TALES) for each in (model, turned)]
    assert labs[0].data["measured"] == labs[1].data["measured"]


@pytest.mark.parametrize("spoil, name, says", [
    (lambda model: remove_lora(model, merge=False), NAME, "the model has no LoRA layer"),
    (lambda model: None, "v_proj", f"'v_proj' is no LoRA layer of this model: choose one of {NAME}, {SMALL}, "),
    (lambda model: nn.init.zeros_(model.get_submodule(NAME).lora_B), NAME, "is zero, so a merge has nothing to lose: "
                                                                           "load an adapter"),
    (lambda model: nn.init.constant_(model.get_submodule(NAME).lora_A, torch.nan), NAME, "not finite")])
def test_what_cannot_be_shown_is_refused_in_a_sentence(spoil, name, says):
    model = adapted()
    spoil(model)
    with pytest.raises(ValueError, match=re.escape(says)):
        lab.merge_lab(model, name, TASK, TALES)
