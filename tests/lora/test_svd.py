"""truncated_svd against NumPy's full SVD: by Eckart and Young the error of the best rank-r part is the tail's energy."""
import numpy as np
import pytest
import torch

from lora_edu.lora import svd
from lora_edu.lora.svd import truncated_svd


def noise(out, into, seed=0, dtype=torch.float32):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values, out, into, dtype=torch.float32):
    """A matrix with these singular values and random singular vectors."""
    k = len(values)
    U, V = (np.linalg.qr(noise(side, k, seed, torch.float64).numpy())[0] for seed, side in enumerate((out, into)))
    return torch.from_numpy(U * np.asarray(values) @ V.T).to(dtype)


def like_fine_tuning(k):
    """What the updates of a real fine-tune look like: a few directions lead, then a slow power law, then a floor."""
    i = np.arange(1, k + 1)
    return 1 / (i + 2.0) ** 0.8 + 0.02


def tail_and_error(matrix, rank):
    """(squared error - energy of the tail) over the whole energy, and the error over the smallest possible one, less 1."""
    exact = matrix.double().numpy()
    sigma = np.linalg.svd(exact, compute_uv=False)
    U, S, Vh = (t.double().numpy() for t in truncated_svd(matrix, rank))
    assert U.shape == (matrix.shape[0], rank) and S.shape == (rank,) and Vh.shape == (rank, matrix.shape[1])
    np.testing.assert_allclose(U.T @ U, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(rank), atol=1e-5)
    assert (np.diff(S) <= 1e-6 * S[0]).all()
    error, tail = np.square(exact - U * S @ Vh).sum(), np.square(sigma[rank:]).sum()
    return (error - tail) / np.square(sigma).sum(), (error / tail) ** 0.5 - 1 if tail > 1e-9 * error else 0.0


@pytest.mark.parametrize("out, into", [(576, 576), (192, 576), (600, 300), (300, 1000)])
@pytest.mark.parametrize("rank", [1, 8, 16, 24])
def test_on_a_falling_spectrum_the_error_is_the_tails_energy(out, into, rank):
    energy, excess = tail_and_error(with_spectrum(like_fine_tuning(min(out, into)), out, into), rank)
    assert abs(energy) < 1e-5 and excess < 1e-4


@pytest.mark.parametrize("out, into", [(576, 576), (192, 576), (800, 300)])
def test_on_white_noise_the_error_is_a_thousandth_above_the_best(out, into):
    """The worst case, no direction leads; what is missed is stated, not hidden."""
    energy, excess = tail_and_error(noise(out, into), 16)
    assert -1e-6 < energy < 2e-3 and -1e-6 < excess < 1e-3


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("out, into", [(400, 300), (300, 400)])
def test_a_planted_rank_is_found_exactly(dtype, digits, out, into):
    values = np.geomspace(5, 1e-3, 12)
    matrix = with_spectrum(values, out, into, dtype)
    U, S, Vh = truncated_svd(matrix, 12)
    assert S.dtype == U.dtype == dtype
    np.testing.assert_allclose(S.numpy(), values, rtol=0, atol=30 * digits)
    assert (matrix - (U * S) @ Vh).norm() / matrix.norm() < 10 * digits


@pytest.mark.parametrize("matrix", [
    torch.zeros(300, 400), with_spectrum([3.0, 1.0], 300, 400), with_spectrum([3.0, 1.0], 300, 400, torch.float64),
    torch.eye(300, 400) * (torch.arange(400) < 3),                      # three rows, the rest exactly 0
    torch.nn.functional.pad(noise(2, 400), (0, 0, 5, 293)),
], ids=["zeros", "rank 2", "rank 2 in float64", "three entries", "two rows"])
def test_a_matrix_of_less_rank_than_asked_for(matrix):
    U, S, Vh = truncated_svd(matrix, 16)
    assert U.isfinite().all() and Vh.isfinite().all() and (S >= 0).all()
    torch.testing.assert_close((U * S) @ Vh, matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(U.T @ U, torch.eye(16, dtype=U.dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close(S[:4], torch.linalg.svdvals(matrix)[:4], rtol=1e-5, atol=1e-5)


def test_tall_is_wide_turned():
    matrix = with_spectrum(like_fine_tuning(200), 200, 700)
    for (U, S, Vh), (Ut, St, Vht) in [(truncated_svd(matrix, 5), truncated_svd(matrix.T, 5))]:
        torch.testing.assert_close(S, St, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((U * S) @ Vh, ((Ut * St) @ Vht).T, rtol=0, atol=1e-4)


def test_it_is_the_same_every_time_and_leaves_the_global_generator_alone():
    matrix, before = noise(300, 300), torch.random.get_rng_state()
    first = truncated_svd(matrix, 4)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(matrix, 4), strict=True))
    torch.random.set_rng_state(before)
    truncated_svd(matrix, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_few_directions_are_not_had_by_computing_all(monkeypatch):
    """At rank 16 no SVD of more than 16 rows is taken; where the Krylov space is three quarters of the matrix, the full one is."""
    sizes, real = [], torch.linalg.svd
    monkeypatch.setattr(svd.torch.linalg, "svd", lambda m, **how: sizes.append(min(m.shape)) or real(m, **how))
    truncated_svd(noise(300, 300), 16)
    assert sizes == [16]
    truncated_svd(noise(300, 300), 60)
    assert sizes == [16, 300]


@pytest.mark.parametrize("matrix, fewest, most", [
    (with_spectrum(like_fine_tuning(400), 400, 400), 4, 6), (noise(400, 400), 8, 8), (with_spectrum([2.0, 1.0], 400, 400), 1, 4)])
def test_it_stops_when_little_is_missing(matrix, fewest, most, monkeypatch):
    calls, real = [], svd.new_directions
    monkeypatch.setattr(svd, "new_directions", lambda *args: calls.append(1) or real(*args))
    truncated_svd(matrix, 16)
    assert fewest <= len(calls) <= most


def test_more_iterations_miss_less():
    matrix = noise(400, 400)
    missed = [matrix.norm() ** 2 - truncated_svd(matrix, 8, iterations=n)[1].square().sum() for n in (1, 3, 6)]
    assert missed[0] > missed[1] > missed[2]


@pytest.mark.parametrize("matrix, rank", [(noise(4, 6), 5), (noise(4, 6), 0), (noise(4, 6)[0], 1), (torch.zeros(2, 3, 3), 1)])
def test_what_does_not_fit_is_refused(matrix, rank):
    with pytest.raises(ValueError, match="rank=.*does not fit a tensor of shape.*1 <= rank <= its smaller side"):
        truncated_svd(matrix, rank)


def test_sixteen_bits_are_widened():
    assert truncated_svd(noise(20, 30).bfloat16(), 3)[0].dtype == torch.float32
