"""What an adapter's folder holds, without its base: rank, scaling, targets, sizes, how large each update is, and what
it asks for.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_edu.files import read_json
from lora_edu.lora.adapter_config import CONFIG, for_layer, read_config
from lora_edu.lora.adapter_file import PREFIX, plain_tensors, stored_tensors, tensor_file
from lora_edu.lora.fingerprint import BASE
from lora_edu.lora.misfit import all_finite
from lora_edu.lora.settings import scaling_of
from lora_edu.lora.targets import by_ending, shorten
from lora_edu.numbers import low_to_high
from lora_edu.tables import ShowsTables, Table


@dataclass(frozen=True, repr=False)
class AdapterFacts(ShowsTables):
    """What `inspect_adapter` found.

    Attributes:
        ranks, scalings, norms: by module; a norm is that of the whole update, ‖scaling·BA‖ (Frobenius).
        others: names of tensors that are no factors, such as a head that was saved whole.
        file_bytes: of the tensor file; number_bytes: of its numbers, the rest is a header that names them.
        notes: what it was made for, what it needs, what is odd; one sentence each.
    """

    folder: Path
    ranks: dict[str, int]
    scalings: dict[str, float]
    norms: dict[str, float] = field(repr=False)
    others: list[str]
    dtypes: list[str]
    file_bytes: int
    number_bytes: int
    notes: list[str]

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each name ending."""
        kinds = [by_ending(values) for values in (self.ranks, self.scalings, self.norms)]
        return [(ending, str(len(ranks)), *(low_to_high(kind[ending], ".3g") for kind in kinds))
                for ending, ranks in kinds[0].items()]

    def tables(self) -> list[Table]:
        said = (f"{self.file_bytes:,} bytes: {self.number_bytes:,} of numbers ({', '.join(self.dtypes)}) and a "
                f"header of {self.file_bytes - self.number_bytes:,}.")
        return [Table(("layer", "count", "rank", "scaling", "‖ΔW‖"), self.rows(), "\n".join([said, *self.notes]))]


def inspect_adapter(folder: str | Path) -> AdapterFacts:
    """Look at an adapter on disk in PEFT's format; also at one that cannot be loaded here, and then its notes say why.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or no config.

    >>> from lora_edu.models.pretrained import BISTRO_ADAPTER
    >>> facts = inspect_adapter(BISTRO_ADAPTER)
    >>> facts.file_bytes - facts.number_bytes, set(facts.ranks.values()), set(facts.scalings.values())
    (10704, {6}, {2.0})
    """
    folder = Path(folder)
    file = tensor_file(folder)
    said = read_json(folder / CONFIG, "an adapter_config.json that PEFT wrote")
    try:
        config, notes = read_config(folder), []
    except ValueError as error:
        config, notes = None, [f"It is not loaded here: {str(error).removeprefix(str(folder / CONFIG)).strip()}"]
    found, metadata = stored_tensors(file)
    tensors = plain_tensors(file, found)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    ranks = {name: len(A) if (A := tensors[f"{name}.lora_A.weight"]).ndim else 0 for name in modules}
    scalings = {name: _scaling(config or said, name, rank) for name, rank in ranks.items()}
    norms = {name: _norm(tensors, name) * abs(scalings[name]) for name in modules}
    others = [name for name in tensors if ".lora_" not in name]
    notes += _for_whom(said, metadata) + _odd(found, tensors, norms, others, ranks, config)
    dtypes = list(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors.values()))
    return AdapterFacts(folder, ranks, scalings, norms, others, dtypes, file.stat().st_size,
                        sum(t.nbytes for t in tensors.values()), notes)


def _scaling(said: Mapping, name: str, rank: int) -> float:
    """nan where the config does not say it: it may be one that is not read here."""
    usual = {"r": rank, "lora_alpha": 8, "use_rslora": False, "lora_dropout": 0.0, "rank_pattern": {},
             "alpha_pattern": {}}
    try:
        each = for_layer(usual | {key: said[key] for key in usual if said.get(key) is not None}, name)
        return scaling_of(rank, each["alpha"], each["rslora"])
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return math.nan


def _norm(tensors: Mapping[str, torch.Tensor], name: str) -> float:
    """‖BA‖ without making B A: its square is the sum over BᵀB times AAᵀ, both (rank, rank). nan without a pair."""
    A, B = (tensors.get(f"{name}.lora_{end}.weight") for end in "AB")
    if B is None or A.ndim < 2 or B.ndim < 2 or len(A) != B.shape[1] or not A.is_floating_point():
        return math.nan
    A, B = (t.double().flatten(1) for t in (A, B))
    return math.sqrt(max(((B.T @ B) * (A @ A.T)).sum().item(), 0.0))          # in this order a nan stays one


def _for_whom(said: Mapping, metadata: Mapping) -> list[str]:
    named = said.get("base_model_name_or_path")
    known = "a fingerprint of it lies in the file" if BASE in metadata else "the file has no fingerprint of it"
    return [f"Made for {named!r}; {known}." if named else f"It does not name its base; {known}."]


def _odd(found: Mapping, tensors: Mapping, norms: Mapping[str, float], others: list[str], ranks: Mapping[str, int],
         config: Mapping | None) -> list[str]:
    notes = []
    if bare := [name for name in found if not name.startswith(PREFIX)]:
        notes.append(f"{len(bare)} names have no {PREFIX!r} before them (first: {bare[0]}): PEFT loads such a file, "
                     "says so in a warning, and leaves the model as it is.")
    paired = {f"{name}.lora_{end}.weight" for name in ranks for end in "AB"}
    lonely = [name for name in tensors if ".lora_" in name and name not in paired]
    if lonely := lonely + [name for name in ranks if f"{name}.lora_B.weight" not in tensors]:
        notes.append(f"{shorten(lonely, 2)}: no pair of a lora_A and a lora_B.")
    if config and (other := [n for n, rank in ranks.items() if rank != for_layer(config, n)["rank"]]):
        notes.append(f"The config gives {shorten(other, 2)} another rank than the file has.")
    if whole := [name for name, t in tensors.items() if ".lora_" in name and not t.is_floating_point()]:
        notes.append(f"{shorten(whole, 2)} hold no floating numbers.")
    if silent := [name for name, norm in norms.items() if not norm]:
        notes.append(f"The update of {len(silent)} of {len(norms)} layers is exactly zero.")
    if broken := [name for name, t in tensors.items() if not all_finite(t)]:
        notes.append(f"{shorten(broken, 2)} hold numbers that are not finite.")
    if others:
        notes.append(f"Whole modules come with it: {shorten(others, 3)}, {sum(tensors[n].nbytes for n in others):,} "
                     "bytes.")
    if ranks:
        notes.append(f"A server has to allow rank {max(ranks.values())} (vLLM: max_lora_rank).")
    return notes
