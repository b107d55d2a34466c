"""A LoRA cut out of a full fine-tune: the best rank-r part of what each matrix changed, written as an adapter that PEFT
loads.

By Eckart and Young (1936) no other matrix of rank r is nearer to ΔW than its r leading singular triplets; their energy,
the sum of the squared singular values, says how much of the change the adapter keeps. It says nothing of how much of
the *learning* it keeps.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lora_edu.checkpoints.deltas import ChangeReport, Deltas, deltas
from lora_edu.checkpoints.kinds import CARRIED, CONV1D
from lora_edu.checkpoints.reading import Side
from lora_edu.files import check_new_folder
from lora_edu.lora.adapter_config import patterns
from lora_edu.lora.adapter_file import adapter_config, target_modules, write_adapter
from lora_edu.lora.fingerprint import TENSORS, fingerprint_of
from lora_edu.numbers import real, whole
from lora_edu.tables import ShowsTables, Table


@dataclass(frozen=True, repr=False)
class ExtractReport(ShowsTables):
    """What `extract_lora` wrote. Energies are shares of a squared change, 0 to 1.

    Attributes:
        shapes: name -> (out, in) of every matrix that is in the adapter; ranks: name -> its rank; kept: name -> energy
            that its rank-r part keeps.
        capped: names of the matrices whose smaller side is below the rank that was asked for: they are kept whole.
        energy: the same for all matrices together.
        bytes: of the adapter's tensor file.
        change: the table of what the adapter leaves out.
    """

    shapes: dict[str, tuple[int, int]] = field(repr=False)
    ranks: dict[str, int] = field(repr=False)
    kept: dict[str, float] = field(repr=False)
    energy: float
    bytes: int
    folder: Path
    change: ChangeReport
    capped: list[str] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks.values())

    @property
    def targets(self) -> int:
        return len(self.shapes)

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of matrix (name ending and shape): ending, how many, shape, smallest and largest
        rank, and energy kept.
        """
        kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
        for name, shape in self.shapes.items():
            kinds.setdefault((name.rpartition(".")[2], shape), []).append(name)
        rows = []
        for (ending, shape), names in kinds.items():
            ranks, kept = sorted(self.ranks[name] for name in names), sorted(self.kept[name] for name in names)
            spread = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else str(ranks[0])
            rows.append((ending, str(len(names)), f"{shape[0]} x {shape[1]}",
                         spread + " (capped)" * any(name in self.capped for name in names),
                         f"{kept[0]:.1%} to {kept[-1]:.1%}"))
        return rows

    def summary(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        capped = (f" {len(self.capped)} are narrower than the rank and kept whole (first: {self.capped[0]})."
                  if self.capped else "")
        return (f"rank {f'{ranks[0]} to ' * (len(ranks) > 1)}{ranks[-1]} on {self.targets} matrices keeps "
                f"{self.energy:.1%} of their squared change; {self.bytes:,} bytes.{capped}")

    def tables(self) -> list[Table]:
        return [Table(("matrix", "count", "shape (out x in)", "rank", "energy kept"), self.rows(), self.summary()),
                *self.change.tables()]


def extract_lora(base: nn.Module | str | Path, tuned: nn.Module | str | Path, *, rank: int | None = None,
                 energy: float | None = None, out: str | Path, kinds: Mapping[str, str] | None = None) -> ExtractReport:
    """Write the best LoRA for the change from `base` to `tuned`; both are read one tensor at a time.

    Every linear layer and convolution that changed becomes a target, with alpha = rank (scaling 1) and the singular
    values split between the factors. What a file does not tell is not guessed: convolutions of bare files are left out
    and counted. A module is called what its tensor is called: for files whose names are not those of the model's class
    (GPT-2 without its "transformer."), pass the two models instead.

    Args:
        base, tuned, kinds: as in `deltas`.
        rank: of every pair of factors, capped at the smaller side of a matrix; or
        energy: the share of its squared change that each matrix must keep, 0 < energy <= 1: it gets the smallest rank
            that does so.
        out: a folder that is made, or an empty one. Nothing is left there if this fails.

    Returns:
        What was written and what it leaves out (biases, norms, embeddings); it displays as tables.

    Raises:
        FileExistsError: `out` is a file, or a folder with something in it.
        ValueError: both or neither of rank and energy, no matrix that changed, and what `deltas` raises.

    Source: Eckart and Young (1936).

    >>> import copy, tempfile
    >>> base = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> tuned = copy.deepcopy(base)
    >>> tuned[0].weight.data += torch.outer(torch.ones(4), torch.ones(6))      # one direction
    >>> report = extract_lora(base, tuned, rank=1, out=tempfile.mkdtemp())
    >>> report.targets, round(report.energy, 4)
    (1, 1.0)
    """
    rank, energy = _check_wishes(rank, energy)
    out = Path(out)
    check_new_folder(out)
    pair = deltas(base, tuned, kinds)
    targets = [name for name, kind in pair.matrices.items() if kind in CARRIED]
    factors, kept, ranks = _factorize(pair, targets, rank, energy)
    change = pair.report()                  # reads the rest: what is broken there is found before anything is written
    if not kept:
        why = "are the two sides the same?" if targets else "none is a linear layer's weight, as far as names tell."
        raise ValueError(f"no matrix of {pair.base.source} changed that an adapter could carry, so there is nothing to "
                         f"extract: {why} {change.summary()}")
    usual = rank or max(ranks.values())
    own = patterns(ranks, usual)
    config = adapter_config(_source_name(base), target_modules(list(ranks), pair.base.module_names)) | {
        "r": usual, "lora_alpha": usual, "rank_pattern": own, "alpha_pattern": own, "lora_dropout": 0.0,
        "fan_in_fan_out": any(pair.matrices[f"{name}.weight"] == CONV1D for name in ranks)}
    size = write_adapter(out, factors, config, fingerprint_of(stays(pair.base, pair.set_aside)))
    shapes = {name: _matrix_shape(pair, f"{name}.weight") for name in ranks}
    squares = {name: pair.measured[f"{name}.weight"].squared for name in ranks}
    return ExtractReport(shapes, ranks, {name: share(kept[name], squares[name]) for name in ranks},
                         share(sum(kept.values()), change.squared), size, out, change,
                         [name for name in ranks if rank and ranks[name] < rank])


def _check_wishes(rank: int | None, energy: float | None) -> tuple[int | None, float | None]:
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank}, energy={energy}: give exactly one of them, a rank such as 16 or a share of the "
                         "change such as 0.9.")
    if rank is not None and (whole(rank) is None or rank < 1):
        raise ValueError(f"rank={rank!r} is no rank: choose a whole number from 1, for example 16.")
    if energy is not None and (real(energy) is None or not 0 < energy <= 1):
        raise ValueError(f"energy={energy!r} is no share of the change: choose 0 < energy <= 1, for example 0.9.")
    return whole(rank), real(energy)


