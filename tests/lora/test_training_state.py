"""A training that was cut off goes on as if it never stopped. Oracle: the same training without a stop."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu import apply_lora, load_adapter, load_training, merge_lora, save_adapter, train
from lora_edu.training.loop import adamw
from tests.lora.tiny import our_llama

STEPS = 12
ROOT = Path(__file__).resolve().parents[2]


def batches(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(50, (4, 9), generator=generator)
        yield ids[:, :-1], ids[:, 1:]


def start(make=adamw, rank=2, alpha=4, head=False):
    model = our_llama(tied=not head)
    torch.manual_seed(3)
    apply_lora(model, ["q_proj", "down_proj"], rank=rank, alpha=alpha, dropout=0.1)
    if head:
        model.lm_head.requires_grad_(True)
    return model, make(model)


def go(model, optimizer, first=0, stop=None, folder=None, **how):
    for step in train(model, itertools.islice(batches(STEPS), first, None), STEPS, 1e-2, optimizer=optimizer,
                      first_step=first, **how):
        if step.step == stop:
            save_adapter(model, folder, dtype=torch.bfloat16, optimizer=optimizer, step=step.step)
            return
    return [p.detach().clone() for p in model.parameters()]


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9)


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("stop", [1, 5, STEPS - 1])
@pytest.mark.parametrize("head", [False, True])
def test_stopped_and_gone_on_equals_never_stopped_to_the_bit(make, stop, head, tmp_path):
    """Dropout draws random numbers at every step; the schedule falls; what is saved for PEFT is rounded to bf16."""
    whole, optimizer = start(make, head=head)
    torch.manual_seed(5)
    expected = go(whole, optimizer)
    cut, optimizer = start(make, head=head)
    torch.manual_seed(5)
    go(cut, optimizer, stop=stop, folder=tmp_path)
    torch.manual_seed(99)
    again, optimizer = start(make, head=head)
    assert load_training(again, tmp_path, optimizer) == stop
    assert all(torch.equal(a, b) for a, b in zip(go(again, optimizer, first=stop), expected, strict=True))


def test_it_goes_on_from_the_adapter_as_well(tmp_path):
    """load_adapter on a plain model, then load_training: nobody has to remember rank and alpha."""
    model, optimizer = start()
    torch.manual_seed(5)
    expected = go(model, optimizer)
    model, optimizer = start()
    torch.manual_seed(5)
    go(model, optimizer, stop=4, folder=tmp_path)
    again = our_llama()
    load_adapter(again, tmp_path)
    optimizer = adamw(again)
    step = load_training(again, tmp_path, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(go(again, optimizer, first=step), expected, strict=True))


CHILD = """
import sys, torch
from tests.lora.test_training_state import *
model, optimizer = start()
torch.manual_seed(5)
for step in train(model, batches(STEPS), STEPS, 1e-2, optimizer=optimizer):
    if step.step % 2 == 0:
        save_adapter(model, sys.argv[1], optimizer=optimizer, step=step.step)
        print(step.step, flush=True)
    if step.step == 7:
        time.sleep(60)
