"""Where a training stands, as one file beside its adapter: what trains, the optimizer's numbers, the random state and
the step. A training that was cut off goes on from there as if it had never stopped, to the bit on a CPU.

PEFT does not look at this file, and nothing in it is pickled. It is replaced in one move, so that a machine that goes
away while it is written leaves the one before.
"""
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from lora_edu.files import read_tensors, write_whole
from lora_edu.lora.factors import copy_all, refuse_merged, some_lora_layers
from lora_edu.lora.fingerprint import differs, fingerprint
from lora_edu.lora.misfit import misfit
from lora_edu.lora.targets import plain_name, shorten, unwrap
from lora_edu.numbers import whole

TRAINING, STATE = "training.safetensors", "lora_edu.training"


def write_training(model: nn.Module, folder: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the file. Raises ValueError for a step that is none, or an optimizer that cannot be put into numbers."""
    if whole(step) is None or step < 0:
        raise ValueError(f"step={step!r} is no number of steps: give how many were made, such as Step.step.")
    names, numbers = _names(model, optimizer), {}
    tensors = {f"parameter {name}": t.detach() for name, t in _moving(model, names).items()}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer {names[p]} {key}"] = value
            else:
                numbers.setdefault(names[p], {})[key] = value
    tensors |= {f"random {kind}": state for kind, state in _random_states(next(iter(names))).items()}
    groups = [{key: value for key, value in group.items() if key != "params"} | {
        "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    try:
        said = json.dumps({"step": whole(step), "optimizer": type(optimizer).__name__, "groups": groups,
                           "numbers": numbers, "scalings": _scalings(model), "base": fingerprint(model)})
    except TypeError as error:
        raise ValueError(f"the state of {type(optimizer).__name__} does not go into JSON ({error}): save it with "
                         "torch.save, and the adapter without optimizer=.") from None
    content = save({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, {"format": "pt", STATE: said})
    write_whole(folder / TRAINING, lambda part: part.write_bytes(content))


def load_training(model: nn.Module, folder: str | Path, optimizer: torch.optim.Optimizer) -> int:
    """Put a training back to where `save_adapter(…, optimizer=…, step=…)` left it; returns the steps it had made.

    The model and the optimizer are made as they were made then: the same `apply_lora`, the same optimizer. What trains,
    the optimizer's numbers and torch's random state come from the file. Leave out the batches that were read
    (`itertools.islice(batches, step, None)`) and give `train` first_step=step.

    Raises (then nothing has been changed):
        FileNotFoundError: there is no such file in the folder.
        ValueError: the file is damaged, or belongs to a model, a base, scalings or an optimizer that are not these.
        RuntimeError: the model is merged, and its merged weights would not follow.

    >>> import itertools, tempfile
    >>> from lora_edu import apply_lora, save_adapter
    >>> model, folder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3)), tempfile.mkdtemp()
    >>> _ = apply_lora(model, ["0"], rank=2)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    >>> _ = save_adapter(model, folder, optimizer=optimizer, step=100)
    >>> load_training(model, folder, optimizer)
    100
    """
    model, file = unwrap(model), Path(folder) / TRAINING
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {TRAINING}: give a folder that save_adapter(…, optimizer=…, step=…) "
                                "wrote.")
    refuse_merged(model)
    tensors, metadata = read_tensors(file)
    random = _part(tensors, "random")
    said = _read(file, metadata, random)
    names = _names(model, optimizer)
    other = _difference(said, model, optimizer, names)
    moving, values, numbers = _moving(model, names), _part(tensors, "parameter"), _part(tensors, "optimizer")
    wrong = other or misfit(values, moving) or misfit(numbers, numbers)         # of itself: is every number finite?
    if wrong:
        raise ValueError(f"{file} is of another training: {wrong}. Make the model and the optimizer as they were made "
                         "then.")
    state = {name: dict(said["numbers"].get(name, {})) for name in names.values()}
    for key, value in numbers.items():
        name, _, entry = key.rpartition(" ")
        state.setdefault(name, {})[entry] = value
    order = [name for group in said["groups"] for name in group["params"]]
    groups = [own | group | {"params": [order.index(name) for name in group["params"]]}      # another torch's may
              for group, own in zip(said["groups"], optimizer.param_groups)]                 # have other settings
    optimizer.load_state_dict({"state": {i: state[name] for i, name in enumerate(order) if state[name]},
                               "param_groups": groups})
    copy_all(values, moving)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return said["step"]


def _part(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{kind} "): t for name, t in tensors.items() if name.startswith(f"{kind} ")}


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    """The optimizer's parameters -> their names in the model."""
    own = {id(p): plain_name(name) for name, p in unwrap(model).named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = sum(id(p) not in own for p in held)
    if strange or not held:
        raise ValueError(f"the optimizer holds {len(held)} tensors, and {strange} of them are not this model's: give "
                         "the one that trains it.")
    return {p: own[id(p)] for p in held}


def _moving(model: nn.Module, names: Mapping[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """What a step changes, by name: what the optimizer holds, and the running means of batch norms that train along."""
    return {name: p for p, name in names.items()} | {
        f"{plain_name(name)}.{end}": tensor for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) for end, tensor in module.named_buffers(recurse=False)}


def _scalings(model: nn.Module) -> dict[str, float]:
    return {plain_name(name): layer.scaling for name, layer in some_lora_layers(model)}


def _random_states(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(parameter.device)} if parameter.is_cuda else {})


def _read(file: Path, metadata: Mapping[str, str], random: Mapping[str, torch.Tensor]) -> dict:
    try:
        said = {"base": None} | json.loads(metadata[STATE])
        state, own = random["cpu"], torch.get_rng_state()
        whole_file = (whole(said["step"]) is not None and said["step"] >= 0 and state.shape == own.shape
                      and state.dtype == own.dtype and isinstance(said["optimizer"], str)
                      and all(isinstance(group["params"], list) for group in said["groups"])
                      and all(isinstance(said[key], dict) for key in ("numbers", "scalings")))
    except (KeyError, TypeError, ValueError):
        whole_file = False
    if not whole_file:
        raise ValueError(f"{file} does not say where a training stood: give the file that save_adapter(…, optimizer=…, "
                         "step=…) wrote.")
    return said


def _difference(said: dict, model: nn.Module, optimizer: torch.optim.Optimizer, names: dict) -> str:
    """What tells the training in a file from this one, in words; empty where nothing does."""
    if said["optimizer"] != type(optimizer).__name__:
        return f"its optimizer was {said['optimizer']}, and this one is {type(optimizer).__name__}"
    other = said["base"] and differs(said["base"], model)
    if other:
        return f"it was made on another base ({other})"
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in said["groups"]]
    if groups != theirs:
        odd = sorted(set(sum(groups, [])) ^ set(sum(theirs, [])))
        return f"{shorten(odd, 2)} train in one of them alone" if odd else "the optimizer's groups have another order"
    scalings = _scalings(model)
    odd = [name for name, scaling in scalings.items() if said["scalings"].get(name) != scaling]
    return f"the scaling of {shorten(odd, 2)} is another" if odd or len(scalings) != len(said["scalings"]) else ""
