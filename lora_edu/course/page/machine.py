"""What this machine is, and what that means for the course: notebook 00 ends with it, and who loads a real model begins
with it.
"""
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_edu.course.records.stored import hardware
from lora_edu.measure.memory import bill
from lora_edu.models.pretrained import best_device
from lora_edu.models.sizes import PRESETS
from lora_edu.tables import ShowsTables, Table
from lora_edu.training.loop import sixteen_bits

PACKAGES = ("torch", "numpy", "matplotlib", "ipywidgets", "safetensors", "tokenizers", "huggingface_hub", "tqdm",
            "peft")
# a small step of LoRA, by the ledger of notebook 05
STEP = {"rank": 8, "batch": 1, "length": 512, "checkpointing": True}


@dataclass(frozen=True, repr=False)
class Machine(ShowsTables):
    """Attributes:
        device: its name; a GPU's with its capability. kind: "cuda", "mps" or "cpu".
        products: the 16-bit type that the hardware multiplies, or None.
        memory: bytes that are free, on the GPU where there is one, else in the machine; None where nobody says.
        disk: bytes that are free in the working folder. missing: packages that are not installed.
    """

    device: str
    kind: str
    products: torch.dtype | None
    memory: int | None
    disk: int
    missing: tuple[str, ...]

    def fits(self, model: str, **step) -> bool:
        """Does a training step fit the memory, by the ledger? `model` and `step` as in `bill`; in 32 bits where the
        hardware has no 16. False where the memory is not known.
        """
        recipe = {"recipe": "16-bit" if self._narrow() else "fp32"}
        return self.memory is not None and bill(model, **STEP | recipe | step).total <= self.memory

    def _narrow(self) -> bool:
        return self.kind != "cpu" and self.products is not None

    def tables(self) -> list[Table]:
        by_size = sorted(PRESETS, key=lambda name: PRESETS[name].parameters())
        large, bits = [name for name in by_size if self.fits(name)], 16 if self._narrow() else 32
        rows = [("device", self.device, "every notebook runs, the longest in three minutes or so" if self.kind == "cpu"
                 else "every notebook runs; those with a GPU in their header use it"),
                ("16 bits", *self._products()),
                ("memory", "unknown" if self.memory is None else f"{self.memory / 1e9:.1f} GB free",
                 f"by notebook 05's ledger a LoRA on {large[-1]} fits in {bits} bits, 1 × 512 tokens, checkpointed"
                 if large else "notebook 05 says what a training takes"),
                ("disk", f"{self.disk / 1e9:.1f} GB free",
                 f"fable needs none; the 16-bit weights of {self.disk / 2e9:.1f} billion numbers fit"),
                ("packages", f"missing: {', '.join(self.missing)}" if self.missing else "all there",
                 f"pip install {' '.join(self.missing)}" if self.missing else "nothing to do")]
        return [Table(("this machine", "has", "which means"), rows)]

    def _products(self) -> tuple[str, str]:
        if not self._narrow():
            return (("not used", "trainings multiply in float32") if self.products is None else
                    (str(self.products).removeprefix("torch."), "notebook 08 multiplies in it, the others in float32"))
        if self.products == torch.float16:
            return "float16", "a loss scale; bfloat16 would be emulated. A step that overflows is skipped and counted"
        return "bfloat16", "the trainer multiplies in it, and needs no loss scale"


def machine() -> Machine:
    """Look at this machine.

    >>> machine().kind == best_device().type
    True
    """
    device = best_device()
    return Machine(hardware(device), device.type, sixteen_bits(device), free_memory(device),
                   shutil.disk_usage(".").free,
                   tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None))


def keep_in(name: str) -> Path:
    """Where a notebook keeps what was trained: a folder on Google Drive where that is mounted, which outlives the
    runtime; else in `my_adapters` beside the notebook.
    """
    drive = Path("/content/drive/MyDrive")
    return (drive / "lora_edu" if drive.is_dir() else Path(".")) / "my_adapters" / name


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the GPU, or in the machine where the system tells (Linux does)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):       # Windows, macOS
        return None
