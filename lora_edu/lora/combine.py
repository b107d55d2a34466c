"""Several adapters of one base made into one, on disk: their updates are added, each with a weight.

What adds up are the updates B A, never the factors: (B₁ + B₂)(A₁ + A₂) has the products B₁A₂ and B₂A₁ in it, which
nobody trained. The exact sum has the ranks side by side (B₁ beside B₂, A₁ over A₂), so ranks add; cut back to fewer
by its singular values, it is the nearest there is (Eckart and Young 1936), and what was lost is told.

Source: PEFT 0.21, `add_weighted_adapter`, whose "cat" and "svd" these are; its "linear" adds the factors.
"""
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_edu.files import check_new_folder, read_json
from lora_edu.lora.adapter_config import CONFIG, patterns
from lora_edu.lora.adapter_file import adapter_config, pairs_of, read_adapter, write_adapter
from lora_edu.lora.fingerprint import same_base
from lora_edu.lora.settings import scaling_of
from lora_edu.lora.targets import by_ending, shorten
from lora_edu.numbers import real, whole
from lora_edu.tables import ShowsTables, Table


@dataclass(frozen=True, repr=False)
class CombineReport(ShowsTables):
    """What `combine_adapters` wrote: rank by module, bytes of the tensor file, and the share of the sum's norm that a
    smaller rank left out, 0 to 1, by module and for all.
    """

    ranks: dict[str, int] = field(repr=False)
    lost: dict[str, float] = field(repr=False)
    total_lost: float
    bytes: int
    folder: Path

    def tables(self) -> list[Table]:
        lost = by_ending(self.lost)
        rows = [(ending, str(len(ranks)), str(max(ranks)), f"{max(lost[ending]):.1%}")
                for ending, ranks in by_ending(self.ranks).items()]
        return [Table(("layer", "count", "rank", "lost at most"), rows,
                      f"{self.total_lost:.1%} of the sum is lost (‖sum - kept‖ / ‖sum‖); {self.bytes:,} bytes.")]


def combine_adapters(folders: Sequence[str | Path], weights: Sequence[float], out: str | Path, rank: int | None = None,
                     dtype: torch.dtype = torch.float32) -> CombineReport:
    """Write the weighted sum of several adapters' updates as one adapter, in PEFT's format.

    Args:
        folders: adapters of one base; their ranks, alphas and targets may differ.
        weights: one each, of any sign: 1 and 1 add, 0.5 and 0.5 lie between, -1 takes away.
        out: a folder that is made, or an empty one.
        rank: None keeps the sum exactly, at the sum of the ranks; a number cuts each layer back to it.

    Raises (then nothing is written):
        FileExistsError: `out` is a file, or a folder with something in it.
        ValueError: not one weight for each of at least one folder, a rank that is none, adapters of different bases, or
            one that brings more than updates of linear layers: whole modules do not add.

    >>> import tempfile
    >>> from lora_edu.models.pretrained import BISTRO_ADAPTER
    >>> report = combine_adapters([BISTRO_ADAPTER] * 2, [0.5, 0.5], f"{tempfile.mkdtemp()}/sum", rank=6)
    >>> max(report.ranks.values()), report.total_lost < 1e-6
    (6, True)
    """
    out, weights = Path(out), list(weights)
    check_new_folder(out)
    if not folders or len(weights) != len(folders) or any(real(w) is None for w in weights):
        raise ValueError(f"{len(folders)} folders and the weights {weights}: give one finite number for each adapter.")
    if rank is not None and (whole(rank) is None or rank < 1):
        raise ValueError(f"rank={rank!r} is no rank: choose a whole number from 1, or None for the exact sum.")
    factors, base = _weighted(folders, weights)
    tensors, ranks, lost, squares = {}, {}, {}, {}
    for name, (A, B) in factors.items():
        squares[name], lost[name] = ((B.T @ B).double() * (A @ A.T)).sum().item(), 0.0
        if rank is not None and rank < len(A):
            A, B, lost[name] = _cut(A, B, rank)
        ranks[name] = len(A)
        tensors |= {f"{name}.lora_A.weight": A.to(dtype), f"{name}.lora_B.weight": B.to(dtype)}
    usual = max(ranks.values())
    own = patterns(ranks, usual)
    config = _shared(folders, list(ranks)) | {"r": usual, "lora_alpha": usual, "lora_dropout": 0.0,
                                              "rank_pattern": own, "alpha_pattern": own}
    size = write_adapter(out, tensors, config, base)
    all_squares = sum(squares.values())
    total = math.sqrt(sum(lost[name]**2 * squares[name] for name in lost) / (all_squares or 1))
    return CombineReport(ranks, lost, total, size, out)


def _weighted(folders: Sequence[str | Path], weights: list[float]) -> tuple[dict, str | None]:
    """Module -> the factors of the exact sum, A (sum of ranks, in) and B (out, sum of ranks) with scalings and weights
    in it; and the fingerprint of the base, if every part has one.
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    bases: list[str | None] = []
    for folder, weight in zip(map(Path, folders), weights):
        config, stored, base = read_adapter(folder)
        bases.append(base)
        for name, (each, A, B) in pairs_of(folder, config, stored).items():
            scale = weight * scaling_of(each["rank"], each["alpha"], each["rslora"])
            parts.setdefault(name, []).append((A.float(), scale * B.float()))
    known = [base for base in bases if base]
    if any(not same_base(known[0], other) for other in known[1:]):
        raise ValueError(f"{', '.join(map(str, folders))} were made for different bases, and a sum of their updates "
                         "means nothing on either.")
    odd = [name for name, pairs in parts.items() if len({(A.shape[1], len(B)) for A, B in pairs}) > 1]
    if odd:
        raise ValueError(f"the factors of {shorten(odd, 2)} are of different widths in {', '.join(map(str, folders))}: "
                         "were they made for different bases?")
    return {name: (torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1))
            for name, pairs in parts.items()}, bases[0] if len(known) == len(bases) else None


def _shared(folders: Sequence[str | Path], modules: list[str]) -> dict:
    """The config of the sum, as far as those of its parts tell it."""
    configs = [read_json(Path(folder) / CONFIG, "an adapter_config.json") for folder in folders]
    # the names that they gave, where that is all they said of their targets: a server reads those best
    named = all(isinstance(each["target_modules"], list) and not each.get("exclude_modules")
                and not each.get("layers_to_transform") and not each.get("modules_to_save") for each in configs)
    targets = (sorted({name for each in configs for name in each["target_modules"]}) if named
               else "|".join(map(re.escape, modules)))          # a full name may be the ending of another
    return adapter_config(configs[0].get("base_model_name_or_path"), targets) | {
        "fan_in_fan_out": any(each.get("fan_in_fan_out") for each in configs)}


def _cut(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best rank-`rank` part of B A, its singular values split between the factors, and the share of the norm that
    it leaves out. B A itself is never made: thin factors have a thin QR.
    """
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.T.double())
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root, squares = S[:rank].sqrt(), S.square()
    lost = (squares[rank:].sum() / squares.sum()).sqrt().item() if squares.sum() else 0.0
    return (root[:, None] * (Vh[:rank] @ Qa.T)).float(), (Qb @ U[:, :rank] * root).float(), lost
