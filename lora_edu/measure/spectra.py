"""The singular values of an update, what they say, and what they would be by chance.

`spectrum` measures, `gaussian_like` and `sign_flipped` make matrices of chance to compare with, `truncate` gives the
model that keeps the best rank-r part of each update: energy says how much of ΔW is there, only the model says how much
of the learning.

Sources: Eckart and Young (1936) for the best rank-r part; Marchenko and Pastur (1967) for the singular values of noise;
Gavish and Donoho (2014), arXiv:1305.5870, for its size from the median; Roy and Vetterli (2007) for the effective rank,
there of the shares of the singular values, here of the energy.
"""
import copy
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_edu.checkpoints.deltas import Deltas
from lora_edu.lora.layer import is_conv1d
from lora_edu.numbers import whole


@dataclass(frozen=True)
class Spectrum:
    """Singular values and what follows from them; every figure has the leading dimensions of `values` and is on the
    CPU, in float64.

    Attributes:
        values: (..., k) in falling order, k = min(out_features, in_features), in the units of the matrix.
        shape: (out_features, in_features).
    """

    values: torch.Tensor
    shape: tuple[int, int]

    @property
    def exact(self) -> torch.Tensor:
        return self.values.detach().cpu().double()      # Apple's GPUs have no float64

    def energy_kept(self) -> torch.Tensor:
        """Share of the squared Frobenius norm in the first 0, 1, ..., k directions, (..., k + 1), no unit. 1
        throughout for zeros.
        """
        kept = torch.nn.functional.pad(self.exact.square().cumsum(-1), (1, 0))
        total = kept[..., -1:]
        return torch.where(total > 0, kept / total.clamp_min(torch.finfo(torch.float64).tiny), torch.ones_like(kept))

    def rank_for(self, share: float = 0.9) -> torch.Tensor:
        """The smallest rank whose best approximation keeps at least this share of the energy."""
        if not 0 < share <= 1:
            raise ValueError(f"share={share} is not a share of the energy: choose 0 < share <= 1, for example 0.9.")
        # 1e-12: the last sum may be a rounding error short of 1
        return (self.energy_kept() < share - 1e-12).sum(-1)

    def effective_rank(self) -> torch.Tensor:
        """exp of the entropy of the energy's shares: k for k equal singular values, 1 for a single one, 0 for zeros."""
        shares = self.energy_kept().diff(dim=-1)
        return torch.where(self.exact[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)

    def stable_rank(self) -> torch.Tensor:
        """Squared Frobenius norm over squared largest singular value: at most the rank, and small changes move it
        little.
        """
        squares = self.exact.square()
        return torch.where(squares[..., 0] > 0,
                           squares.sum(-1) / squares[..., 0].clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    def noise_std(self) -> torch.Tensor:
        """Standard deviation of the entries of the white noise whose median singular value is this one's.

        The median and not the standard deviation of all entries: a few large directions do not move it.
        """
        small, large = min(self.shape), max(self.shape)
        return self.exact.median(-1).values / math.sqrt(large * median_eigenvalue(small / large))

    def noise_edge(self) -> torch.Tensor:
        """Where the singular values of that noise end: std (sqrt(out) + sqrt(in)), the upper edge of the Marchenko-
        Pastur law.
        """
        return self.noise_std() * sum(math.sqrt(side) for side in self.shape)

    def above_edge(self) -> torch.Tensor:
        """How many singular values lie above the edge: "not white noise", which is not the same as "what was
        learned".
        """
        return (self.exact > self.noise_edge()[..., None]).sum(-1)


def spectrum(matrix: torch.Tensor) -> Spectrum:
    """Singular values of one matrix (out, in) or of many of one shape (..., out, in), on the device they are on.

    Computed in float32, or in float64 where that is what arrives.

    Raises:
        ValueError: fewer than two dimensions, a side of length 0, NaN or infinity.

    >>> found = spectrum(torch.diag(torch.tensor([3.0, 4.0, 0.0])))
    >>> found.values.tolist(), found.energy_kept().tolist()      # in falling order; of the squares
    ([4.0, 3.0, 0.0], [0.0, 0.64, 1.0, 1.0])
    """
    if matrix.ndim < 2 or 0 in matrix.shape:
        raise ValueError(f"a tensor of shape {tuple(matrix.shape)} is no matrix: "
                         "give (out_features, in_features), or a stack of them.")
    if not matrix.isfinite().all():
        raise ValueError(f"the matrix of shape {tuple(matrix.shape)} has NaN or infinity in it: it has no singular "
                         "values. Look for the training step at which the loss stopped being a number.")
    values = torch.linalg.svdvals(matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)))
    return Spectrum(values, tuple(matrix.shape[-2:]))


