"""A Hugging Face model folder, read and written: config.json beside model.safetensors.

Only LLaMA-shaped folders are read, and what `Llama` does not compute is refused by name: a wrong model that runs is
worse than one that does not load.
"""
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_edu.files import read_json, tensor_files, write_together

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_config(path: str | Path) -> dict:
    """The fields of `LlamaConfig` out of a folder's config.json. Raises ValueError for what is not supported."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: "
                                "give the folder of a LLaMA model in Hugging Face's format.")
    raw = read_json(file, "the config.json of a LLaMA model")
    _refuse_unsupported(raw, file)
    missing = [key for key in SIZES if key not in raw]
    if missing:
        raise ValueError(f"{file} does not say {', '.join(missing)}: it is not the config of a LLaMA model.")
    # transformers 5 keeps rotary settings in one entry, earlier versions keep rope_theta beside the sizes
    rope_theta = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta", 10_000.0))
    return {key: raw[key] for key in SIZES} | {
        "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "head_dim": raw.get("head_dim") or 0,
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope_theta),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }


def _refuse_unsupported(raw: Mapping, file: Path) -> None:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    found = [said for wrong, said in [
        (raw.get("model_type") != "llama", f"model_type {raw.get('model_type')!r} (only 'llama')"),
        (raw.get("attention_bias"), "attention_bias"),
        (raw.get("mlp_bias"), "mlp_bias"),
        (rope_type != "default", f"rope scaling {rope_type!r}"),
        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r} (only 'silu')"),
    ] if wrong]
    if found:
        raise ValueError(f"{file} asks for what this LLaMA does not have: {', '.join(found)}. Load it with "
                         "transformers instead; apply_lora takes that model too.")


def read_chat(path: Path) -> dict[str, str | None]:
    """How a folder's model is talked to: its `chat_template`, `bos_token` and `eos_token`; None where it does not say.

    The template is in a file of its own, or among the tokenizer's settings, where it may be one of several.
    """
    file = path / "tokenizer_config.json"
    said = read_json(file, "the tokenizer_config.json of a model") if file.is_file() else {}
    template = said.get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    if (own := path / "chat_template.jinja").is_file():
        template = own.read_text(encoding="utf-8")
    tokens = {key: said.get(key) for key in ("bos_token", "eos_token")}
    return {"chat_template": template} | {key: token.get("content") if isinstance(token, Mapping) else token
                                          for key, token in tokens.items()}


def read_tensors(path: str | Path, wanted: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Exactly the tensors of `wanted`, each of the shape it says, one file open at a time.

    A tied model lists one of its two names; a file may hold both. Rotary tables that old files carry are skipped.
    """
    where = tensor_files(Path(path))
    extra = [n for n in where if n not in wanted and n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")]
    missing = [n for n in wanted if n not in where]
    if missing or extra:
        raise ValueError(f"the tensors of {path} do not fit its config: missing {missing[:3] or 'none'}, not expected "
                         f"{extra[:3] or 'none'}.")
    found = {}
    for file in sorted(set(where.values())):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named in the index but missing: fetch the folder again.")
        try:
            with safe_open(file, framework="pt") as f:
                found |= {name: f.get_tensor(name) for name in wanted if where[name] == file}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file ({error}): fetch it again.") from None
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)} in {path}, but its config makes it {tuple(shape)}.")
    return found


def write(path: str | Path, config, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write both files, or none."""
    dtype = next(iter(tensors.values())).dtype
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
             "attention_bias": False,
             "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch.")}
    whole = {name: t.contiguous() for name, t in tensors.items()}
    text = json.dumps(about | asdict(config), indent=2) + "\n"
    write_together({Path(path) / "model.safetensors": lambda part: save_file(whole, part, metadata={"format": "pt"}),
                    Path(path) / "config.json": lambda part: part.write_text(text, encoding="utf-8")})
