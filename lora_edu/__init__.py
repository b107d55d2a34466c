"""lora_edu: LoRA (low-rank adaptation, Hu et al. 2021) in code short enough to read. This page is the whole public API.

`claim` and `guess` belong to the notebooks and need ipywidgets and matplotlib; they load when first used.
"""
from importlib import import_module

from lora_edu.lora.apply import apply_lora, lora_parameters, lora_state_dict, merge_lora, remove_lora, unmerge_lora
from lora_edu.lora.extract import deltas, extract_lora
from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.stack import Adapter, LoRAStack
from lora_edu.measure.spectra import spectrum, truncate
from lora_edu.models.llama import Llama
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training.loop import evaluate, train
from lora_edu.training.sweep import sweep

__version__ = "0.1.0"
__all__ = ["Adapter", "Llama", "LoRALinear", "LoRAStack", "apply_lora", "best_device", "claim", "deltas", "evaluate", "extract_lora",
           "guess", "load_pretrained", "lora_parameters", "lora_state_dict", "merge_lora", "remove_lora", "spectrum", "sweep", "train",
           "truncate", "unmerge_lora"]
LAZY = {"claim": "lora_edu.page.claims", "guess": "lora_edu.page.guess"}


def __getattr__(name: str):
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'lora_edu' has no attribute {name!r}")
