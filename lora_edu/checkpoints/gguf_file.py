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
from lora_edu.lora.adapter_file import pairs_of, read_adapter
from lora_edu.lora.settings import scaling_of
from lora_edu.lora.targets import shorten
from lora_edu.numbers import whole


def adapter_to_gguf(folder: str | Path, base: str | Path, file: str | Path) -> int:
    """Write an adapter of a LLaMA for llama.cpp (`llama-cli -m base.gguf --lora file`); returns how many matrices it
    has.

    Args:
        folder: an adapter in PEFT's format.
        base: the base's folder; only its config.json is read.
        file: the .gguf to write. Numbers are float32.

    Raises (then nothing is written):
        FileNotFoundError, ValueError: as `load_adapter`; a base of another architecture; a tensor that has no name in
            GGUF, or is of another size than this base's.
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
    layers, heads, shapes = _sizes(base, said)
    config, stored, _ = read_adapter(Path(folder))
    pairs = pairs_of(Path(folder), config, stored)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    lost = [name for name, (_, A, B) in pairs.items() if names.get_name(name) is None
            or shapes.get(name.rpartition(".")[2]) != (len(B), A.shape[1])]
    if lost:
        raise ValueError(f"{folder}: {shorten(lost, 3)} has no place of its size in a GGUF adapter of a LLaMA "
                         f"with {layers} layers of width {shapes['q_proj'][1]}: is this its base? Else export the "
                         "merged model instead.")
    # the alpha that a reader divides by the rank: it knows no rsLoRA, and no alpha of a layer's own
    scaled = {name: scaling_of(len(A), each["alpha"], each["rslora"]) * len(A) for name, (each, A, _) in pairs.items()}
    alpha = next(iter(scaled.values())) or 1.0
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (_, A, B) in pairs.items():
        B = _reordered(B.float() * (scaled[name] / alpha), heads.get(name.rpartition(".")[2]))
        for end, factor in (("a", A.float()), ("b", B)):
            writer.add_tensor(f"{names.get_name(name)}.weight.lora_{end}", factor.contiguous().numpy())
    write_whole(Path(file), lambda part: _write(writer, part))
    return len(pairs)


def _sizes(base: str | Path, said: dict) -> tuple[int, dict[str, int], dict[str, tuple[int, int]]]:
    """Layers; heads of q and of k; (out, in) of each matrix of a layer: what a LLaMA's config says of them."""
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    layers, C, F, heads = (whole(said.get(key)) or 0 for key in keys)
    kv_heads = whole(said.get("num_key_value_heads") or heads) or 0
    size = whole(said.get("head_dim") or C // max(heads, 1)) or 0
    if min(layers, C, F, heads, kv_heads, size) < 1:
        raise ValueError(f"the config of {base} does not say its sizes in whole numbers ({', '.join(keys)}): it is not "
                         "the whole config of a LLaMA.")
    q, kv = heads * size, kv_heads * size
    return layers, {"q_proj": heads, "k_proj": kv_heads}, {
        "q_proj": (q, C), "k_proj": (kv, C), "v_proj": (kv, C), "o_proj": (C, q), "gate_proj": (F, C),
        "up_proj": (F, C), "down_proj": (C, F)}


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
