"""The ground under models and checkpoints: tensors of a model that is not in memory, its config, and whole files or
none.

A model on disk is a folder, a safetensors file, or a name on the Hugging Face hub. Nothing is unpickled here.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# what people try to load, and is something else
OTHERS = {".npz": "a NumPy", ".npy": "a NumPy", ".h5": "an HDF5", ".hdf5": "an HDF5", ".gguf": "a GGUF",
          ".onnx": "an ONNX", ".msgpack": "a Flax", ".tflite": "a TensorFlow", ".pb": "a TensorFlow"}
FILES = (".safetensors", *PICKLED, *OTHERS)
PATIENCE = 5            # seconds to wait for the hub
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
        where = _read_index(index)
        outside = [name for name in where.values() if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names the file {outside[0]!r}: shards must lie in the folder itself.")
        return {tensor: path / name for tensor, name in where.items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{path} has neither model.safetensors nor model.safetensors.index.json: give the "
                                "folder of a model saved as safetensors.")
    return dict.fromkeys(tensor_headers(single), single)


def _read_index(index: Path) -> dict[str, str]:
    """The weight_map of an index: name of each tensor -> name of its file."""
    try:
        where = read_json(index, "an index").get("weight_map")
    except ValueError:
        where = None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index} is no index of a model (JSON with a weight_map, tensor names to file names): fetch "
                         "it again.")
    return where


def tensor_headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype as safetensors spells it: "F32", "BF16") for each tensor of a file; no tensor is read.

    Raises ValueError if the file is damaged, or says that it holds more than it does.
    """
    if file.suffix in OTHERS:
        raise other_format(file)
    with _opened(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor, mapped from the file: the file is opened for it alone, so its pages go when the tensor goes."""
    with _opened(file) as f:
        return f.get_tensor(name)


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata; raises ValueError as `tensor_headers` does."""
    if file.suffix in OTHERS:
        raise other_format(file)
    with _opened(file) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}


@contextlib.contextmanager
def _opened(file: Path):
    readable(file)
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise damaged(file, error) from None


def readable(file: Path) -> None:
    """Raise PermissionError, in one sentence, for a file that is there and may not be read."""
    if file.exists() and not os.access(file, os.R_OK):
        raise PermissionError(f"{file} is there and may not be read: give yourself the right to, or copy it.")


