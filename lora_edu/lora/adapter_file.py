"""An adapter as two small files, in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads what `save_adapter` writes, and `load_adapter` reads plain LoRA adapters that PEFT wrote. PEFT itself loads
some wrong files with a warning or with none; here every tensor must have its place and every place its tensor.

Source: PEFT 0.21, developer guide "checkpoint format".
"""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from lora_edu.files import read_pickled, read_tensors, write_together
from lora_edu.lora.adapter_config import CONFIG, config_of, for_layer, left_out, read_config
from lora_edu.lora.factors import copy_all, lora_state_dict, refuse_adapted, some_lora_layers
from lora_edu.lora.fingerprint import BASE, differs, fingerprint
from lora_edu.lora.inject import LoRAReport, all_or_nothing, check_layers, wrap_layers
from lora_edu.lora.layer import FLOATS, features, is_linear, is_plain_conv
from lora_edu.lora.misfit import all_finite, explain_misfit
from lora_edu.lora.targets import ends_in, find_targets, plain_name, shorten, tied_parameters, unwrap, unwrap_to_train
from lora_edu.lora.training_state import write_training
from lora_edu.lora.whole_modules import make_room, remember, whole_modules, whole_places

PREFIX, TENSORS, OLD_TENSORS = "base_model.model.", "adapter_model.safetensors", "adapter_model.bin"


def save_adapter(model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32,
                 base_name: str | None = None, optimizer: torch.optim.Optimizer | None = None,
                 step: int | None = None) -> int:
    """Write what the model's LoRA computes now in PEFT's format, both files or none; returns the bytes of the tensor
    file.

    Ranks and scalings that differ between layers are kept, a strength is folded into alpha, and whatever else trains (a
    new head, an embedding) is written whole, under `modules_to_save`. A fingerprint of the base lies in the tensor
    file's metadata, where PEFT does not look.

    Args:
        folder: made if it is not there.
        dtype: of the stored factors; torch.bfloat16 halves the file and keeps 8 bits of each number.
        base_name: the model the adapter belongs to, for the reader of the config.
        optimizer, step: also write where the training stands, after `step` steps, into a third file that
            `load_training` reads.

    Raises:
        ValueError: one of optimizer and step without the other; the model has no LoRA, a number is not finite (in
            this dtype), or something trains that the format cannot hold.

    Source: PEFT 0.21, developer guide "checkpoint format".

    >>> import tempfile
    >>> from lora_edu import apply_lora
    >>> model, folder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), tempfile.mkdtemp()
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> save_adapter(model, folder) > 4 * 2 * (12 + 8)      # bytes: the numbers, and a header
    True
    >>> sorted(file.name for file in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r} cannot hold an adapter: choose torch.float32, torch.bfloat16 or "
                         "torch.float16.")
    if (optimizer is None) != (step is None):
        raise ValueError(f"step={step}, and {'no ' * (optimizer is None)}optimizer: give both, to go on training "
                         "later, or neither.")
    model = unwrap(model)
    layers = {plain_name(name): layer for name, layer in some_lora_layers(model)}
    modules = [plain_name(name) for name, _ in model.named_modules() if ".base_layer" not in name]
    beside, entries = whole_modules(model)
    generates = hasattr(model, "prepare_inputs_for_generation") or hasattr(model, "new_cache")
    config = adapter_config(base_name, target_modules(list(layers), modules)) | config_of(layers) | {
        "task_type": "CAUSAL_LM" if generates else None, "modules_to_save": entries or None}
    tied = tied_parameters(model)
    if any(f"{name}.{end}" in tied for name, state in beside.items() for end in state):
        config["ensure_weight_tying"] = True            # trained as one: without this PEFT would part the two
    tensors = {f"{name}.lora_{end}.weight": factor.detach().to(dtype).reshape(shape) for name, layer in layers.items()
               for end, factor, shape in zip("AB", (layer.lora_A, layer.lora_B), layer.file_shapes)}
    tensors |= {f"{name}.{end}": t for name, state in beside.items() for end, t in state.items()}
    if optimizer is not None:           # first: were it cut off between the two, the training would be the newer one
        check_finite(tensors)
        write_training(model, Path(folder), optimizer, step)
    return write_adapter(folder, tensors, config, fingerprint(model, without=tensors))


def adapter_config(base_name: str | None, targets: list[str] | str) -> dict:
    """What every adapter_config.json of ours says; ranks and alphas come from elsewhere."""
    return {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_name, "inference_mode": True,
            "bias": "none", "target_modules": targets}


def write_adapter(folder: str | Path, tensors: Mapping[str, torch.Tensor], config: dict, base: str | None = None
                  ) -> int:
    """Write both files of an adapter, or none; returns the bytes of the tensor file.

    Args:
        tensors: "module name.lora_A.weight" and "….lora_B.weight" -> tensor, and those of modules_to_save.
        base: the fingerprint of the base, if it has one.

    Raises ValueError for a number that is not finite, or a tensor without values.
    """
    check_finite(tensors)
    folder, stored = Path(folder), {f"{PREFIX}{name}": t.contiguous().clone() for name, t in tensors.items()}
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, and an adapter is a folder: choose another name.")
    text, metadata = json.dumps(config, indent=2) + "\n", {"format": "pt"} | ({BASE: base} if base else {})
    write_together({folder / TENSORS: lambda part: save_file(stored, part, metadata=metadata),
                    folder / CONFIG: lambda part: part.write_text(text, encoding="utf-8")})
    return (folder / TENSORS).stat().st_size


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError for a tensor without values, or with one that is not finite."""
    empty = [name for name, t in tensors.items() if t.is_meta]
    if empty:
        raise ValueError(f"{shorten(empty, 3)} have no values (they are on the meta device), so nothing is written: "
                         "load the whole model to one device first.")
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(f"{shorten(broken, 3)} hold numbers that are not finite, so nothing is written: go back to "
                         "the last good step, or save in float32 or bfloat16 if they are too large for float16.")


