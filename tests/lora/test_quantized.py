"""bitsandbytes' own layers under LoRA, as they are: in a process of its own, because importing them talks."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "bitsandbytes==0.50.2"
CODE = """
import copy
import sys
import torch
import bitsandbytes as bnb
from torch import nn
from lora_edu import LoRALinear, LoRASettings, LoRAStack, Llama, apply_lora, fit, load_adapter, merge_lora
from lora_edu import remove_lora, save_adapter, unmerge_lora
from lora_edu.lora.quantized import base_weight, is_quantized, plain_layer
from lora_edu.models.llama import LlamaConfig

def four(bits):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 128, 192, 2, 4, 2)).eval()
    plain = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
        sizes = layer.in_features, layer.out_features
        new = (bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32) if bits == 4 else
               bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False))
        new.load_state_dict({"weight": layer.weight.data})
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model.to("cpu"), plain

for bits, close in ((4, 1e-4), (8, 5e-2)):
    model, plain = four(bits)
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    model.train()       # in eval mode a CPU with AVX512-BF16 packs Linear4bit otherwise, in bfloat16
    want = layer(torch.eye(128)).T.detach()                              # what it computes with, by asking it
    assert is_quantized(layer) and not is_quantized(plain.get_submodule(name)) and not layer.weight.is_floating_point()
    assert (base_weight(layer) - want).norm() < (1e-5 if bits == 4 else 2e-3) * want.norm()
    off = (base_weight(layer) - plain.get_submodule(name).weight).norm() / plain.get_submodule(name).weight.norm()
    assert 0 < off < (0.12 if bits == 4 else 0.02)
    ids = torch.arange(40).reshape(2, 20)
    batch = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        before = model(ids)
    report = apply_lora(model, rank=4, alpha=8)
    assert isinstance(model.get_submodule(name), LoRALinear) and model.get_submodule(name).base_layer is layer
    assert report.total - report.trainable == sum(p.numel() for p in plain.parameters()), report.total
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    steps = fit(model, [batch] * 10, 10, lr=1e-2)
    assert steps[-1].loss < steps[0].loss - 0.3
    with torch.no_grad():
        apart = model(ids)
        merge_lora(model)
        assert (model(ids) - apart).abs().max() < close, (model(ids) - apart).abs().max()
        unmerge_lora(model)
        assert torch.equal(model(ids), apart)
    save_adapter(model, sys.argv[1] + str(bits))
    remove_lora(model, merge=True)
    assert type(model.get_submodule(name)) is nn.Linear
    with torch.no_grad():
        assert (model(ids) - apart).abs().max() < close
    again, _ = four(bits)
    load_adapter(again, sys.argv[1] + str(bits))
    with torch.no_grad():
        assert (again.train()(ids) - apart).abs().max() < close
    with torch.no_grad():
        packed = four(bits)[0].eval()
        before, layer = packed(ids), packed.get_submodule(name)
        assert (base_weight(layer) - want).norm() < 5e-3 * want.norm()
        apply_lora(packed, rank=4)
        assert torch.equal(packed(ids), before), "wrapping and reading leave the layer as it is packed"
    stack = LoRAStack(four(bits)[0], [LoRASettings(rank=2), LoRASettings(rank=3)])
    assert all(p.dtype == torch.float32 for p in stack.model.parameters() if p.requires_grad)
print("ALL", "RIGHT")
"""


@pytest.mark.full
def test_bitsandbytes_layers_are_wrapped_merged_and_saved(tmp_path):
    """Oracle: the layer itself, asked for its matrix by feeding it the identity."""
    target = ["--target", str(tmp_path / "lib")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *target, PACKAGE]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"no package index here, and {PACKAGE} is not installed")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "lib")])}
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "adapter")], capture_output=True, text=True,
                          env=env)
    assert "ALL RIGHT" in done.stdout, done.stderr[-2000:]
