"""The tensors of a model that is not in memory: a folder, a safetensors file, or a name on the Hugging Face hub.

Below models/ and lora/, used by both; and two small things that everyone who has files needs, `checksum` and `write_whole`.
"""
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FILES = (".safetensors", ".bin", ".pt", ".pth")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_EXAMPLE = "a name on the hub is written owner/name, such as HuggingFaceTB/SmolLM2-135M"


def tensor_files(path: Path) -> dict[str, Path]:
    """Name of each tensor in a model folder -> the safetensors file that holds it.

    Raises:
        FileNotFoundError: neither model.safetensors nor its index is there.
        ValueError: the index names files outside the folder, or a file is damaged.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        where = read_index(index)
        outside = [name for name in where.values() if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names the file {outside[0]!r}: shards must lie in the folder itself.")
        return {tensor: path / name for tensor, name in where.items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{path} has neither model.safetensors nor model.safetensors.index.json; "
                                "old pickled .bin weights are not read: convert them with transformers first.")
    return dict.fromkeys(tensor_headers(single), single)


def read_index(index: Path) -> dict[str, str]:
    """The weight_map of an index: name of each tensor -> name of its file."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is no index of a model (JSON with a weight_map): fetch it again.") from None


def tensor_headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype as safetensors spells it: "F32", "BF16") for each tensor of a file; no tensor is read.

    Raises ValueError if the file is damaged, or says that it holds more than it does.
    """
    try:
        with safe_open(file, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except SafetensorError as error:
        raise damaged(file, error) from None


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor, mapped from the file: the file is opened for it alone, so its pages go when the tensor goes."""
    try:
        with safe_open(file, framework="pt") as f:
            return f.get_tensor(name)
    except SafetensorError as error:
        raise damaged(file, error) from None


def damaged(file: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{file} is damaged or no safetensors file ({error}): fetch it again.")


def checksum(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then move: `file` is there whole, or as it was."""
    half = file.with_name(file.name + ".part")
    try:
        write(half)
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)


def locate(source: str | Path) -> Path:
    """The file or folder that `source` names; a name on the hub is fetched to the hub client's cache first.

    Raises:
        FileNotFoundError: nothing is there, and it is not spelled like a name on the hub.
        RuntimeError: it is, and the hub did not give it.
    """
    path = Path(source)
    if path.exists():
        return path
    local = isinstance(source, Path) or path.suffix in FILES or (path.parent != Path() and path.parent.is_dir())
    if local or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(f"there is no folder or file {str(source)!r}: check the path ({HUB_EXAMPLE}).")
    return fetch(source)


def fetch(name: str) -> Path:
    """The weights and the config of a model on the hub, in the hub client's cache; safetensors, or old .bin files if it has no other.

    Raises RuntimeError with the reason if the hub cannot be reached or does not have it.
    """
    from huggingface_hub import snapshot_download       # late: `import lora_edu` does not need it
    wanted = ["model*.safetensors", "model.safetensors.index.json", "config.json"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin", "pytorch_model.bin.index.json"])
    except (OSError, ValueError) as error:              # what the hub client raises: HTTP errors, no cached copy, a bad name
        raise RuntimeError(f"{name!r} is neither a folder nor a file, and the hub did not give it: check the spelling ({HUB_EXAMPLE}) "
                           f"and the network ({str(error).strip().splitlines()[0]})") from error
    return folder
