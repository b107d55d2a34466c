"""Adapters in the layouts of other programs, turned into PEFT's: loralib, kohya and diffusers, MLX, a bare list.

They call the same two matrices by other names, put underscores for the dots of a module's name, or transpose them; and
where alpha lies, if anywhere, differs too. So nothing is guessed: every tensor must find its place in a base, by name
and by shape, and an alpha that the file does not hold must be given.

Sources: loralib 0.1.2, `lora_state_dict`; kohya-ss sd-scripts, `networks/lora.py`; diffusers, "LoRA" file formats; MLX
examples, `lora.py`.
"""
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lora_edu.checkpoints.extract import stays
from lora_edu.checkpoints.kinds import BARE, CARRIED, CONV1D, kind_of, stores_conv1d
from lora_edu.checkpoints.reading import open_side
from lora_edu.files import PICKLED, check_new_folder, read_pickled, read_tensors
from lora_edu.lora.adapter_config import patterns
from lora_edu.lora.adapter_file import adapter_config, target_modules, write_adapter
from lora_edu.lora.fingerprint import fingerprint_of
from lora_edu.lora.layer import FLOATS
from lora_edu.lora.targets import by_ending, ends_in, shorten
from lora_edu.numbers import low_to_high, real
from lora_edu.tables import ShowsTables, Table

# how a tensor's name ends -> whose way it is, which factor it is, is it transposed
LAYOUTS = (
    (r"\.lora_a(?:\.weight)?$", "MLX", "A", True), (r"\.lora_b(?:\.weight)?$", "MLX", "B", True),
    (r"\.lora_A$", "loralib", "A", False), (r"\.lora_B$", "loralib", "B", False),
    (r"\.lora_A(?:\.\w+)?\.weight$", "PEFT", "A", False), (r"\.lora_B(?:\.\w+)?\.weight$", "PEFT", "B", False),
    (r"[._]lora(?:_linear_layer)?[._]down\.weight$", "kohya or diffusers", "A", False),
    (r"[._]lora(?:_linear_layer)?[._]up\.weight$", "kohya or diffusers", "B", False),
    (r"\.alpha$", "kohya or diffusers", "alpha", False))


class Pair(NamedTuple):
    A: torch.Tensor         # (rank, in), or (rank, in, *kernel)
    B: torch.Tensor         # (out, rank), or (out, rank, 1, …)
    alpha: float


@dataclass(frozen=True, repr=False)
class ConvertReport(ShowsTables):
    """What `convert_adapter` wrote: the layout that was read, the pairs by module, the bytes of the tensor file."""

    layout: str
    pairs: dict[str, Pair] = field(repr=False)
    bytes: int
    folder: Path

    def tables(self) -> list[Table]:
        rows = [(ending, str(len(pairs)), low_to_high(len(p.A) for p in pairs), low_to_high(p.alpha for p in pairs))
                for ending, pairs in by_ending(self.pairs).items()]
        return [Table(("layer", "count", "rank", "alpha"), rows,
                      f"{self.layout}: {len(self.pairs)} pairs of factors, all of them placed; {self.bytes:,} bytes in "
                      f"{self.folder}.")]


