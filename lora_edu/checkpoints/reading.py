"""One side of a comparison of two models: its tensors by name, read one at a time.

`open_side` takes a model in memory, a folder, a file or a name on the hub and gives one of two readers, which answer
alike: `names`, `shapes`, `get(name)`, `dtype(name)`, `tied` (second name -> first name), `layer(name)`, the module that
holds a tensor, if known, `module_names`, and `files`, where it was read from. `Renamed` is such a reader under the
other side's names.
"""
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lora_edu.files import (
    HUB_EXAMPLE,
    PICKLED,
    locate,
    read_json,
    read_pickled,
    read_tensor,
    tensor_files,
    tensor_headers,
)
from lora_edu.lora.targets import storage_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorsInMemory:
    """A model's parameters and stored buffers, or what `torch.load` made of pickled files (mapped, so read when
    used).
    """

    def __init__(self, source: str, tensors: Mapping[str, torch.Tensor], model: nn.Module | None = None,
                 files: Sequence[Path] = ()):
        self.source, self.tensors, self.names, self.files = source, tensors, list(tensors), files
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.modules = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}
        self.module_names = list(self.modules) or parents(self.names)
        self.tied = _same_storage(tensors)

    def get(self, name: str) -> torch.Tensor:
        if self.tensors[name].is_meta:
            raise ValueError(f"{name} of {self.source} has no values (it is on the meta device): "
                             "load the weights first.")
        return self.tensors[name].detach()

    def dtype(self, name: str) -> torch.dtype | str:
        return self.tensors[name].dtype

    def layer(self, name: str) -> nn.Module | None:
        return self.modules.get(name.rpartition(".")[0])


class TensorsInFiles:
    """Safetensors files, opened anew for every tensor."""

    def __init__(self, source: str, where: Mapping[str, Path], config: Mapping):
        self.source, self.where, self.names = source, where, list(where)
        self.files = list(dict.fromkeys(where.values()))
        headers = _read_headers(where)
        self.shapes = {name: shape for name, (shape, _) in headers.items()}
        self.dtypes = {name: FLOATS.get(dtype, dtype) for name, (_, dtype) in headers.items()}
        self.module_names = parents(self.names)
        embedding = next((n for n in self.names if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
        # stored twice all the same
        tied = config.get("tie_word_embeddings") and embedding and "lm_head.weight" in where
        self.tied = {"lm_head.weight": embedding} if tied else {}

    def get(self, name: str) -> torch.Tensor:
        return read_tensor(self.where[name], name)

    def dtype(self, name: str) -> torch.dtype | str:
        return self.dtypes[name]

    def layer(self, name: str) -> None:
        return None


class Renamed:
    """A side under the names of another: `own` says what it calls them itself."""

    def __init__(self, side: "TensorsInMemory | TensorsInFiles", own: Mapping[str, str]):
        self.side, self.own, self.names, self.source, self.files = side, own, list(own), side.source, side.files
        self.shapes = {name: side.shapes[old] for name, old in own.items()}
        new = {old: name for name, old in own.items()}
        self.tied = {new[second]: new[first] for second, first in side.tied.items()}
        self.module_names = parents(self.names)

    def get(self, name: str) -> torch.Tensor:
        return self.side.get(self.own[name])

    def dtype(self, name: str) -> torch.dtype | str:
        return self.side.dtype(self.own[name])

    def layer(self, name: str) -> nn.Module | None:
        return self.side.layer(self.own.get(name, name))


Side = TensorsInMemory | TensorsInFiles | Renamed


def as_named_by(side: Side, other: Side) -> tuple[Side, str]:
    """The side under the other's names, where one of them calls everything by a prefix that the other leaves out (a
    BERT with a head says "bert.encoder…", without one "encoder…"), and what was done, in words; else as it is, and "".
    """
    for longer, shorter, done in ((other, side, "put before"), (side, other, "taken from the front of")):
        shapes = shorter.shapes
        fit = Counter(name[:at] for name, shape in longer.shapes.items()
                      for at in [0, *(i + 1 for i, sign in enumerate(name) if sign == ".")]
                      if shapes.get(name[at:]) == shape)
        prefix = max(fit, key=lambda prefix: (fit[prefix], not prefix), default="")
        if prefix:
            pairs = {prefix + name: name for name in shorter.names if prefix + name in longer.shapes}
            turned = pairs if side is longer else {name: long for long, name in pairs.items()}
            new = {old: name for old, name in turned.items() if name not in side.shapes}
            return Renamed(side, {new.get(name, name): name for name in side.names}), (
                f"{prefix!r} is {done} {len(new)} names of {side.source}, so that they are those of {other.source}")
    return side, ""


def open_side(source: nn.Module | str | Path) -> Side:
    """A reader of one side's tensors.

    Args:
        source: a model; a folder with model.safetensors, its shards or old pytorch_model*.bin; a .safetensors file; a
            pickled .bin or .pt file of plain tensors; a name on the hub, fetched to the hub client's cache.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or what is there is damaged or not plain tensors.
        RuntimeError: the hub did not give the name.
    """
    if isinstance(source, nn.Module):
        if any(hasattr(module, "lora_A") for module in source.modules()):
            raise ValueError("this model carries a LoRA, so its weights are not where the other side's are: call "
                             "remove_lora(model, merge=True) on a copy of it first.")
        return TensorsInMemory(getattr(source, "name_or_path", "") or type(source).__name__,
                               source.state_dict(keep_vars=True), source)
    path, said = locate(source), str(source)
    folder = path if path.is_dir() else path.parent
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{said} is a LoRA adapter and no model: load it on its base with load_adapter, call "
                         "remove_lora(model, merge=True), and give that model.")
    if path.is_file():
        if path.suffix in PICKLED:
            return TensorsInMemory(said, read_pickled(path), files=[path])
        return TensorsInFiles(said, dict.fromkeys(tensor_headers(path), path), read_config(path.parent))
    old = sorted(path.glob("pytorch_model*.bin"))
    if old and not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return TensorsInMemory(said, {name: t for file in old for name, t in read_pickled(file).items()}, files=old)
    return TensorsInFiles(said, tensor_files(path), read_config(path))


def _read_headers(where: Mapping[str, Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    headers = {}
    for file in dict.fromkeys(where.values()):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named in the index but missing: "
                                    f"fetch the folder again ({HUB_EXAMPLE}).")
        held = tensor_headers(file)
        missing = [name for name, place in where.items() if place == file and name not in held]
        if missing:
            raise ValueError(f"the index says that {file} holds {missing[0]}, and it does not: fetch the folder again.")
        headers |= {name: header for name, header in held.items() if where.get(name) == file}
    return headers


def read_config(folder: Path) -> Mapping:
    file = folder / "config.json"
    return read_json(file, "the config.json of the model") if file.is_file() else {}



def _same_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Second name -> first name of each tensor that has two."""
    first, tied = {}, {}
    for name, t in tensors.items():
        key = (*storage_of(t), t.shape, t.stride()) if t.layout == torch.strided else (id(t),)
        if key in first:
            tied[name] = first[key]
        first.setdefault(key, name)
    return tied


def parents(names: list[str]) -> list[str]:
    """The modules that tensors of these names imply: "a.b.weight" lies in a.b, which lies in a."""
    parts = [name.split(".")[:-1] for name in names]
    return list(dict.fromkeys(".".join(p[:i]) for p in parts for i in range(1, len(p) + 1)))
