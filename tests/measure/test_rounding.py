"""Merge numerics: the figures that were measured once are met again, and NumPy, PEFT and a count by hand agree."""
import numpy as np
import peft
import pytest
import torch
from torch import nn

from lora_edu import LoRALinear
from lora_edu.measure.rounding import DTYPES, drift, numerics, of_size, table

D = 256
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = DTYPES


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(size, d=D, rank=8, seed=0):
    """A Gaussian weight and a rank-8 update of the given relative size, float64."""
    weight = randn(d, d, seed=seed) / d**0.5
    return weight, of_size(randn(d, rank, seed=seed + 1) @ randn(rank, d, seed=seed + 2), weight, size)


def updates(cycles, size=0.01, d=64):
    """A weight, and for each cycle another update of the same size."""
    weight = matrices(size, d)[0]
    return weight, [of_size(randn(d, 8, seed=2 * i + 1) @ randn(8, d, seed=2 * i + 2), weight, size).float()
                    for i in range(cycles)]


@pytest.mark.parametrize("dtype, want", [(FLOAT64, 8e-16), (FLOAT32, 4.8e-7), (FLOAT16, 4.1e-4), (BFLOAT16, 3.3e-3)])
def test_outputs_merged_and_apart_differ_by_the_dtypes_rounding(dtype, want):
    """Measured before at d = 1024 with another script; BLAS libraries add in different orders, which is what float64
    and float32 show.
    """
    weight, delta = matrices(0.1, d=1024)
    got = numerics(weight, delta, dtype, randn(16, 1024, seed=9)).output_difference
    room = 4 if dtype in (FLOAT64, FLOAT32) else 1.3
    assert want / room < got < want * room


@pytest.mark.parametrize("size, lost, error",
                         [(0.1, 0.02, 0.017), (0.01, 0.19, 0.165), (0.003, 0.49, 0.47), (0.001, 0.78, 0.78)])
def test_what_bfloat16_rounds_away(size, lost, error):
    found = numerics(*matrices(size), BFLOAT16, randn(4, D))
    assert abs(found.rounded_away - lost) < 0.01 and abs(found.error - error) < 0.01
    assert found.size == pytest.approx(size, rel=1e-3)


def test_wider_dtypes_lose_less():
    found = [numerics(*matrices(0.003), dtype, randn(4, D)) for dtype in DTYPES]
    # bfloat16 beside float16, … float32 beside float64
    for narrow, wide in zip(found[:0:-1], found[-2::-1], strict=True):
        assert wide.rounded_away <= narrow.rounded_away and 4 * wide.error < narrow.error
    assert found[0].rounded_away == 0 and found[1].rounded_away < 1e-3


def bfloat16_steps(values):
    """The distance to the next bfloat16 number away from zero, by hand: 8 binary digits, so 2**(exponent - 7)."""
    return 2.0 ** (np.floor(np.log2(np.abs(values))) - 7)


