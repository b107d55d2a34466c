"""lora_edu: LoRA (low-rank adaptation, Hu et al. 2021) in code short enough to read. This page is the library's whole
public API.

The course's names (claims, figures, labs) are in `lora_edu.course`; the library knows nothing of them.
"""
from lora_edu.checkpoints.deltas import deltas
from lora_edu.checkpoints.extract import extract_lora
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from lora_edu.lora.factors import layers_without_gradient, load_lora_state_dict, lora_parameters, lora_state_dict
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.merge import lora_off, merge_lora, remove_lora, set_strength, unmerge_lora
from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack
from lora_edu.lora.training_state import load_training
from lora_edu.measure.spectra import spectrum, truncate
from lora_edu.models.llama import Llama
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.models.quantize import quantize_
from lora_edu.training.loop import evaluate, fit, train
from lora_edu.training.sweep import sweep

__version__ = "0.1.0"
__all__ = ["Llama", "LoRALinear", "LoRASettings", "LoRAStack", "apply_lora", "best_device", "deltas", "evaluate",
           "extract_lora", "fit", "layers_without_gradient", "load_adapter", "load_lora_state_dict",
           "load_pretrained", "load_training", "lora_off", "lora_parameters", "lora_state_dict", "merge_lora",
           "quantize_", "remove_lora", "save_adapter", "set_strength", "spectrum", "sweep", "train", "truncate",
           "unmerge_lora"]