def target_modules(names: list[str], modules: list[str]) -> list[str] | str:
    """What makes PEFT (and `apply_lora`) choose exactly `names` among a model's `modules`.

    The last parts of the names ("q_proj") where they will do, else the full names, else a regular expression for them:
    a full name is matched as an ending too, and may be the ending of another.
    """
    for entries in (sorted({name.rpartition(".")[2] for name in names}), list(names)):
        if {m for m in modules if any(ends_in(m, entry) for entry in entries)} == set(names):
            return entries
    return "|".join(re.escape(name) for name in names)


def load_adapter(model: nn.Module, folder: str | Path, *, any_base: bool = False) -> LoRAReport:
    """Give a plain model the adapter of a folder, in place or not at all; the model is in eval mode then, as PEFT's.

    Modules that were saved whole (`modules_to_save`: a head that was trained) replace the model's own numbers, also
    after `remove_lora`. They train, as the factors do, and are written again by `save_adapter`.

    Args:
        any_base: load it on a model that is not the one it was made for, too.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the config asks for more than plain LoRA, a file is damaged, the tensors do not fit this model one
            to one, or the adapter was made for another base; the reason is in the sentence.

    Source: as `save_adapter`.

    >>> from lora_edu import load_pretrained
    >>> from lora_edu.models.pretrained import BISTRO_ADAPTER
    >>> model, tokenizer = load_pretrained("fable")
    >>> load_adapter(model, BISTRO_ADAPTER).rank
    6
    """
    folder, model = Path(folder), unwrap_to_train(model)
    refuse_adapted(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module) or is_plain_conv(module)}
    found = fit_adapter(model, linears, folder, any_base)
    check_layers(model, list(found.settings))
    with all_or_nothing(model):
        wrap_layers(model, {name: (linears[name], each | {"any_rank": True}) for name, each in found.settings.items()})
        make_room(model, found.heads, found.alone, found.trained)
        factors = {f"{name}.weight": t for name, t in lora_state_dict(model).items()}
        copy_all(found.stored, factors | found.heads)               # last: stopped on the way, it puts all back
    remember(model, found.heads)
    model.eval()
    plain = [name for name, layer in linears.items() if name not in found.settings and is_linear(layer)]
    return LoRAReport.of(model, plain, note=" ".join(found.notes))


class Fitted(NamedTuple):
    """An adapter's file that fits a model: settings of each target (rank, alpha, dropout, rslora), the tensors by name,
    the model's own tensors that whole modules replace, what is to be said of it, which of those tensors were tied and
    get a place of their own, and which the config names, as trained.
    """

    settings: dict[str, dict]
    stored: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]
    notes: list[str]
    alone: list[str]
    trained: list[str]