def test_an_entry_is_rounded_away_when_its_update_is_under_half_a_step():
    """Oracle: NumPy's logarithm.

    At a power of two the steps below are half as long; ties go to the even neighbour: both left out.
    """
    weight, delta = matrices(0.003)
    W, U = weight.bfloat16().double().numpy(), delta.float().double().numpy()
    share = np.abs(U) / bfloat16_steps(W)
    fenced = (np.abs(share - 0.5) < 1e-5) | (np.log2(np.abs(W)) % 1 == 0)
    folded = (weight.bfloat16().float() + delta.float()).bfloat16().double().numpy()
    assert fenced.mean() < 0.02 and ((folded == W) == (share < 0.5))[~fenced].all()
    found = numerics(weight, delta, BFLOAT16, randn(4, D))
    assert abs(found.rounded_away - (share < 0.5).mean()) < 0.01
    assert found.error == pytest.approx(np.linalg.norm(folded - W - U) / np.linalg.norm(U), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_numbers_are_those_of_a_LoRALinear(dtype):
    """Oracle: the layer itself, apart and merged, on the same inputs."""
    torch.manual_seed(0)
    layer = LoRALinear.wrap(nn.Linear(96, 80, bias=False).to(dtype), 4, 6.0).eval()
    nn.init.normal_(layer.lora_B, std=0.1)
    x = randn(50, 96)
    found = numerics(layer.weight, layer.delta_weight(), dtype, x)
    with torch.no_grad():
        apart = layer(x.to(dtype)).double()
        layer.merge()
        difference = ((layer(x.to(dtype)).double() - apart).norm() / apart.norm()).item()
        moved = layer.weight.double() - layer.base_layer.weight.double()
    assert found.output_difference == pytest.approx(difference, rel=0.6 if dtype in (FLOAT64, FLOAT32) else 0.02)
    size = layer.delta_weight().double().norm() / layer.base_layer.weight.double().norm()
    assert found.size == pytest.approx(size.item(), rel=1e-6)
    assert found.rounded_away == pytest.approx((moved == 0).double().mean().item())


@pytest.mark.parametrize("dtype, share, distance",
                         [(BFLOAT16, 0.5, 4.7e-3), (FLOAT16, 0.5, 6.7e-4), (FLOAT32, 0.5, 8e-8)])
def test_a_weight_drifts_when_changing_updates_are_added_and_subtracted(dtype, share, distance):
    weight, deltas = updates(300)
    changed, relative = drift(weight, deltas, dtype)
    assert abs(changed - share) < 0.05 and distance / 1.3 < relative < distance * 1.3
    assert drift(weight, deltas[:30], dtype, keep_base=True) == (0.0, 0.0)
    assert drift(weight, deltas[:30], dtype)[1] < relative


def test_one_update_again_and_again_stops_drifting_after_the_first_time():
    weight, (delta,) = updates(1, d=128)
    first = drift(weight, [delta], BFLOAT16)
    assert 0.015 < first[0] < 0.035 and first == drift(weight, [delta] * 100, BFLOAT16)
    assert drift(weight, [], BFLOAT16) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_drift_is_what_peft_does(dtype):
    """Oracle: PEFT's own layer through the same cycles, its factors in the weight's dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False).to(dtype))
    start = model[0].weight.detach().clone()
    layer = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"])).base_model.model[0]
    deltas = []
    for _ in range(20):
        nn.init.normal_(layer.lora_A["default"].weight, std=0.1)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        deltas.append(layer.get_delta_weight("default").detach().clone())
        layer.merge(safe_merge=True)
        layer.unmerge()
    end = layer.base_layer.weight
    changed, relative = drift(start, deltas, dtype)
    assert changed == (end != start).double().mean().item() > 0.05
    assert relative == pytest.approx(((end.double() - start.double()).norm() / start.double().norm()).item(), rel=1e-9)


def test_the_table_has_one_line_for_each_dtype():
    weight, delta = matrices(0.003, d=64)
    found = [numerics(weight, delta, dtype, randn(2, 64)) for dtype in DTYPES]
    lines = repr(table(found)).splitlines()
    assert [line.split()[0] for line in lines] == ["dtype", "float64", "float32", "float16", "bfloat16"]
    assert f"{found[3].rounded_away:.1%}" in lines[4] and f"{found[3].error:.1e}" in lines[4] and "0.003" in lines[4]


def test_an_update_or_inputs_of_zero():
    weight, delta = matrices(0.1, d=16)
    nothing = numerics(weight, torch.zeros_like(delta), BFLOAT16, randn(2, 16))
    assert (nothing.size, nothing.output_difference, nothing.rounded_away, nothing.error) == (0, 0, 0, 0)
    assert numerics(weight, delta, BFLOAT16, torch.zeros(2, 16)).output_difference == 0
    with pytest.raises(ValueError, match="zero.*train it first"):
        of_size(torch.zeros(2, 2), torch.ones(2, 2), 0.1)


def test_numerics_and_drift_leave_their_inputs_alone():
    weight, delta = (t.float() for t in matrices(0.1, d=16))
    before = weight.clone(), delta.clone()
    numerics(weight, delta, FLOAT32, randn(2, 16))
    drift(weight, [delta] * 3, FLOAT32)
    assert torch.equal(weight, before[0]) and torch.equal(delta, before[1])


W, X = torch.ones(3, 4), torch.ones(2, 4)


@pytest.mark.parametrize("call, message", [
    (lambda: numerics(W, W.T, BFLOAT16, X), r"weight is \(3, 4\), the update \(4, 3\)"),
    (lambda: numerics(W[0], W[0], BFLOAT16, X), "two matrices"),
    (lambda: numerics(W, W, torch.int8, X), "torch.int8 has no fractions.*torch.bfloat16"),
    (lambda: numerics(W, W, BFLOAT16, X.T), r"x has shape \(4, 2\) and the weight reads 4 inputs"),
    (lambda: numerics(W, W * float("nan"), FLOAT32, X), "update of this 3 x 4 weight is not finite"),
    (lambda: numerics(W * 6e4, W * 6e4, FLOAT16, X), "not finite in float16.*bfloat16 or float32"),
    (lambda: numerics(W * 1e5, W, FLOAT16, X), "not finite in float16"),
    (lambda: numerics(W * 3e4, W, FLOAT16, X), "outputs leave the range of torch.float16.*smaller inputs"),
    (lambda: drift(W, [W, W.T], FLOAT32), "two matrices of one shape"),
    (lambda: drift(W, [W * float("inf")], BFLOAT16), "not finite"),
    (lambda: drift(W * 6e4, [W * 6e4], FLOAT16, keep_base=True), "not finite in float16"),
    (lambda: drift(W, [W], torch.int64), "no fractions"),
])
def test_what_does_not_fit_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