"""


def test_a_process_that_is_killed_loses_at_most_the_steps_since_it_saved(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.strip() == "6":
            break
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    whole, optimizer = start()
    torch.manual_seed(5)
    expected = go(whole, optimizer)
    again, optimizer = start()
    step = load_training(again, tmp_path, optimizer)
    assert step == 6
    assert all(torch.equal(a, b) for a, b in zip(go(again, optimizer, first=step), expected, strict=True))


def test_a_stop_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = start()
    go(model, optimizer, stop=2, folder=tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()

    def stopped(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path, optimizer=optimizer, step=3)
    monkeypatch.undo()
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors",
                                                               "training.safetensors"]


@pytest.mark.parametrize("other, message", [
    (lambda: start(rank=3, alpha=6), "another shape"), (lambda: start(alpha=8), "scaling of"),
    (lambda: start(sgd), "optimizer was AdamW, and this one is SGD"), (lambda: start(head=True), "lm_head.weight"),
])
def test_another_training_is_refused_and_nothing_moves(other, message, tmp_path):
    model, optimizer = start()
    go(model, optimizer, stop=2, folder=tmp_path)
    model, optimizer = other()
    before, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        load_training(model, tmp_path, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before)) and not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_no_training_is_refused(tmp_path):
    model, optimizer = start()
    with pytest.raises(FileNotFoundError, match="no training.safetensors"):
        load_training(model, tmp_path, optimizer)
    save_adapter(model, tmp_path)
    (tmp_path / "training.safetensors").write_bytes((tmp_path / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not say where a training stood"):
        load_training(model, tmp_path, optimizer)
    (tmp_path / "training.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="damaged"):
        load_training(model, tmp_path, optimizer)


@pytest.mark.parametrize("how, message", [({"step": 3}, "no optimizer"), ({"optimizer": "o"}, "give both"),
                                          ({"optimizer": "o", "step": -1}, "step=-1"),
                                          ({"optimizer": "other", "step": 1}, "not this model's")])
def test_saving_half_of_it_is_refused(how, message, tmp_path):
    model, optimizer = start()
    given = {"o": optimizer, "other": adamw(nn.Linear(3, 3))}
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "new", **{key: given.get(value, value) for key, value in how.items()})
    assert not (tmp_path / "new").exists()


def test_peft_loads_the_folder_all_the_same(tmp_path):
    from peft import PeftModel

    from tests.lora.tiny import hf_llama, shake
    model = hf_llama()
    apply_lora(model, ["q_proj"], rank=2)
    shake(model)
    save_adapter(model, tmp_path, optimizer=adamw(model), step=0)
    assert len(load_file(tmp_path / "training.safetensors")) == 2 * 2 + 1
    PeftModel.from_pretrained(hf_llama(), tmp_path)


def test_a_merged_model_is_refused(tmp_path):
    """It would go on computing with the old sum."""
    model, optimizer = start()
    save_adapter(model, tmp_path, optimizer=optimizer, step=3)
    other, optimizer = start()
    merge_lora(other.eval())
    with pytest.raises(RuntimeError, match="Call unmerge_lora"):
        load_training(other, tmp_path, optimizer)


def test_another_base_is_refused(tmp_path):
    model, optimizer = start()
    save_adapter(model, tmp_path, optimizer=optimizer, step=3)
    other, optimizer = start()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.1)
    kept = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match="made on another base .*embed_tokens.weight holds other numbers"):
        load_training(other, tmp_path, optimizer)
    assert all(torch.equal(p, kept[name]) for name, p in other.named_parameters())


def test_running_means_go_on(tmp_path):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        apply_lora(model, ["0"], rank=2)
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def go(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
        return model.eval()(torch.ones(1, 6))

    expected = go(*start(), range(10))
    model, optimizer = start()
    go(model, optimizer, range(5))
    save_adapter(model, tmp_path, optimizer=optimizer, step=5)
    model, optimizer = start()
    assert load_training(model, tmp_path, optimizer) == 5
    assert torch.equal(go(model, optimizer, range(5, 10)), expected)


@pytest.mark.parametrize("change", [
    {"random cpu": None}, {"random cpu": torch.zeros(3, dtype=torch.uint8)}, {"random cpu": torch.zeros(5056)},
    {"step": "3"}, {"step": -3}, {"step": 1.5}, {"numbers": []}, {"scalings": None}, {"groups": "x"},
    {"groups": [{"lr": 1.0}]}, {"groups": [{"params": []}]}, {"optimizer": 3}, {"nan": True}])
def test_a_damaged_file_moves_nothing(change, tmp_path):
    model, optimizer = start()
    go(model, optimizer, stop=2, folder=tmp_path)
    file = tmp_path / "training.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    said = json.loads(metadata["lora_edu.training"])
    for key, value in change.items():
        if key == "random cpu":
            tensors[key] = value
        elif key == "nan":
            tensors[next(name for name in tensors if name.endswith("exp_avg"))].fill_(torch.nan)
        else:
            said[key] = value
    save_file({name: t for name, t in tensors.items() if t is not None}, file,
              metadata | {"lora_edu.training": json.dumps(said)})
    other, optimizer = start()
    kept, random = {name: p.clone() for name, p in other.named_parameters()}, torch.get_rng_state()
    with pytest.raises(ValueError, match="does not say where a training stood|is of another training"):
        load_training(other, tmp_path, optimizer)
    assert all(torch.equal(p, kept[name]) for name, p in other.named_parameters())
    assert not optimizer.state and torch.equal(torch.get_rng_state(), random)


def test_a_file_of_another_torch_goes_on(tmp_path):
    """A version adds settings to an optimizer's groups; what is not in the file is as the optimizer was made now."""
    model, optimizer = start()
    go(model, optimizer, stop=5, folder=tmp_path)
    expected = go(*start_again(tmp_path), first=5)
    file = tmp_path / "training.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    said = json.loads(metadata["lora_edu.training"])
    del said["groups"][0]["foreach"]
    said["groups"][0]["of tomorrow"] = True
    save_file(tensors, file, metadata | {"lora_edu.training": json.dumps(said)})
    assert all(torch.equal(a, b) for a, b in zip(go(*start_again(tmp_path), first=5), expected, strict=True))


def start_again(folder):
    model, optimizer = start()
    assert load_training(model, folder, optimizer) == 5
    return model, optimizer
