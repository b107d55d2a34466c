"""Checkpoints of a training in several processes, from which another number of processes can go on.

Source: PyTorch's torch.distributed.checkpoint; what is here says which checkpoint is whole, and of which training.
"""
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lora_edu.files import read_json, write_text
from lora_edu.training.group import Group


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, group: Group) -> None:
    """What trains, the optimizer and the step, by torch.distributed.checkpoint: every process writes its own part.

    The newest is named in `folder/latest` when it is whole; the one before is then taken away. `keep_settings` says
    beforehand which training the folder is of.
    """
    dcp, parts, optimizer_state = _state(model, optimizer)
    with warnings.catch_warnings(action="ignore"):               # that a CPU process has no device to name
        dcp.save({"model": parts, "optimizer": optimizer_state}, checkpoint_id=folder / f"step-{step}")
    dist.barrier()
    if group.rank == 0:
        before = newest(folder)
        write_text(folder / "latest", f"{step}\n")
        if before not in (0, step):
            shutil.rmtree(folder / f"step-{before}", ignore_errors=True)
    dist.barrier()


def _state(model: nn.Module, optimizer: torch.optim.Optimizer):
    """PyTorch's module of checkpoints (imported late: that takes seconds), and what it is to write."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    return dcp, *get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    file = folder / "latest"
    return int(file.read_text(encoding="utf-8")) if file.is_file() else 0


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Go on from the newest checkpoint, written by as many processes or by others; returns its step, 0 for none."""
    step = newest(folder)
    if step:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        dcp, parts, optimizer_state = _state(model, optimizer)
        with warnings.catch_warnings(action="ignore"):
            dcp.load({"model": parts, "optimizer": optimizer_state}, checkpoint_id=folder / f"step-{step}")
        set_state_dict(model, optimizer, model_state_dict=parts, optim_state_dict=optimizer_state,
                       options=StateDictOptions(ignore_frozen_params=True, strict=False))
    return step


def keep_settings(folder: Path, settings: dict, group: Group) -> None:
    """Write down what a folder's checkpoints were trained with; ValueError where they were trained with something else.
    """
    file = folder / "settings.json"
    if file.is_file():
        before = read_json(file, "the settings.json that the training wrote")
        other = [name for name in settings if before.get(name) != settings[name]]
        if other:
            raise ValueError(f"{folder} holds a training with " + ", ".join(f"{n} {before.get(n)}" for n in other)
                             + ", and now it is " + ", ".join(f"{n} {settings[n]}" for n in other)
                             + ": give the same, or another folder.")
    elif group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings) + "\n")
    dist.barrier()
