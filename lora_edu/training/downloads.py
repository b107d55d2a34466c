"""Corpora that must be fetched once: each file is known by its address and its checksum, and kept in a cache folder.

`fetch` reads the network only when the cache has no good copy. It writes to a temporary name and moves the file when its
checksum is right, so the cache never holds half a file.
"""
import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

RAW = "https://raw.githubusercontent.com/"
E2E = "microsoft/LoRA/c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data/e2e/"
# name in the cache -> address below RAW, bytes, SHA-256
FILES = {
    "tinyshakespeare.txt": ("karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
                            1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "e2e_valid.txt": (E2E + "valid.txt", 1_198_093, "ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d"),
    "e2e_test.txt": (E2E + "test.txt", 1_351_149, "81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13"),
}


class DownloadError(RuntimeError):
    """A file could not be had; the message says why and what to do."""


def cache_folder() -> Path:
    """`LORA_EDU_CACHE`, or `lora_edu` in the platform's usual cache folder."""
    if "LORA_EDU_CACHE" in os.environ:
        return Path(os.environ["LORA_EDU_CACHE"]).expanduser()
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "lora_edu"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lora_edu"


def fetch(name: str, base: str = RAW) -> Path:
    """The path of one of `FILES` in the cache folder, fetched from below `base` if it is not there yet.

    Raises:
        DownloadError: no network, no such file, a file cut off, or another file than the one named.
    """
    if name not in FILES:
        raise ValueError(f"{name!r} is not a file this course knows: choose one of {', '.join(FILES)}.")
    address, size, checksum = FILES[name]
    target = cache_folder() / name
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == checksum:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            found = receive(base + address, file, size, f"fetch it on another machine and put it at {target}")
        if found != checksum:
            raise DownloadError(f"{base + address} is not the file it should be: its SHA-256 is {found[:12]}..., not "
                                f"{checksum[:12]}...; nothing was kept. Try again, and if it stays so, tell this project.")
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def receive(url: str, file, size: int, otherwise: str) -> str:
    """Copy `url`, which should hold `size` bytes, into `file` under a progress bar; return its SHA-256."""
    from tqdm.auto import tqdm
    digest, got = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=20) as reply, \
                tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1]) as bar:
            while (block := reply.read(1 << 16)) and got <= size:      # <=: an endless file ends here, and fails its checksum
                file.write(block)
                digest.update(block)
                got += len(block)
                bar.update(len(block))
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} answered {error.code} ({error.reason}): the file has moved; {otherwise}.") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{url} cannot be read ({reason}): this needs a network once; connect, or {otherwise}.") from error
    if got < size:
        raise DownloadError(f"{url} was cut off after {got:,} of {size:,} bytes; nothing was kept. Try again, or {otherwise}.")
    return digest.hexdigest()


def shakespeare() -> str:
    """Tiny Shakespeare, 1.1 MB of his plays (public domain; collected in karpathy/char-rnn)."""
    return fetch("tinyshakespeare.txt").read_text(encoding="utf-8")


def e2e(split: str) -> list[tuple[str, str]]:
    """(meaning representation, sentence) pairs of E2E: "valid" (4,672 pairs, used here to train) or "test" (4,693).

    Source: Novikova, Dusek, Rieser (2017), "The E2E Dataset", arXiv:1706.09254, CC BY-SA 4.0, as tokenised in microsoft/LoRA.
    """
    if split not in ("valid", "test"):
        raise ValueError(f"split={split!r}: choose valid (to train on; the training split is too large to fetch here) or test.")
    lines = fetch(f"e2e_{split}.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(part.strip() for part in line.split("||", 1)) for line in lines]
