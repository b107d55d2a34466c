"""Which real model there is here: SmolLM2 from the hub, else the copy of `python dev.py real`, else fable.

The variable LORA_EDU_REAL names another: a model on the hub, a folder, or "fable".
"""
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_edu.models.pretrained import load_pretrained

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def real_copy(name: str = "SmolLM2-135M-Instruct") -> Path:
    """Where `python dev.py real` puts a copy; LORA_EDU_CACHE moves it, and so does XDG_CACHE_HOME."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_edu"
    return Path(os.environ.get("LORA_EDU_CACHE") or cache) / name


@dataclass(frozen=True)
class RealModel:
    """A model with its tokenizer; `name` is what the pages call it, `base` what PEFT would find it by (a name on the
    hub, or a folder), `source` says in a sentence where it is from.
    """

    model: nn.Module
    tokenizer: object
    base: str
    source: str

    @property
    def name(self) -> str:
        return Path(self.base).name


def real_model(dtype: torch.dtype = torch.float32) -> RealModel:
    """The real model, in eval mode on the CPU.

    Raises:
        RuntimeError: LORA_EDU_REAL names a model that the hub does not give.

    >>> real_model().name in ("SmolLM2-135M-Instruct", "fable")
    True
    """
    asked, copy = os.environ.get("LORA_EDU_REAL"), real_copy()
    if asked:
        where = "in the package" if asked == "fable" else f"from {asked}"
        return RealModel(*load_pretrained(asked, dtype), asked, f"{where}, as LORA_EDU_REAL says")
    try:
        return RealModel(*load_pretrained(NAME, dtype), NAME, f"the published weights, {NAME} on the hub")
    except RuntimeError:                                   # no network
        if copy.is_dir():
            return RealModel(*load_pretrained(copy, dtype), str(copy), "the published weights after four bits, a copy "
                             "from the package index (python dev.py real)")
    return RealModel(*load_pretrained("fable", dtype), "fable", "no hub is reached, and python dev.py real has not "
                     "been run: this is the course's own small model, and the cells below show that they run, no more")
