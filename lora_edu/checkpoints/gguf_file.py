"""An adapter as llama.cpp reads it: one GGUF file beside the base's.

Three things are other than in PEFT's file. Names: model.layers.0.self_attn.q_proj is blk.0.attn_q. The scaling: there
is one alpha for the whole file, and each layer's rank is read from its shape. And the rows of q and k: llama.cpp turns
pairs of neighbours where Hugging Face turns the two halves of a head, so the rows of these two are in another order,
in the base and so in every lora_B beside it.

Source: llama.cpp, `convert_lora_to_gguf.py` and `llama-adapter.cpp`, by the names and formulas used there.
"""
from pathlib import Path

import torch

from lora_edu.files import read_json, write_whole
from lora_edu.lora.adapter_config import for_layer
from lora_edu.lora.adapter_file import read_adapter
from lora_edu.lora.settings import scaling_of
from lora_edu.lora.targets import shorten


def adapter_to_gguf(folder: str | Path, base: str | Path, file: str | Path) -> int:
    """Write an adapter of a LLaMA for llama.cpp (`llama-cli -m base.gguf --lora file`); returns how many matrices it
    has.

    Args:
        folder: an adapter in PEFT's format.
        base: the base's folder; only its config.json is read.
        file: the .gguf to write. Numbers are float32.

    Raises (then nothing is written):
        FileNotFoundError, ValueError: as `load_adapter`; a base of another architecture; a tensor that has no name in
            GGUF.
        RuntimeError: the package gguf is not installed (the extra `hub`).

    >>> import tempfile
    >>> from lora_edu.models.pretrained import BISTRO_ADAPTER, FABLE
    >>> adapter_to_gguf(BISTRO_ADAPTER, FABLE, f"{tempfile.mkdtemp()}/bistro.gguf")
    28
    """
    try:
        import gguf  # late: the one use of it
    except ModuleNotFoundError:
        raise RuntimeError('writing GGUF needs the package gguf: pip install "lora-edu[hub]".') from None
    said = read_json(Path(base) / "config.json", "the config.json of a LLaMA")
    if said.get("model_type") != "llama":
        raise ValueError(f"{base} is a {said.get('model_type')!r}, and only the names and the order of rows of a LLaMA "
                         "are known here: use llama.cpp's convert_lora_to_gguf.py.")
    heads = {"q_proj": said["num_attention_heads"],
             "k_proj": said.get("num_key_value_heads") or said["num_attention_heads"]}
    config, stored, _ = read_adapter(Path(folder))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, said["num_hidden_layers"])
    modules = [key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")]
    lost = [name for name in modules if names.get_name(name) is None]
    lost += [name for name in stored if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if lost or not modules:
        raise ValueError(f"{folder}: {shorten(lost, 3) or 'nothing'} has no place in a GGUF adapter of a LLaMA with "
                         f"{said['num_hidden_layers']} layers: export the merged model instead.")
    scaled = {name: _alpha(config, name) for name in modules}
    alpha = scaled[modules[0]] or 1.0
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name in modules:
        A, B = (stored[f"{name}.lora_{end}.weight"].float() for end in "AB")
        B = _reordered(B * (scaled[name] / alpha), heads.get(name.rpartition(".")[2]))
        for end, factor in (("a", A), ("b", B)):
            writer.add_tensor(f"{names.get_name(name)}.weight.lora_{end}", factor.contiguous().numpy())
    write_whole(Path(file), lambda part: _write(writer, part))
    return len(modules)


def _alpha(config: dict, name: str) -> float:
    """The alpha that a reader divides by the rank: it knows no rsLoRA, and no alpha of a layer's own."""
    each = for_layer(config, name)
    return scaling_of(each["rank"], each["alpha"], each["rslora"]) * each["rank"]


def _reordered(B: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows of a head (0, 1, …, h-1) as (0, h/2, 1, h/2+1, …); where no heads are given, as they are."""
    if heads is None:
        return B
    return B.reshape(heads, 2, len(B) // heads // 2, -1).transpose(1, 2).reshape(B.shape)


def _write(writer, part: Path) -> None:
    writer.write_header_to_file(part)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
