"""Spectra against numpy and closed forms; the noise law against sampled noise; truncated models against sums of
outer products.
"""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_edu.checkpoints.deltas import deltas
from lora_edu.measure.spectra import (
    factor,
    gaussian_like,
    marchenko_pastur,
    median_eigenvalue,
    sign_flipped,
    spectrum,
    truncate,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (2, 3, 7, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_singular_values_are_numpys(shape, dtype):
    matrix = randn(*shape).to(dtype)
    found = spectrum(matrix)
    np.testing.assert_allclose(found.values, np.linalg.svd(matrix.double().numpy(), compute_uv=False), rtol=1e-5,
                               atol=1e-6)
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == shape[-2:]


def test_a_stack_gives_what_its_matrices_give():
    stack = randn(3, 8, 5)
    whole = spectrum(stack)
    for i, matrix in enumerate(stack):
        alone = spectrum(matrix)
        for figure in ("energy_kept", "rank_for", "effective_rank", "stable_rank", "noise_edge", "above_edge"):
            torch.testing.assert_close(getattr(whole, figure)()[i], getattr(alone, figure)())


def test_figures_of_a_spectrum_that_is_known_by_hand():
    """Squares 16, 4, 4, 1 of 25: shares 0.64, 0.16, 0.16, 0.04."""
    known = spectrum(torch.diag(torch.tensor([2.0, 1.0, 4.0, 2.0], dtype=torch.float64)))
    torch.testing.assert_close(known.energy_kept(), torch.tensor([0, 0.64, 0.80, 0.96, 1.0], dtype=torch.float64))
    assert [int(known.rank_for(share)) for share in (0.5, 0.64, 0.65, 0.9, 0.97, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert known.stable_rank().item() == pytest.approx(25 / 16)
    assert known.effective_rank().item() == pytest.approx(math.exp(-sum(p * math.log(p)
                                                                        for p in (0.64, 0.16, 0.16, 0.04))))


def test_ranks_of_the_extremes():
    same, single = spectrum(torch.eye(7)), spectrum(torch.outer(torch.arange(1.0, 5), torch.ones(6)))
    assert same.effective_rank().item() == pytest.approx(7) and same.stable_rank().item() == pytest.approx(7)
    assert single.effective_rank().item() == pytest.approx(1, abs=1e-3)
    assert single.stable_rank().item() == pytest.approx(1, abs=1e-5)
    zeros = spectrum(torch.zeros(3, 4))
    assert zeros.effective_rank() == zeros.stable_rank() == zeros.rank_for(0.9) == 0
    assert (zeros.energy_kept() == 1).all()


@pytest.mark.parametrize("shape", [(256, 256), (256, 688), (688, 256)])
def test_noise_is_recognised_and_measured(shape):
    """Entries of standard deviation 0.3: the size comes back from the median, and next to nothing lies above the
    edge.
    """
    noise = spectrum(0.3 * randn(*shape))
    assert noise.noise_std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.noise_edge().item() == pytest.approx(0.3 * (math.sqrt(shape[0]) + math.sqrt(shape[1])), rel=0.02)
    assert noise.above_edge() <= 2


def test_planted_directions_stand_above_the_edge_and_do_not_move_it():
    noise = 0.3 * randn(300, 200)
    planted = noise + 60.0 * randn(300, 5, seed=1) @ randn(5, 200, seed=2) / 100
    # by the standard deviation: more than 1
    assert spectrum(planted).noise_std().item() == pytest.approx(0.3, rel=0.05)
    assert planted.std() > 1 and spectrum(planted).above_edge() in (5, 6)


@pytest.mark.parametrize("shape", [(64, 64), (100, 400), (400, 100)])
def test_the_law_has_area_one_and_is_the_histogram_of_noise(shape):
    x = np.linspace(1e-3, 50, 200_001)
    density = marchenko_pastur(x, shape, 1.0)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-3)
    draws = np.concatenate([spectrum(randn(*shape, seed=seed)).values.numpy() for seed in range(20)])
    for share in (0.1, 0.5, 0.9):
        below = np.trapezoid(density[x <= np.quantile(draws, share)], x[x <= np.quantile(draws, share)])
        assert below == pytest.approx(share, abs=0.02)


def test_median_of_the_law_where_it_is_published():
    """Gavish and Donoho 2014: for a square matrix 2.858 is their threshold's coefficient, (4/sqrt 3) / sqrt(median)."""
    assert 4 / math.sqrt(3) / math.sqrt(median_eigenvalue(1.0)) == pytest.approx(2.858, abs=1e-3)


def test_gaussian_like_has_the_norm_and_nothing_else():
    matrix = randn(30, 20) * 5
    noise = gaussian_like(matrix, seed=3)
    assert noise.norm().item() == pytest.approx(matrix.norm().item()) and noise.dtype == matrix.dtype
    assert abs((noise * matrix).sum() / matrix.norm() ** 2) < 0.15
    torch.testing.assert_close(noise, gaussian_like(matrix, seed=3))
    assert not torch.equal(noise, gaussian_like(matrix, seed=4))
    stack = torch.stack([matrix, 2 * matrix])
    assert torch.linalg.matrix_norm(gaussian_like(stack)).tolist() == pytest.approx(
        torch.linalg.matrix_norm(stack).tolist()
    )


def test_sign_flipped_keeps_every_size_in_its_place():
    matrix = randn(40, 50, dtype=torch.float32)
    flipped = sign_flipped(matrix, seed=1)
    assert torch.equal(flipped.abs(), matrix.abs())
    assert 0.4 < (flipped == matrix).float().mean() < 0.6


@pytest.mark.parametrize("matrix, said", [
    (torch.ones(3), "is no matrix"), (torch.ones(0, 3), "is no matrix"),
    (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"), (torch.tensor([[1.0, float("inf")]]), "NaN or infinity")])
def test_what_has_no_spectrum_is_refused(matrix, said):
    with pytest.raises(ValueError, match=said):
        spectrum(matrix)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="not a share"):
        spectrum(torch.eye(2)).rank_for(share)


class Small(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.emb, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3, padding=1)
            self.up, self.norm, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 5, bias=False)
        self.double()

    def forward(self, ids):
        return self.down(self.norm(self.up(self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2))))


@pytest.fixture
def pair():
    base = Small()
    tuned = copy.deepcopy(base)
    for i, p in enumerate(tuned.parameters()):
        p.data += 0.3 * randn(*p.shape, seed=i)
    return base, tuned


def by_hand(base, tuned, rank, rest):
    """Every weight of a linear or a convolution from a sum of outer products by numpy; the rest from one side."""
    cut, start, end = copy.deepcopy(base), base.state_dict(), tuned.state_dict()
    for name, place in cut.state_dict(keep_vars=True).items():
        if name in ("conv.weight", "up.weight", "down.weight"):
            U, S, Vh = np.linalg.svd((end[name] - start[name]).flatten(1).numpy(), full_matrices=False)
            update = sum((S[i] * np.outer(U[:, i], Vh[i]) for i in range(min(rank, len(S)))),
                         np.zeros((len(U), Vh.shape[1])))
            place.data = start[name] + torch.from_numpy(update).reshape(place.shape)
        elif rest == "tuned":
            place.data = end[name].clone()
    return cut


@pytest.mark.parametrize("rest", ["base", "tuned"])
@pytest.mark.parametrize("rank", [0, 1, 3, 5, 99])
def test_truncate_is_a_sum_of_outer_products(pair, rank, rest):
    base, tuned = pair
    ids = torch.randint(11, (2, 7))
    want = by_hand(base, tuned, rank, rest)(ids)
    for model in pair:                                           # either gives the architecture
        torch.testing.assert_close(truncate(model, deltas(base, tuned), rank, rest=rest)(ids), want)
    torch.testing.assert_close(truncate(base, factor(deltas(base, tuned)), rank, rest=rest)(ids), want)


def test_both_ends_of_truncate_are_the_models_themselves(pair):
    base, tuned = pair
    before = copy.deepcopy(base.state_dict())
    ids = torch.randint(11, (2, 7))
    torch.testing.assert_close(truncate(base, deltas(base, tuned), 0, rest="base")(ids), base(ids), rtol=0, atol=0)
    torch.testing.assert_close(truncate(base, deltas(base, tuned), 99, rest="tuned")(ids), tuned(ids))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())       # not changed


def test_energy_of_all_matrices_together(pair):
    base, tuned = pair
    factors = factor(deltas(base, tuned))
    changes = [(getattr(tuned, n).weight - getattr(base, n).weight).detach().flatten(1).numpy()
               for n in ("conv", "up", "down")]
    squares = [np.linalg.svd(change, compute_uv=False) ** 2 for change in changes]
    assert factors.energy_kept(2) == pytest.approx(sum(s[:2].sum() for s in squares) / sum(s.sum() for s in squares))
    assert factors.energy_kept(0) == 0 and factors.energy_kept(99) == pytest.approx(1)


def test_truncate_asks_whose_rest_and_refuses_no_rank(pair):
    base, tuned = pair
    with pytest.raises(TypeError):
        truncate(base, deltas(base, tuned), 1)
    with pytest.raises(ValueError, match="choose 'base' or 'tuned'"):
        truncate(base, deltas(base, tuned), 1, rest="other")
    for rank in (-1, 1.5, None):
        with pytest.raises(ValueError, match="whole number"):
            truncate(base, deltas(base, tuned), rank, rest="base")


def test_truncate_turns_a_conv1d():
    from transformers.pytorch_utils import Conv1D
    base = nn.Sequential(Conv1D(9, 4))
    tuned = copy.deepcopy(base)
    tuned[0].weight.data += torch.randn(4, 9)
    x = torch.randn(3, 4)
    torch.testing.assert_close(truncate(base, deltas(base, tuned), 4, rest="base")(x), tuned(x))


def test_truncate_cuts_matrices_that_are_no_layers_weight():
    """An LSTM's: `weight_ih_l0` and `weight_hh_l0`, against numpy."""
    base = nn.LSTM(5, 4).double()
    tuned = copy.deepcopy(base)
    for i, p in enumerate(tuned.parameters()):
        p.data += randn(*p.shape, seed=i)
    cut = truncate(base, deltas(base, tuned), 2, rest="tuned").state_dict()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        before = base.state_dict()[name]
        U, S, Vh = np.linalg.svd((tuned.state_dict()[name] - before).numpy(), full_matrices=False)
        torch.testing.assert_close(cut[name], before + torch.from_numpy((U[:, :2] * S[:2]) @ Vh[:2]))
    assert torch.equal(cut["bias_ih_l0"], tuned.bias_ih_l0)


def test_a_vocabulary_that_grew_is_said_and_changes_nothing():
    base = nn.ModuleDict({"wte": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)})
    tuned = nn.ModuleDict({"wte": nn.Embedding(11, 4), "fc": nn.Linear(4, 4)})
    pair = deltas(base, tuned)
    with pytest.raises(ValueError, match=r"wte.weight is \(11, 4\) on the tuned side .* choose rest='base'"):
        truncate(base, pair, np.int64(1), rest="tuned")
    assert truncate(base, pair, np.int64(1), rest="base")["wte"].weight.shape == (9, 4)
    assert truncate(tuned, pair, 1, rest="tuned")["wte"].weight.shape == (11, 4)


def test_a_model_that_lacks_a_matrix_of_the_update_is_refused():
    """Else it would come back uncut, and nobody would know."""
    base, tuned = (nn.ModuleDict({"bert": nn.Linear(3, 3)}) for _ in range(2))
    with pytest.raises(ValueError, match="the model has no bert, which the update changes: give the base"):
        truncate(nn.ModuleDict({"body": nn.Linear(3, 3)}), deltas(base, tuned), 1, rest="base")
