"""What an adapter's folder holds, without its base: rank, scaling, targets, sizes, how large each update is, and what
it asks for.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_edu.files import read_json, read_pickled, read_tensors
from lora_edu.lora.adapter_config import CONFIG, for_layer, read_config
from lora_edu.lora.adapter_file import OLD_TENSORS, PREFIX, TENSORS, plain_tensors
from lora_edu.lora.fingerprint import BASE
from lora_edu.lora.settings import scaling_of
from lora_edu.lora.targets import shorten
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
        kinds: dict[str, list[str]] = {}
        for name in self.ranks:
            kinds.setdefault(name.rpartition(".")[2], []).append(name)
        return [(ending, str(len(names)), *(low_to_high([values[name] for name in names], ".3g")
                                            for values in (self.ranks, self.scalings, self.norms)))
                for ending, names in kinds.items()]

    def tables(self) -> list[Table]:
        said = (f"{self.file_bytes:,} bytes: {self.number_bytes:,} of numbers ({', '.join(self.dtypes)}) and a "
                "header of "
                f"{self.file_bytes - self.number_bytes:,}.")
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
    file = next((folder / name for name in (TENSORS, OLD_TENSORS) if (folder / name).is_file()), folder / TENSORS)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}: give the folder of a LoRA adapter in PEFT's format.")
    said = read_json(folder / CONFIG, "an adapter_config.json that PEFT wrote")
    try:
        config, notes = read_config(folder), []
    except ValueError as error:
        config, notes = None, [f"It is not loaded here: {str(error).removeprefix(str(folder / CONFIG)).strip()}"]
    found, metadata = (read_pickled(file), {}) if file.name == OLD_TENSORS else read_tensors(file)
    tensors = plain_tensors(file, found)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    ranks = {name: tensors[f"{name}.lora_A.weight"].shape[0] for name in modules}
    scalings = {name: _scaling(config, said, name, rank) for name, rank in ranks.items()}
    norms = {name: _norm(tensors, name) * scalings[name] for name in modules if f"{name}.lora_B.weight" in tensors}
    others = [name for name in tensors if ".lora_" not in name]
    notes += _for_whom(said, metadata) + _odd(found, tensors, norms, others, ranks)
    dtypes = list(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors.values()))
    return AdapterFacts(folder, ranks, scalings, norms | {name: math.nan for name in modules if name not in norms},
                        others, dtypes, file.stat().st_size, sum(t.nbytes for t in tensors.values()), notes)


def _scaling(config: dict | None, said: Mapping, name: str, rank: int) -> float:
    if config is None:
        return float(said.get("lora_alpha") or 8) / (math.sqrt(rank) if said.get("use_rslora") else rank)
    each = for_layer(config, name)
    return scaling_of(rank, each["alpha"], each["rslora"])


def _norm(tensors: Mapping[str, torch.Tensor], name: str) -> float:
    """‖BA‖ without making B A: its square is the sum over BᵀB times AAᵀ, both (rank, rank)."""
    A, B = (tensors[f"{name}.lora_{end}.weight"].double().flatten(1) for end in "AB")
    return math.sqrt(max(0.0, ((B.T @ B) * (A @ A.T)).sum().item()))


def _for_whom(said: Mapping, metadata: Mapping) -> list[str]:
    named = said.get("base_model_name_or_path")
    known = "a fingerprint of it lies in the file" if BASE in metadata else "the file has no fingerprint of it"
    return [f"Made for {named!r}; {known}." if named else f"It does not name its base; {known}."]


def _odd(found: Mapping, tensors: Mapping, norms: Mapping[str, float], others: list[str], ranks: Mapping[str, int]
         ) -> list[str]:
    notes = []
    if bare := [name for name in found if not name.startswith(PREFIX)]:
        notes.append(f"{len(bare)} names have no {PREFIX!r} before them (first: {bare[0]}): PEFT loads such a file, "
                     "says "
                     "so in a warning, and leaves the model as it is.")
    if silent := [name for name, norm in norms.items() if not norm]:
        notes.append(f"The update of {len(silent)} of {len(norms)} layers is exactly zero.")
    if broken := [name for name, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]:
        notes.append(f"{shorten(broken, 2)} hold numbers that are not finite.")
    if others:
        notes.append(f"Whole modules come with it: {shorten(others, 3)}, {sum(tensors[n].nbytes for n in others):,} "
                     "bytes.")
    if ranks:
        notes.append(f"A server has to allow rank {max(ranks.values())} (vLLM: max_lora_rank).")
    return notes