@functools.lru_cache(maxsize=256)
def median_eigenvalue(ratio: float, points: int = 20_001) -> float:
    """Median of the Marchenko-Pastur law with sides in this ratio (0 < ratio <= 1) and variance 1."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # the density has infinite slope at both ends: in the angle of the middle of the interval it is smooth
    angle = np.linspace(0, np.pi, points)
    x = (high + low) / 2 - (high - low) / 2 * np.cos(angle)
    density = (high - low) ** 2 / 4 * np.sin(angle) ** 2 / np.maximum(x, 1e-300)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.interp(0.5 * below[-1], below, x))


def marchenko_pastur(values, shape: tuple[int, int], std: float) -> np.ndarray:
    """Density at `values` of the singular values of an (out, in) matrix of independent entries with this standard
    deviation.

    The law of large matrices: at 256 x 256 the histogram follows it to a few per cent. Its area is 1.
    """
    small, large = sorted(shape)
    ratio, squares = small / large, np.asarray(values, dtype=float) ** 2 / (large * std**2)
    room = ((1 + math.sqrt(ratio)) ** 2 - squares) * (squares - (1 - math.sqrt(ratio)) ** 2)
    # density of the squares, times the slope 2 sigma / (large std^2) that leads back to the singular values
    return np.sqrt(np.maximum(room, 0)) / (math.pi * ratio * np.maximum(np.asarray(values, dtype=float), 1e-300))


def gaussian_like(matrix: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """White noise of the matrix's shape, type, device and Frobenius norm; a stack of matrices: each with its own
    norm.
    """
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(matrix)
    norms = (torch.linalg.matrix_norm(m, keepdim=True) for m in (matrix, noise))
    return noise * next(norms) / next(norms)


def sign_flipped(matrix: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The matrix with the sign of each entry drawn anew: every size stays in its place, so rows and columns keep
    their norms.
    """
    coins = torch.randint(0, 2, matrix.shape, generator=torch.Generator().manual_seed(seed))
    return matrix * (2 * coins - 1).to(matrix)


@dataclass(frozen=True)
class Factors:
    """Every update of a pair, decomposed once: name -> (W₀, U, S, Vh) with U (out, k), S (k,), Vh (k, in)."""

    deltas: Deltas
    parts: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]

    def energy_kept(self, rank: int) -> float:
        """Share of the squared change of all matrices together that their best rank-`rank` parts keep, no unit."""
        squares = [S.cpu().double().square() for _, _, S, _ in self.parts.values()]
        return (sum(s[:rank].sum() for s in squares) / sum(s.sum() for s in squares)).item()


def factor(deltas: Deltas) -> Factors:
    """All singular vectors of all updates, held in memory: for models that fit there three times over."""
    return Factors(deltas,
                   {name: (weight.clone(), *torch.linalg.svd(delta, full_matrices=False)) for name, weight,
                    delta in deltas})


def truncate(model: nn.Module, deltas: Deltas | Factors, rank: int, *, rest: str) -> nn.Module:
    """A copy of the model whose matrices are W₀ plus the best rank-`rank` part of their update.

    Args:
        model: the base or the tuned model; it gives the architecture and is not changed.
        deltas: what `deltas(base, tuned)` returned, or `factor` of it where several ranks will be asked for.
        rank: 0 is W₀ itself; from the smaller side of a matrix on, its whole update.
        rest: whose biases, norms and embeddings: "base" or "tuned". There is no default, because it changes the answer.

    Raises:
        ValueError: a rest that is neither, a rank that is no whole number from 0, a tensor of that side that has
            another shape than the model's (a vocabulary that grew), a matrix that the model has not.

    Source: Eckart and Young (1936).

    >>> from lora_edu import deltas
    >>> base, tuned = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
    >>> cut = truncate(base, deltas(base, tuned), rank=1, rest="base")
    >>> torch.linalg.matrix_rank(cut[0].weight - base[0].weight).item()
    1
    """
    if rest not in ("base", "tuned"):
        raise ValueError(f"rest={rest!r}: choose 'base' or 'tuned', whose biases, "
                         "norms and embeddings the model shall have.")
    if whole(rank) is None or rank < 0:
        raise ValueError(f"rank={rank!r} is not a number of directions to keep: choose a whole number from 0.")
    factors = deltas if isinstance(deltas, Factors) else factor(deltas)
    side, cut = getattr(factors.deltas, rest), copy.deepcopy(model)
    grown = [name for name, place in cut.state_dict().items() if name.removesuffix(".weight") not in factors.parts
             and name in side.names and side.shapes[name] != tuple(place.shape)]
    if grown:
        other = "base" if rest == "tuned" else "tuned"
        raise ValueError(f"{grown[0]} is {side.shapes[grown[0]]} on the {rest} side and of another shape in the model "
                         f"that was given: give the {rest} model, or choose rest={other!r}.")
    if lost := factors.parts.keys() - {name for place in cut.state_dict() for name in (place, place[:-len(".weight")])}:
        raise ValueError(f"the model has no {min(lost)}, which the update changes: give the base, or a model with its "
                         "names.")
    with torch.no_grad():
        for name, place in cut.state_dict(keep_vars=True).items():
            # a matrix that is no layer's weight (an LSTM's) keeps its whole name
            module = name.removesuffix(".weight")
            if module in factors.parts:
                W0, U, S, Vh = factors.parts[module]
                weight = W0 + (U[:, :rank] * S[:rank]) @ Vh[:rank]
                turned = module != name and is_conv1d(cut.get_submodule(module))
                place.copy_((weight.T if turned else weight).reshape(place.shape))
            elif name in side.names:
                place.copy_(side.get(name))
    return cut
