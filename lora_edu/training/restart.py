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
from torch.utils._pytree import tree_map_only

from lora_edu.files import read_json, write_text
from lora_edu.training.group import Group

SETTINGS = "settings.json"


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, group: Group,
                    settings: dict | None = None) -> None:
    """What trains, the optimizer and the step, by torch.distributed.checkpoint: every process writes its own part.

    The newest is named in `folder/latest` when it is whole; the one before is then taken away. `settings` say which
    training the folder is of; `check_settings` compares them when it goes on. Random numbers are not kept: with dropout
    a training goes on with other draws.
    """
    dcp, parts, optimizer_state = _state(model, optimizer)
    with warnings.catch_warnings(action="ignore"):               # that a CPU process has no device to name
        dcp.save({"model": parts, "optimizer": optimizer_state}, checkpoint_id=folder / f"step-{step}")
    dist.barrier()
    if group.rank == 0:
        before = newest(folder)
        if settings is not None:
            write_text(folder / SETTINGS, json.dumps(settings) + "\n")
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
    """The step of the newest whole checkpoint; 0 where there is none, ValueError where `latest` names none."""
    file = folder / "latest"
    if not file.is_file():
        return 0
    said = file.read_text(encoding="utf-8", errors="replace").strip()
    if not said.isdigit() or not (folder / f"step-{int(said)}").is_dir():
        raise ValueError(f"{file} names {said[:20]!r}, and no such checkpoint is beside it: write the number of a "
                         "folder step-… that is there, or begin in another folder.")
    return int(said)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Go on from the newest checkpoint, written by as many processes or by others; returns its step, 0 for none.

    The format is PyTorch's, whose list of parts is a pickle: go on only from folders that you, or one you trust, wrote.
    Raises ValueError for a checkpoint that is damaged or of another model, and then the model is as it was.
    """
    step = newest(folder)
    if step:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        dcp, *parts = _state(model, optimizer)
        model_state, optimizer_state = tree_map_only(torch.Tensor, torch.clone, parts)       # read beside, then put in
        try:
            with warnings.catch_warnings(action="ignore"):
                dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / f"step-{step}")
        except (CheckpointException, RuntimeError, OSError, EOFError) as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise ValueError(f"{folder / f'step-{step}'} is damaged, or of another model ({reason}): begin anew, in "
                             "another folder.") from None
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state,
                       options=StateDictOptions(ignore_frozen_params=True, strict=False))
    return step


def check_settings(folder: Path, settings: dict) -> None:
    """Raise ValueError where a folder's checkpoints were trained with something else, or do not say with what."""
    file = folder / SETTINGS
    if not newest(folder):
        return
    if not file.is_file():
        raise ValueError(f"{folder} has checkpoints and no {SETTINGS} that says of which training: begin in another "
                         "folder.")
    before = read_json(file, f"the {SETTINGS} that the training wrote")
    other = [name for name in settings if before.get(name) != settings[name]]
    if other:
        raise ValueError(f"{folder} holds a training with " + ", ".join(f"{n} {before.get(n)}" for n in other)
                         + ", and now it is " + ", ".join(f"{n} {settings[n]}" for n in other)
                         + ": give the same, or another folder.")
