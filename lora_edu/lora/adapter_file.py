"""An adapter as two small files, in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads what `save_adapter` writes, and `load_adapter` reads plain LoRA adapters that PEFT wrote. PEFT itself loads
some wrong files with a warning or with none; here every tensor must have its place and every place its tensor.

Source: PEFT 0.21, developer guide "checkpoint format".
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu.files import read_json, write_together
from lora_edu.lora.factors import lora_state_dict, some_lora_layers
from lora_edu.lora.inject import LoRAReport, apply_lora
from lora_edu.lora.layer import is_conv1d
from lora_edu.lora.merge import remove_lora
from lora_edu.lora.targets import ends_in

PREFIX, CONFIG, TENSORS = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"
# what changes the numbers and is not computed here; each is refused by name when it is set
UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
               "exclude_modules", "target_parameters", "layer_replication", "trainable_token_indices")


def save_adapter(model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32,
                 base_name: str | None = None) -> int:
    """Write the model's LoRA factors in PEFT's format, both files or none; returns the bytes of the tensor file.

    Args:
        folder: made if it is not there.
        dtype: of the stored factors; torch.bfloat16 halves the file and keeps 8 bits of each number.
        base_name: the model the adapter belongs to, for the reader of the config.

    Raises ValueError if the model has no LoRA.

    Source: PEFT 0.21, developer guide "checkpoint format".

    >>> import tempfile
    >>> model, folder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), tempfile.mkdtemp()
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> save_adapter(model, folder) > 4 * 2 * (12 + 8)      # bytes: the numbers, and a header
    True
    >>> sorted(file.name for file in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    layers = some_lora_layers(model)
    first = layers[0][1]
    modules = [name for name, _ in model.named_modules() if ".base_layer" not in name]
    config = adapter_config(first.rank, first.alpha, target_modules([name for name, _ in layers], modules), base_name,
                            is_conv1d(first.base_layer),
                            first.rslora) | {"task_type": "CAUSAL_LM", "lora_dropout": first.dropout}
    return write_adapter(folder, {name: t.to(dtype) for name, t in lora_state_dict(model).items()}, config)


def adapter_config(rank: int, alpha: float, targets: list[str] | str, base_name: str | None, transposed: bool,
                   rslora: bool = False) -> dict:
    """What adapter_config.json says of a plain LoRA; transposed: the targets store (in, out), as transformers'
    Conv1D does.
    """
    return {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_name, "inference_mode": True,
            "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": transposed, "target_modules": targets}


def write_adapter(folder: str | Path, factors: dict[str, torch.Tensor], config: dict) -> int:
    """Write both files of an adapter, or none; returns the bytes of the tensor file.

    Args:
        factors: "module name.lora_A" and "….lora_B" -> tensor.
    """
    folder, tensors = Path(folder), {f"{PREFIX}{name}.weight": t.contiguous() for name, t in factors.items()}
    text = json.dumps(config, indent=2) + "\n"
    write_together({folder / TENSORS: lambda part: save_file(tensors, part, metadata={"format": "pt"}),
                    folder / CONFIG: lambda part: part.write_text(text, encoding="utf-8")})
    return (folder / TENSORS).stat().st_size


def target_modules(names: list[str], modules: list[str]) -> list[str] | str:
    """What makes PEFT (and `apply_lora`) choose exactly `names` among a model's `modules`.

    The last parts of the names ("q_proj") where they will do, else the full names, else a regular expression for them:
    a full name is matched as an ending too, and may be the ending of another.
    """
    for entries in (sorted({name.rpartition(".")[2] for name in names}), list(names)):
        if {m for m in modules if any(ends_in(m, entry) for entry in entries)} == set(names):
            return entries
    return "|".join(re.escape(name) for name in names)


def load_adapter(model: nn.Module, folder: str | Path) -> LoRAReport:
    """Give a plain model the adapter of a folder; the model is changed in place, or not at all.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the config asks for more than plain LoRA, a file is damaged, or the tensors do not fit this model
            one to one (another base, other targets, another rank).

    Source: as `save_adapter`.

    >>> from lora_edu import load_pretrained
    >>> from lora_edu.models.pretrained import BISTRO_ADAPTER
    >>> model, tokenizer = load_pretrained("fable")
    >>> load_adapter(model, BISTRO_ADAPTER).rank
    6
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give the folder of a LoRA adapter in PEFT's format.")
    config = read_json(folder / CONFIG, "an adapter_config.json that PEFT wrote")
    asked = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or asked:
        raise ValueError(f"{folder / CONFIG} asks for {', '.join(asked) or config.get('peft_type')}: only plain LoRA "
                         "is read here; load it with PEFT.")
    try:
        stored = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged or no safetensors file ({error}): fetch it again.") from None
    stored = {name.removeprefix(PREFIX).removesuffix(".weight"): t for name, t in stored.items()}
    report = apply_lora(model, config["target_modules"], config.get("r", 8), config.get("lora_alpha", 8),
                        config.get("lora_dropout", 0.0), bool(config.get("use_rslora")))
    places = lora_state_dict(model)
    wrong = _describe_misfit(stored, places)
    if wrong:
        remove_lora(model, merge=False)
        raise ValueError(f"the adapter in {folder} does not fit this model: "
                         f"{wrong}. It was made for another base or other targets.")
    for name, place in places.items():
        place.copy_(stored[name])
    return report


def _describe_misfit(stored: dict, places: dict) -> str:
    missing, extra = [n for n in places if n not in stored], [n for n in stored if n not in places]
    shapes = [n for n in places if n in stored and stored[n].shape != places[n].shape]
    said = [f"{len(names)} tensors {what} (first: {names[0]})" for names, what in
            ((missing, "are missing"), (extra, "have no place"), (shapes, "have another shape")) if names]
    return "; ".join(said)