def read_pickled(file: Path, lists: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of an old .bin or .pt file, read by the loader that builds nothing but tensors; with `lists`, those
    of a bare list too, called "0", "1" and so on.

    What training scripts wrap around them ("state_dict", "model_state_dict", "model") is taken off.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    readable(file)
    if file.suffix in OTHERS:
        raise other_format(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:                   # what a damaged pickle raises is any of a dozen kinds
        raise ValueError(f"{file} is damaged, or a pickle that holds more than plain tensors and could run code, so it "
                         "is not read: convert it to safetensors where you trust it "
                         f"({type(error).__name__}).") from None
    for key in ("state_dict", "model_state_dict", "model"):
        inner = loaded.get(key) if isinstance(loaded, Mapping) else None
        loaded = inner if isinstance(inner, Mapping) else loaded
    if lists and isinstance(loaded, (list, tuple)):
        loaded = {str(i): t for i, t in enumerate(loaded)}
    if not isinstance(loaded, Mapping) or not loaded or not all(map(_plain, loaded.items())):
        held = f"a {type(loaded).__name__}" + (f" of {', '.join(map(repr, list(loaded)[:4]))}"
                                               if isinstance(loaded, Mapping) else "")
        raise ValueError(f"{file} holds {held}, not tensors by name: save model.state_dict() instead.")
    return dict(loaded)


def _plain(named) -> bool:
    """A tensor of plain numbers under a name: not sparse, not in another library's codes, not without values."""
    name, tensor = named
    return isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not (
        tensor.is_quantized or tensor.is_meta)


def other_format(file: Path) -> ValueError:
    return ValueError(f"{file} is {OTHERS[file.suffix]} file, and weights are read from .safetensors, .bin, .pt, .pth "
                      "and .ckpt: load it where it was made and save the tensors with safetensors.")


def damaged(file: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{file} is damaged or no safetensors file ({error}): fetch it again.")


def check_place(file: Path) -> None:
    """Raise OSError, before any work, where this file could not be written after it."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} to write {file.name} in: make it first.")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(f"{file} {'is a folder' if file.is_dir() else 'may not be written'}: give another name.")


def checksum(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(file: Path, what: str) -> dict:
    """The settings in a JSON file.

    Raises:
        ValueError: it is no JSON, or holds something else than settings; `what` says in the message what should have
            been there.
    """
    try:
        content = json.loads(file.read_bytes())             # UTF-8, 16 or 32, with or without a mark at its start
    except (ValueError, RecursionError) as error:           # no JSON, no text, or brackets without end
        raise ValueError(f"{file} is not JSON ({error}): give {what}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no settings: give {what}.")
    return content


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then move: `file` is there whole, or as it was."""
    write_together({file: write})


def write_text(file: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_together(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write several files under temporary names, then move them all; folders are made.

    If that fails or is interrupted, what was new is taken away again, new folders too, and what was there is back.
    """
    made = [folder for file in writers for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    new = [file for file in writers if not file.exists()]
    half = {file: file.with_name(file.name + ".part") for file in writers}
    old = {file: file.with_name(file.name + ".before") for file in writers if file not in new and len(writers) > 1}
    try:
        for file, write in writers.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write(half[file])
        for file, part in half.items():
            if file in old:
                _second_name(file, old[file])       # there is no moment in which the file is not there
            part.replace(file)
    except BaseException:                   # Ctrl-C too
        for file in (*half.values(), *new):
            file.unlink(missing_ok=True)
        for file, kept in old.items():
            if kept.exists():
                kept.replace(file)
            kept.unlink(missing_ok=True)        # two names of one file: moving one to the other leaves both
        for folder in dict.fromkeys(made):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    for kept in old.values():
        kept.unlink(missing_ok=True)


def _second_name(file: Path, other: Path) -> None:
    other.unlink(missing_ok=True)
    try:
        os.link(file, other)
    except OSError:                             # a file system without links, as of a mounted drive
        shutil.copyfile(file, other)


def check_new_folder(out: Path) -> None:
    """Raise FileExistsError for a file, or a folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and is no empty folder: give a new name, or remove it first.")


def once(file: Path | None, make: Callable[[], object]):
    """What an earlier call made and kept as JSON, if it is there; else made now, and kept.

    Without a file nothing is kept.
    """
    if file is None:
        return make()
    if not file.is_file():
        text = json.dumps(make())
        write_text(file, text)
    return json.loads(file.read_text(encoding="utf-8"))


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
    """The weights and the config of a model on the hub; safetensors, or old .bin files if it has no other."""
    folder = from_hub(name, ["model*.safetensors", "model.safetensors.index.json", "config.json"])
    if not any(folder.glob("model*.safetensors")):
        from_hub(name, ["pytorch_model*.bin", "pytorch_model.bin.index.json"])
    return folder


def _hub_answers() -> bool:
    """Can a connection be made? Asked once, because the client itself would try again for most of a minute."""
    from huggingface_hub import constants
    if urllib.request.getproxies():                         # then the connection goes elsewhere
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        found = socket.getaddrinfo(url.hostname, url.port or url.scheme, type=socket.SOCK_STREAM)
        with socket.socket(*found[0][:3]) as line:
            line.settimeout(PATIENCE)
            line.connect(found[0][4])
    except OSError:
        return False
    return True


def from_hub(name: str, patterns: Sequence[str]) -> Path:
    """The folder in the hub client's cache where the files of `name` are that match the patterns; fetched if they are
    not there yet.

    Raises:
        RuntimeError: the hub cannot be reached, or does not have it; the reason is in the message.
    """
    from huggingface_hub import snapshot_download  # late: `import lora_edu` does not need it
    reached = _hub_answers()
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not reached))
    except PermissionError as error:
        raise RuntimeError(f"{name!r} cannot be kept here ({error}): set HF_HOME to a folder that may be "
                           "written.") from error
    # what the hub client raises: HTTP errors, no cached copy, a bad name
    except (OSError, ValueError) as error:
        if not reached:
            raise RuntimeError(f"{name!r} is neither a folder nor a file, there is no copy of it in the hub client's "
                               f"cache, and the hub does not answer within {PATIENCE} seconds: check the network, or "
                               "give a folder.") from error
        raise RuntimeError(f"{name!r} is neither a folder nor a file, and the hub did not give it: check the spelling "
                           f"({HUB_EXAMPLE}) and the network ({str(error).strip().splitlines()[0]})") from error