def convert_adapter(file: str | Path, base: nn.Module | str | Path, out: str | Path, alpha: float | None = None,
                    targets: Sequence[str] | None = None) -> ConvertReport:
    """Write an adapter of another layout as a folder in PEFT's format.

    Args:
        file: .safetensors, or an old .bin or .pt of plain tensors.
        base: the model it goes on, as in `deltas`; only names and shapes are read, and what makes its fingerprint.
        out: a folder that is made, or an empty one.
        alpha: for a file that holds none; loralib's layers have 1 where nothing was said, MLX's scale is alpha / rank.
        targets: of a bare list of factors, the endings of the modules in the list's order within a layer, such as
            ("q_proj", "v_proj"); layers go by their numbers.

    Raises (then nothing is written):
        FileExistsError: `out` is a file, or a folder with something in it.
        ValueError: an alpha that is missing, or is another than the file's; a tensor that finds no place.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> file, base = f"{tempfile.mkdtemp()}/lora.safetensors", nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    >>> save_file({"0.lora_A": torch.randn(2, 12), "0.lora_B": torch.randn(8, 2)}, file)
    >>> convert_adapter(file, base, f"{tempfile.mkdtemp()}/peft", alpha=4)      # doctest: +ELLIPSIS
    layer  count  rank  alpha
        0      1     2      4
    loralib: 1 pairs of factors, all of them placed; ... bytes in ...
    """
    out, file = Path(out), Path(file)
    check_new_folder(out)
    if file.is_dir():
        raise ValueError(f"{file} is a folder: give the file of tensors in it.")
    if alpha is not None and real(alpha) is None:
        raise ValueError(f"alpha={alpha!r} is no finite number: choose one such as 16.")
    tensors = read_pickled(file, lists=True) if file.suffix in PICKLED else read_tensors(file)[0]
    side = open_side(base)
    conv1d = stores_conv1d(side.shapes)
    kinds = {name.removesuffix(".weight"): kind_of(name, shape, side.layer(name), conv1d)
             for name, shape in side.shapes.items() if name.endswith(".weight")}
    places = {name: side.shapes[f"{name}.weight"] for name, kind in kinds.items() if kind in (*CARRIED, BARE)}
    places = {name: shape[::-1] if kinds[name] == CONV1D else shape for name, shape in places.items()}
    if all(name.isdigit() for name in tensors):
        layout, grouped = "a bare list", _listed(file, tensors, places, targets)
    else:
        layout, grouped = _grouped(file, tensors)
        names = _placed(file, list(grouped), list(places), side.source)
        grouped = {names[name]: found for name, found in grouped.items()}
    pairs = {name: _pair(file, name, found, places[name], alpha) for name, found in grouped.items()}
    config = adapter_config(None if isinstance(base, nn.Module) else str(base),
                            target_modules(list(pairs), side.module_names))
    usual = next(iter(pairs.values()))
    config |= {"r": len(usual.A), "lora_alpha": usual.alpha, "lora_dropout": 0.0,
               "rank_pattern": patterns({name: len(p.A) for name, p in pairs.items()}, len(usual.A)),
               "alpha_pattern": patterns({name: p.alpha for name, p in pairs.items()}, usual.alpha),
               "fan_in_fan_out": any(kinds[name] == CONV1D for name in pairs)}
    factors = {f"{name}.lora_{end}.weight": getattr(pair, end) for name, pair in pairs.items() for end in "AB"}
    base = fingerprint_of(stays(side, {f"{name}.weight": kind for name, kind in kinds.items()}))
    return ConvertReport(layout, pairs, write_adapter(out, factors, config, base), out)


