"""A LoRA cut out of a full fine-tune: the best rank-r part of what each matrix changed, written as an adapter that PEFT
loads.

By Eckart and Young (1936) no other matrix of rank r is nearer to ΔW than its r leading singular triplets; their energy,
the sum of the squared singular values, says how much of the change the adapter keeps. It says nothing of how much of
the *learning* it keeps.
"""
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lora_edu.checkpoints.deltas import ChangeReport, Deltas, deltas
from lora_edu.checkpoints.kinds import CARRIED, CONV1D
from lora_edu.lora.adapter_file import adapter_config, target_modules, write_adapter
from lora_edu.tables import ShowsTables, Table


@dataclass(frozen=True, repr=False)
class ExtractReport(ShowsTables):
    """What `extract_lora` wrote. Energies are shares of a squared change, 0 to 1.

    Attributes:
        shapes: name -> (out, in) of every matrix that is in the adapter; kept: name -> energy that its rank-r part
            keeps.
        energy: the same for all matrices together.
        bytes: of the adapter's tensor file.
        change: the table of what the adapter leaves out.
    """

    rank: int
    shapes: dict[str, tuple[int, int]] = field(repr=False)
    kept: dict[str, float] = field(repr=False)
    energy: float
    bytes: int
    folder: Path
    change: ChangeReport

    @property
    def targets(self) -> int:
        return len(self.shapes)

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each kind of matrix (name ending and shape): ending, how many, shape, smallest and largest
        energy kept.
        """
        kinds: dict[tuple[str, tuple[int, int]], list[float]] = {}
        for name, shape in self.shapes.items():
            kinds.setdefault((name.rpartition(".")[2], shape), []).append(self.kept[name])
        return [(ending, str(len(kept)), f"{shape[0]} x {shape[1]}", f"{min(kept):.1%} to {max(kept):.1%}")
                for (ending, shape), kept in kinds.items()]

    def summary(self) -> str:
        return (f"rank {self.rank} on {self.targets} matrices keeps {self.energy:.1%} of their squared change; "
                f"{self.bytes:,} bytes.")

    def tables(self) -> list[Table]:
        return [Table(("matrix", "count", "shape (out x in)", "energy kept"), self.rows(), self.summary()),
                *self.change.tables()]


def extract_lora(base: nn.Module | str | Path, tuned: nn.Module | str | Path, *, rank: int | None = None,
                 energy: float | None = None,
                 out: str | Path) -> ExtractReport:
    """Write the best LoRA of one rank for the change from `base` to `tuned`; both are read one tensor at a time.

    Every linear layer and convolution that changed becomes a target, with lora_alpha = rank (scaling 1) and the
    singular values split between the factors. A module is called what its tensor is called: for files whose names are
    not those of the model's class (GPT-2 without its "transformer."), pass the two models instead.

    Args:
        base, tuned: as in `deltas`.
        rank: of every pair of factors; or
        energy: the share of all matrices' squared change that must be kept, 0 < energy <= 1: the smallest rank that
            does so is taken, after a first reading for all singular values.
        out: a folder that is made, or an empty one. Nothing is left there if this fails.

    Returns:
        What was written and what it leaves out (biases, norms, embeddings); it displays as tables.

    Raises:
        FileExistsError: `out` is a file, or a folder with something in it.
        ValueError: both or neither of rank and energy, a rank over the smaller side of a matrix that changed, no matrix
            that changed, and what `deltas` raises.

    Source: Eckart and Young (1936).

    >>> import copy, tempfile
    >>> base = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> tuned = copy.deepcopy(base)
    >>> tuned[0].weight.data += torch.outer(torch.ones(4), torch.ones(6))      # one direction
    >>> report = extract_lora(base, tuned, rank=1, out=tempfile.mkdtemp())
    >>> report.targets, round(report.energy, 4)
    (1, 1.0)
    """
    _check_wishes(rank, energy)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and is no empty folder: give a new name, or remove it first.")
    pair = deltas(base, tuned)
    targets = [name for name, kind in pair.matrices.items() if kind in CARRIED]
    asked = f"rank={rank}"
    if rank is None:
        rank = _rank_for_energy(pair, targets, energy)
        asked = f"energy={energy:g} needs rank {rank}, which"
    _refuse_narrow(pair, targets, rank, asked)
    factors, kept = _factorize(pair, targets, rank)
    change = pair.report()                  # reads the rest: what is broken there is found before anything is written
    if not kept:
        raise ValueError(f"no matrix of {pair.base.source} changed that an adapter could carry, so there is nothing to "
                         f"extract: are the two sides the same? {change.summary()}")
    modules = {name.removesuffix(".weight"): name for name in kept}
    config = adapter_config(rank, rank, target_modules(list(modules), pair.base.module_names), _source_name(base),
                            any(pair.matrices[name] == CONV1D for name in kept))
    size = write_adapter(out, factors, config)
    return ExtractReport(rank, {module: _matrix_shape(pair, name) for module, name in modules.items()},
                         {module: share(kept[name], pair.measured[name].squared) for module, name in modules.items()},
                         share(sum(kept.values()), change.squared), size, out, change)


def _check_wishes(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank}, energy={energy}: give exactly one of them, a rank such as 16 or a share of the "
                         "change such as 0.9.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r} is no rank: choose a whole number from 1, for example 16.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} is no share of the change: choose 0 < energy <= 1, for example 0.9.")


def _rank_for_energy(pair: Deltas, targets: list[str], energy: float) -> int:
    """The smallest rank at which all matrices together keep this share of their squared change."""
    squares = torch.zeros(max((min(_matrix_shape(pair, name)) for name in targets), default=1), dtype=torch.float64)
    for name in _bar(targets, "singular values"):
        values = singular_values(pair, name)
        squares[:len(values)] += values.double().cpu().square()
    kept = squares.cumsum(0)
    # 1e-12: the last sum may be a rounding error short
    return int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1


def singular_values(pair: Deltas, name: str) -> torch.Tensor:
    return torch.linalg.svdvals(pair.delta(name).delta)


def _refuse_narrow(pair: Deltas, targets: list[str], rank: int, asked: str) -> None:
    """Raise ValueError if a matrix that changed has a side shorter than the rank; only those that could are read."""
    narrow = [name for name in targets if min(_matrix_shape(pair, name)) < rank]
    changed = [name for name in narrow if pair.subtract(name)[2].squared]
    if changed:
        name = min(changed, key=lambda name: min(_matrix_shape(pair, name)))
        shape = _matrix_shape(pair, name)
        raise ValueError(f"{asked} does not fit {name.removesuffix('.weight')}, which is {shape[0]} x {shape[1]} and "
                         f"changed: the largest rank that fits every matrix here is {min(shape)}.")


def _factorize(pair: Deltas, targets: list[str], rank: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The factors of each matrix that changed, and the squared change that they keep: tensor name -> number."""
    factors, kept = {}, {}
    for name in _bar(targets, "extract"):
        module, delta = name.removesuffix(".weight"), pair.delta(name).delta
        if pair.measured[name].squared:
            U, S, Vh = best_part(delta, rank)
            kept[name] = S.double().square().sum().item()
            kernel = pair.base.shapes[name][2:]                 # () for a linear layer
            A, B = (S.sqrt()[:, None] * Vh).float().cpu(), (U * S.sqrt()).float().cpu()
            factors[f"{module}.lora_A"] = A.reshape(rank, A.shape[1] // math.prod(kernel), *kernel)
            factors[f"{module}.lora_B"] = B.reshape(len(B), rank, *(1 for _ in kernel))
        del delta                                               # before the next one is read
    return factors, kept


def best_part(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading `rank` singular triplets of a matrix (out, in): U (out, rank), S (rank,) in falling order, Vh (rank,
    in).

    Randomised (Halko et al. 2011, arXiv:0909.4061), but with the same numbers every time: of the energy that the best
    part of real updates keeps, 8 iterations miss a share of 3.5e-6 at most, 4 would miss 3e-4.
    """
    columns = max(2 * rank, 16)                         # fewer cost nearly as much time
    if min(delta.shape) <= max(512, 2 * columns):       # small, or asked for most of it: all of it costs no more
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