def stays(side: Side, kinds: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A side's tensors that no adapter goes beside, by name: its fingerprint is made of them."""
    names = [name for name, kind in kinds.items() if kind in ("embedding", "norm")]
    largest = sorted(names, key=lambda name: -math.prod(side.shapes[name]))[:TENSORS]
    return {name: side.get(name) for name in largest}


def _factorize(pair: Deltas, targets: list[str], rank: int | None, energy: float | None
               ) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, int]]:
    """The factors of each matrix that changed by their names in the file, the squared change that they keep, and their
    rank, by module.
    """
    factors, kept, ranks = {}, {}, {}
    for name in _bar(targets, "extract"):
        module, delta = name.removesuffix(".weight"), pair.delta(name).delta
        if pair.measured[name].squared:
            U, S, Vh = best_part(delta, rank) if rank else _enough(delta, energy)
            kept[module], ranks[module] = S.cpu().double().square().sum().item(), len(S)
            kernel = pair.base.shapes[name][2:]                 # () for a linear layer
            A, B = (S.sqrt()[:, None] * Vh).float().cpu(), (U * S.sqrt()).float().cpu()
            factors[f"{module}.lora_A.weight"] = A.reshape(len(A), A.shape[1] // math.prod(kernel), *kernel)
            factors[f"{module}.lora_B.weight"] = B.reshape(*B.shape, *(1 for _ in kernel))
        del delta                                               # before the next one is read
    return factors, kept, ranks


def _enough(delta: torch.Tensor, energy: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As few singular triplets as keep this share of the squared change."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    kept = S.cpu().double().square().cumsum(0)              # Apple's GPUs have no float64
    rank = int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1     # the last sum may be a rounding error short
    return U[:, :rank].clone(), S[:rank].clone(), Vh[:rank].clone()


def best_part(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading `rank` singular triplets of a matrix (out, in), or all where there are fewer: U (out, rank), S
    (rank,) in falling order, Vh (rank, in).

    Randomised (Halko et al. 2011, arXiv:0909.4061), but with the same numbers every time: of the energy that the best
    part of real updates keeps, 8 iterations miss a share of 3.5e-6 at most, 4 would miss 3e-4.
    """
    columns = max(2 * rank, 16)                         # fewer cost nearly as much time
    if min(delta.shape) <= max(256, 4 * columns):       # small, or asked for much of it: all of it costs no more
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return U[:, :rank].clone(), S[:rank].clone(), Vh[:rank].clone()
    with torch.random.fork_rng([delta.device] if delta.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(delta, q=columns, niter=8)
    return U[:, :rank], S[:rank], V[:, :rank].T


def _matrix_shape(pair: Deltas, name: str) -> tuple[int, int]:
    """(out, in) of a matrix, as `deltas` yields it."""
    shape = pair.base.shapes[name]
    rows, columns = shape[0], math.prod(shape[1:])
    return (columns, rows) if pair.matrices[name] == CONV1D else (rows, columns)


def _bar(names: list[str], what: str):
    from tqdm.auto import tqdm  # late: `import lora_edu` does not need it
    return tqdm(names, desc=what, unit="matrix", leave=False)


def share(part: float, whole: float) -> float:
    return min(part / whole, 1.0)       # a rounding error may put it above


def _source_name(source: nn.Module | str | Path) -> str | None:
    return (getattr(source, "name_or_path", None) or None) if isinstance(source, nn.Module) else str(source)