def _grouped(file: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """Whose layout it is, and by the module's name in the file: "A", "B" and "alpha"."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    layouts, strange = {}, []
    for name, tensor in tensors.items():
        hit = next(((re.search(end, name), whose, factor, turned) for end, whose, factor, turned in LAYOUTS
                    if re.search(end, name)), None)
        if hit is None:
            strange.append(name)
            continue
        match, whose, factor, turned = hit
        module = re.sub(r"(^|\.)processor\.", r"\1", name[:match.start()])
        if factor in grouped.setdefault(module, {}):
            raise ValueError(f"{file} holds more than one {factor} for {module}: are there several adapters in it? "
                             "Keep one of them.")
        grouped[module][factor] = tensor.T if turned else tensor
        layouts[whose] = True
    if strange:
        raise ValueError(f"{file}: {len(strange)} of {len(tensors)} tensors are no factor of a LoRA by their names "
                         f"({shorten(strange, 3)}): convert the LoRA apart from what else was saved, and a variant "
                         "(DoRA, LoHa, LoKr) where it was made.")
    return " and ".join(layouts), grouped


def _placed(file: Path, theirs: list[str], ours: list[str], source: str) -> dict[str, str]:
    """Name of a module in the file -> its name in the base, where dots may be underscores and one prefix, the same for
    all, may be missing on either side.
    """
    base: dict[str, list[str]] = {}
    for name in ours:
        base.setdefault(_flat(name), []).append(name)
    found: list[dict[str, str]] = []
    flat = {name: _flat(name) for name in theirs}
    first = next(iter(flat.values()))
    cuts = {first[:at] for at in range(len(first)) if not at or first[at - 1] == "_"}
    adds = {name[:-len(first)] for name in base if name.endswith("_" + first)}
    for cut, add in [(cut, "") for cut in sorted(cuts, key=len)] + [("", add) for add in adds if add]:
        hits = {name: base.get(add + text.removeprefix(cut)) if text.startswith(cut) else None
                for name, text in flat.items()}
        found.append({name: hit[0] for name, hit in hits.items() if hit and len(hit) == 1})
    best = max(found, key=len)
    whole = [hits for hits in found if len(set(hits.values())) == len(theirs)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ValueError(f"{file}: {theirs[0]!r} may be {' or '.join(hits[theirs[0]] for hits in whole)} in {source}: "
                         "rename the file's tensors as the base calls them.")
    lost = [name for name in theirs if name not in best or [*best.values()].count(best[name]) > 1]
    raise ValueError(f"{file}: {len(lost)} of {len(theirs)} pairs of factors find no place in {source}: "
                     f"{shorten(lost, 4)}. Its layers are called {shorten(ours, 3)}. Is it the right base?")


def _flat(name: str) -> str:
    """With underscores alone; diffusers' attention calls its last layer to_out.0 and in a file to_out."""
    return re.sub(r"\W", "_", name).replace("_to_out_0", "_to_out")


def _pair(file: Path, name: str, found: Mapping[str, torch.Tensor], shape: tuple[int, ...], alpha: float | None
          ) -> Pair:
    """The factors as PEFT's file has them, for a weight (out, in, *kernel)."""
    missing = [end for end in "AB" if end not in found]
    if missing:
        raise ValueError(f"{file}: {name} has no factor {missing[0]} in it: fetch the file again.")
    A, B, kernel = found["A"], found["B"], tuple(shape[2:])
    if not kernel:                                       # some write a linear layer's factors as 1 x 1 convolutions
        A, B = (t.flatten(1) if t.ndim > 1 and set(t.shape[2:]) <= {1} else t for t in (A, B))
    rank = A.shape[0] if A.ndim else 0
    wanted = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in kernel))
    if (tuple(A.shape), tuple(B.shape)) != wanted or not rank:
        fused = " Are several matrices fused in it, as by loralib's MergedLinear?" if B.ndim == 2 and (
            shape[0] % max(1, B.shape[0]) == 0 or A.shape[0] > B.shape[1]) else ""
        raise ValueError(f"{file}: the factors of {name} are {_size(A)} and {_size(B)}, and beside its weight "
                         f"{' x '.join(map(str, shape))} they are (rank, {_size(shape[1:])}) and ({shape[0]}, rank)."
                         + fused)
    own = real(found["alpha"]) if "alpha" in found else None
    if "alpha" in found and own is None:
        raise ValueError(f"{file}: the alpha of {name} is no finite number: mend the file.")
    if strange := [t.dtype for t in (A, B) if not t.is_floating_point()]:
        raise ValueError(f"{file}: the factors of {name} are {strange[0]} numbers, and no floating ones: this adapter "
                         "is broken, or in codes that are not known here.")
    A, B = (t if t.dtype in FLOATS else t.float() for t in (A, B))
    if own is None and alpha is None:
        raise ValueError(f"{file} says no alpha for {name}, and without one the update's size is not known: give "
                         f"alpha= (loralib's layers have 1 where nothing was said; {rank} makes the scaling 1).")
    if own is not None and alpha is not None and own != alpha:
        raise ValueError(f"{file} says alpha {own:g} for {name}, and alpha={alpha:g} was given: leave it out.")
    return Pair(A, B, real(alpha) if own is None else own)


def _size(shape) -> str:
    return " x ".join(map(str, getattr(shape, "shape", shape)))


def _listed(file: Path, tensors: Mapping[str, torch.Tensor], places: Mapping[str, tuple[int, ...]],
            targets: Sequence[str] | None) -> dict[str, dict[str, torch.Tensor]]:
    """A bare list of factors, two by two, in the order that was told."""
    if not targets or isinstance(targets, str):
        raise ValueError(f"{file} is a bare list of {len(tensors)} tensors and says nothing of where they go: give "
                         "targets=, the endings of the modules in the list's order, such as ['q_proj', 'v_proj'].")
    numbered = sorted(places, key=lambda name: [int(n) for n in re.findall(r"\.(\d+)\.", name)])
    layers: dict[tuple, list[str]] = {}
    for name in numbered:
        layers.setdefault(tuple(re.findall(r"\.(\d+)\.", name)), []).append(name)
    order = [name for names in layers.values() for target in targets for name in names if ends_in(name, target)]
    factors = [tensors[key] for key in sorted(tensors, key=int)]
    if len(factors) != 2 * len(order):
        raise ValueError(f"{file} holds {len(factors)} tensors, and targets={list(targets)!r} are {len(order)} layers "
                         f"of this base, {2 * len(order)} factors: name those that were adapted.")
    grouped = {}
    for name, one, other in zip(order, factors[::2], factors[1::2]):
        up_first = one.ndim == 2 and one.shape[0] == places[name][0] and other.shape[1:] == places[name][1:]
        grouped[name] = {"A": other, "B": one} if up_first else {"A": one, "B": other}
    return grouped
