"""Models that are already trained: fable from the package, a folder on disk, or a name on the Hugging Face hub."""
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from lora_edu.files import fetch, from_hub
from lora_edu.models.folder import read_chat, read_config
from lora_edu.models.llama import Llama

FABLE = Path(__file__).parent / "fable"
BISTRO_ADAPTER = FABLE / "bistro_lora"      # trained by `python -m lora_edu.record bistro_adapter`


def best_device() -> torch.device:
    """The fastest device here: CUDA, then Apple's MPS, then the CPU. The variable LORA_EDU_DEVICE overrules it.

    Raises RuntimeError if the variable names no device, or one that is not here.

    >>> best_device().type in ("cuda", "mps", "cpu")
    True
    """
    asked = os.environ.get("LORA_EDU_DEVICE")
    if asked:
        try:
            device = torch.device(asked)
        except RuntimeError:
            raise RuntimeError(f"LORA_EDU_DEVICE={asked!r} names no device: set it to cpu, cuda or mps, or unset "
                               "it.") from None
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 1)
        if (device.index or 0) >= there:
            raise RuntimeError(f"LORA_EDU_DEVICE={asked!r}, and torch sees {there} such devices here: set it to cpu, "
                               "or unset it.")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_pretrained(name: str | Path = "fable", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tokenizer]:
    """A model in eval mode on the CPU, and its tokenizer: a `Llama` and a `tokenizers.Tokenizer`, which carries the
    folder's `chat_template`, `bos_token` and `eos_token`.

    Args:
        name: "fable" (in the package, offline), the path of a Hugging Face folder of a LLaMA, or a name on the hub
            such as "HuggingFaceTB/SmolLM2-135M", fetched once. From the hub, what is no LLaMA comes through
            transformers (the extra `hub`), as transformers' model and tokenizer.
        dtype: of the weights; fable is stored in bfloat16, and widening it loses nothing.

    Raises:
        FileNotFoundError, ValueError: the folder is not complete, or its config is not supported.
        RuntimeError: a hub name, and the network is missing, or transformers for what is no LLaMA.

    >>> model, tokenizer = load_pretrained("fable")
    >>> sum(p.numel() for p in model.parameters())
    3688704
    >>> tokenizer.decode(tokenizer.encode("Once upon a time").ids)
    'Once upon a time'
    """
    path = FABLE if name == "fable" else Path(name)
    if path.is_dir():
        return _load_folder(path, dtype)
    path = fetch(str(name))
    from_hub(str(name), ["*.json", "*.txt", "*.jinja", "tokenizer.model"])      # beside the weights: the tokenizer
    return _load_folder(path, dtype) if _is_ours(path) else _load_with_transformers(path, str(name), dtype)


def _is_ours(path: Path) -> bool:
    """Can `Llama` and `Tokenizer` read this folder?"""
    try:
        read_config(path)
    except ValueError:
        return False
    return (path / "tokenizer.json").is_file() and any(path.glob("*.safetensors"))


def _load_folder(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Tokenizer]:
    model = Llama.from_folder(path, dtype)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no tokenizer.json: save the model's fast tokenizer there.")
    tokenizer = Tokenizer.from_file(str(file))
    for key, value in read_chat(path).items():
        setattr(tokenizer, key, value)
    return model, tokenizer


def _load_with_transformers(path: Path, name: str, dtype: torch.dtype) -> tuple[nn.Module, Tokenizer]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise RuntimeError(f"{name!r} is no LLaMA, and loading it needs transformers: "
                           'pip install "lora-edu[hub]".') from None
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), AutoTokenizer.from_pretrained(path)
