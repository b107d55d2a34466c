"""What a machine means for the course, for machines that are not here; the free memory against what the system says."""
import dataclasses

import pytest
import torch

from lora_edu.course import machine as looked
from lora_edu.course.page import machine
from lora_edu.course.page.machine import Machine, free_memory
from lora_edu.measure.memory import bill

T4 = Machine("Tesla T4 (compute capability 7.5)", "cuda", torch.float16, int(15.6e9), int(70e9), ())


def cells(found):
    (table,) = found.tables()
    return {row[0]: row[1:] for row in table.rows}


@pytest.mark.parametrize("changes, row, has, means", [
    ({}, "16 bits", "float16", "loss scale"),
    ({"products": torch.bfloat16}, "16 bits", "bfloat16", "no loss scale"),
    ({"kind": "mps", "products": None}, "16 bits", "not used", "float32"),
    ({"kind": "cpu", "products": torch.bfloat16}, "16 bits", "bfloat16", "notebook 08 multiplies in it"),
    ({}, "memory", "15.6 GB", "llama-7b"), ({"memory": int(80e9)}, "memory", "80.0 GB", "llama-13b"),
    ({"kind": "cpu"}, "memory", "15.6 GB", "gpt2-xl fits in 32 bits"),
    ({"memory": None}, "memory", "unknown", "notebook 05"), ({"memory": 1000}, "memory", "0.0 GB", "notebook 05"),
    ({}, "disk", "70.0 GB", "35.0 billion"), ({}, "packages", "all there", "nothing"),
    ({"missing": ("peft", "tqdm")}, "packages", "missing: peft, tqdm", "pip install peft tqdm")])
def test_each_row_says_what_there_is_and_what_it_means(changes, row, has, means):
    here, meaning = cells(dataclasses.replace(T4, **changes))[row]
    assert has in here and means in meaning


def test_what_fits_is_the_ledgers_answer():
    need = bill("llama-3.1-8b", recipe="nf4", rank=16, batch=2, length=1024, checkpointing=True).total
    step = dict(recipe="nf4", rank=16, batch=2, length=1024)
    assert dataclasses.replace(T4, memory=int(need) + 1).fits("llama-3.1-8b", **step)
    assert not dataclasses.replace(T4, memory=int(need) - 1).fits("llama-3.1-8b", **step)
    assert not dataclasses.replace(T4, memory=None).fits("fable")


def test_this_machine(monkeypatch):
    monkeypatch.setenv("LORA_EDU_DEVICE", "cpu")
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no_such_package"))
    found = looked()
    assert found.kind == "cpu" and found.missing == ("no_such_package",) and found.disk > 0
    assert "no_such_package" in str(found)


def test_free_memory(monkeypatch):
    assert free_memory(torch.device("cpu")) > 1e8
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert free_memory(torch.device("cuda")) == 5
    monkeypatch.delattr(machine.os, "sysconf")
    assert free_memory(torch.device("cpu")) is None
