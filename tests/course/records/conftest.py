"""Every experiment runs on a tiny Llama with fable's tokenizer: what is tested is the code, and records are not made
here.
"""
import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course import tasks
from lora_edu.course.records import comparisons, merging, rank, runs, spectra
from lora_edu.training import corpora
from tests.lora.tiny import our_llama


def tiny():
    """fable's vocabulary and context, and little else; its last MLP is loud, so that a change in it is heard."""
    model = our_llama(vocab_size=2048, positions=512, kv_heads=2).eval()
    for name in ("gate_proj", "up_proj", "down_proj"):
        model.get_submodule(f"model.layers.1.mlp.{name}").weight.data *= 15
    return model


@pytest.fixture(scope="module", autouse=True)
def small():
    tokenizer, tales_from = load_pretrained()[1], corpora.tales_from

    def short(model, tokenizer, n=2, length=16, **how):
        return tales_from(model, tokenizer, n=min(n, 40), length=min(length, 16), **how)

    with pytest.MonkeyPatch.context() as patch:
        for module in (comparisons, merging, rank, runs, spectra, tasks):
            patch.setattr(module, "load_pretrained", lambda: (tiny(), tokenizer))
            patch.setattr(module, "sixteen_bits", lambda device: None, raising=False)
            patch.setattr(module, "best_device", lambda: torch.device("cpu"), raising=False)
        patch.setattr(corpora, "tales_from", short)
        tasks.tales.cache_clear()
        yield
        tasks.tales.cache_clear()