def fit_adapter(model: nn.Module, linears: Mapping[str, nn.Module], folder: Path, any_base: bool = False) -> Fitted:
    """Read a folder and find the place of everything in it; raises as `load_adapter` does. `linears`: the layers that
    it may go beside, by name.
    """
    config, stored, base = read_adapter(folder)
    wanted = config["target_modules"]
    if isinstance(wanted, list):                        # PEFT passes over an entry that finds nothing, if others do
        wanted = [entry for entry in wanted if any(ends_in(name, entry) for name in linears)] or wanted
    try:
        targets = [name for name in find_targets(model, linears, wanted)
                   if not left_out(config, plain_name(name))]
    except re.error as error:
        raise ValueError(f"{folder / CONFIG}: an entry of exclude_modules, modules_to_save or layers_pattern is no "
                         f"regular expression ({error}).") from None
    settings = {name: for_layer(config, plain_name(name)) for name in targets}
    heads, alone, trained = whole_places(model, config, stored)
    wrong = explain_misfit(stored, _places(linears, settings) | heads)
    if wrong:
        raise ValueError(f"the adapter in {folder} does not fit this model: {wrong}")
    other = differs(base, model) if base and not any_base else None
    if other:
        raise ValueError(f"the adapter in {folder} was made for another base: {other}. Load that base, or pass "
                         "any_base=True.")
    notes = [] if base else ["The file has no fingerprint of its base: whether this is the one, nobody checked."]
    above = [name for name, each in settings.items() if each["rank"] > min(features(linears[name]))]
    notes += [f"The rank is above the smaller side of {shorten(above, 3)}."] if above else []
    notes += [f"{shorten(alone, 2)} was tied to another weight and is its own now, as in PEFT."] if alone else []
    return Fitted(settings, stored, heads, notes, alone, trained)


def read_adapter(folder: Path) -> tuple[dict, dict[str, torch.Tensor], str | None]:
    """The config, the tensors by their names in the model, and the base's fingerprint, of an adapter on disk; all that
    can be told from the files alone is checked.
    """
    file = tensor_file(folder)
    config = read_config(folder)
    found, metadata = stored_tensors(file)
    stored = plain_tensors(file, found)
    strange = [name for name, t in stored.items() if ".lora_" in name and not t.is_floating_point()]
    broken = [name for name, t in stored.items() if not all_finite(t)]
    if strange or broken:
        raise ValueError(f"{file}: {shorten(strange or broken, 3)} hold "
                         + (f"{stored[strange[0]].dtype} numbers and no floating ones" if strange
                            else "numbers that are not finite")
                         + ": this adapter is broken, take an earlier checkpoint.")
    return config, stored, metadata.get(BASE)


def tensor_file(folder: Path) -> Path:
    """Where an adapter's tensors lie; raises FileNotFoundError where one of its two files is missing."""
    file = next((folder / name for name in (TENSORS, OLD_TENSORS) if (folder / name).is_file()), folder / TENSORS)
    for part in (folder / CONFIG, file):
        if not part.is_file():
            inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
            raise FileNotFoundError(f"{folder} has no {part.name}: give the folder of a LoRA adapter in PEFT's format"
                                    + (f". Its folders {shorten(inside, 4)} are such." if inside else "."))
    return file


def stored_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As they lie in the file, and its metadata."""
    return (read_pickled(file), {}) if file.name == OLD_TENSORS else read_tensors(file)


def pairs_of(folder: Path, config: Mapping, stored: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """Module -> (its settings, A (rank, in), B (out, rank)) of an adapter of plain linear layers; raises ValueError for
    anything else that lies in it, and for factors that do not fit each other.
    """
    modules = [key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")]
    found = {name: (for_layer(config, name), *(stored.get(f"{name}.lora_{end}.weight") for end in "AB"))
             for name in modules}
    others = stored.keys() - {f"{name}.lora_{end}.weight" for name in modules for end in "AB"}
    if others or not modules or any(t.ndim > 2 for t in stored.values()):
        raise ValueError(f"{folder} brings {shorten(sorted(others or stored), 2)}, and only updates of linear layers, "
                         "each a lora_A and a lora_B, are read for this.")
    for name, (each, A, B) in found.items():
        if B is None or A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == each["rank"]:
            raise ValueError(f"{folder}: the factors of {name} do not fit each other, or the config's rank "
                             f"{each['rank']}: fetch the adapter again.")
    return found


def plain_tensors(file: Path, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors by their names in the model: without PEFT's prefix, wrappers, and the adapter's own name in the
    middle, which PEFT takes out when it saves.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        plain = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", plain_name(name.removeprefix(PREFIX)))
        if plain in stored:
            raise ValueError(f"{file} holds {plain} twice, with and without a prefix: which one is meant, it does not "
                             "say; keep one of them.")
        stored[plain] = tensor
    return stored


def _places(linears: Mapping[str, nn.Module], settings: Mapping[str, dict]) -> dict[str, torch.Tensor]:
    """Name in the file -> a tensor of the shape that must be there, without values."""
    places = {}
    for name, each in settings.items():
        (into, out), (_, channels, *kernel) = features(linears[name]), linears[name].weight.shape
        A = (each["rank"], channels, *kernel) if kernel else (each["rank"], into)
        for end, shape in (("A", A), ("B", (out, each["rank"], *(1 for _ in kernel)))):
            places[f"{plain_name(name)}.lora_{end}.weight"] = torch.empty(shape, device="meta")
    return places
