"""The one training loop in several processes: `torchrun` starts them, DDP or FSDP2 is around the model, and each has
its rows of every batch.

    torchrun --standalone --nproc-per-node 2 -m lora_edu.training.distributed --method lora --strategy ddp --steps 20

Every process reads the same batches in the same order and takes its own rows of each (`group.py`), so that one, two or
four processes train on the same thing.

Sources: Li et al. (2020), "PyTorch Distributed", arXiv:2006.15704, for DDP; PyTorch's `fully_shard` (FSDP2) for the
other.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lora_edu.files import check_place, write_text
from lora_edu.lora.adapter_file import save_adapter
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.fingerprint import fingerprint
from lora_edu.lora.inject import apply_lora, unfreeze_matrices
from lora_edu.models.llama import Llama
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro
from lora_edu.training.group import STRATEGIES, Group
from lora_edu.training.loop import adamw, train
from lora_edu.training.restart import check_settings, load_checkpoint, save_checkpoint
from lora_edu.training.traffic import Traffic

# what a training that goes on has in common with the one before; processes and strategy may be others
SAME = ("model", "method", "steps", "rows", "rank", "alpha", "seed", "dtype")


def start(device: str | None = None) -> tuple[Group, torch.device]:
    """Join the processes that torchrun started: NCCL on GPUs, one each, gloo on a CPU.

    Raises RuntimeError: not started by torchrun, fewer GPUs than processes, a port that is taken.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise RuntimeError("this is one process of several, and torchrun starts them: torchrun --standalone "
                           "--nproc-per-node 2 -m lora_edu.training.distributed …")
    here, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    asked = device or ("cuda" if cards else "cpu")
    if asked == "cuda" and here >= cards:
        raise RuntimeError(f"process {here} of this machine wants a GPU of its own, and there are {cards}: start fewer "
                           "processes, or pass --device cpu.")
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except dist.DistNetworkError as error:
        raise RuntimeError(f"the processes are to meet at {os.environ.get('MASTER_ADDR')}:"
                           f"{os.environ.get('MASTER_PORT')}, and cannot ({str(error).splitlines()[0][:120]}): is "
                           "another training there? torchrun --standalone finds a free port.") from None
    # started again by torchrun after a process was lost, nobody must look for the addresses of the time before
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if asked == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    where = torch.device("cuda", here) if asked == "cuda" else torch.device("cpu")
    return Group(dist.get_rank(), dist.get_world_size()), where


def spread(model: nn.Module, strategy: str, group: Group, device: torch.device) -> nn.Module:
    """The model in this strategy, LoRA in it already: DDP keeps all of it in every process and sends the gradients of
    what trains; FSDP2 keeps a share of every tensor, block by block, and gathers a block while it is used.

    Raises ValueError for an unknown strategy, and for a model that FSDP2 is not told the blocks of.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
    if strategy == "fsdp" and not isinstance(model, Llama):
        raise ValueError(f"this is a {type(model).__name__}, and 'fsdp' here knows the blocks of the course's Llama: "
                         "choose 'ddp', or train it with PEFT and accelerate.")
    model.to(device)
    if strategy == "ddp":
        # buffers stay as they are: what is stored in four bits lies in some, and would be sent in every forward pass
        with warnings.catch_warnings(action="ignore"):                   # that the flag will be called otherwise
            return nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None,
                                                       broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (group.size,))
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(model: nn.Module) -> nn.Module:
    """The model whole again, for rank 0 to save and for nothing else: FSDP2's shares are gathered, in every process;
    what was tied is tied.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    for module in inner.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if hasattr(parameter, "full_tensor"):
                whole = nn.Parameter(parameter.full_tensor().detach(), requires_grad=parameter.requires_grad)
                module._parameters[name] = wholes.setdefault(parameter, whole)
    return inner


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m lora_edu.training.distributed",
                                  description="The one training loop in several processes.")
    top.add_argument("--model", default="fable", help="fable, a folder, or a name on the hub")
    top.add_argument("--method", choices=("lora", "full"), default="lora",
                     help="full: the matrices that a LoRA goes beside, whole")
    top.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    top.add_argument("--steps", type=int, default=20)
    top.add_argument("--rows", type=int, default=16, help="of a whole batch, over all processes")
    top.add_argument("--rank", type=int, default=8)
    top.add_argument("--alpha", type=float, default=16.0)
    top.add_argument("--lr", type=float, default=None, help="default: 0.01 for lora, 0.001 for full")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32",
                     help="of the model; a LoRA's factors are in float32 beside bfloat16, which is for lora alone")
    top.add_argument("--pieces", type=int, default=1, help="that each process's rows go through in, one after another")
    top.add_argument("--device", choices=("cpu", "cuda"))
    top.add_argument("--save", type=Path, help="a folder for checkpoints; where there is one, the training goes on")
    top.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next; the last is one")
    top.add_argument("--out", type=Path, help="where rank 0 writes the adapter, in PEFT's format, or the whole model")
    top.add_argument("--report", type=Path, help="a JSON file for the losses, the bytes sent and the bytes held")
    return top


def rate(args: argparse.Namespace) -> float:
    """The learning rate that was asked for, 0 too, or the method's own."""
    return args.lr if args.lr is not None else {"lora": 1e-2, "full": 1e-3}[args.method]


def check(args: argparse.Namespace) -> None:
    """Raise, before anything has begun, for what could not be trained or kept."""
    for name in ("steps", "rows", "every", "pieces"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: choose a whole number, 1 or more.")
    if args.method == "full" and args.dtype == "bfloat16":
        raise ValueError("method full in bfloat16: 16 bits round small steps away. Train in float32, or a LoRA.")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not args.save:
        raise ValueError("a process was lost and all were started again, and there is no checkpoint to go on from: "
                         "give --save FOLDER from the first start.")
    for folder in filter(None, (args.save, args.out)):
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, and a folder is asked for: choose another name.")
    if args.report:
        check_place(args.report)


def prepared(args: argparse.Namespace, group: Group, device: torch.device):
    """The model, spread, and its tokenizer; and the settings that a training which goes on has in common."""
    model, tokenizer = load_pretrained(args.model, getattr(torch, args.dtype))
    torch.manual_seed(args.seed)                                         # the same start in every process
    if args.method == "lora":
        apply_lora(model, rank=args.rank, alpha=args.alpha)
    else:
        model.requires_grad_(True)
        unfreeze_matrices(model)
    base = hashlib.sha256((fingerprint(model) or "").encode()).hexdigest()[:12]
    settings = {name: getattr(args, name) for name in SAME} | {"lr": rate(args), "base": base}
    torch.manual_seed(args.seed + group.rank)                            # whatever draws while it trains draws its own
    return spread(model, args.strategy, group, device), tokenizer, settings


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes in this process after a step, under the names of `measure.memory.Bill.parts`."""
    def size(tensors) -> int:
        return sum(getattr(t, "to_local", lambda: t)().nbytes for t in tensors)     # of a DTensor: its own share

    named = dict(model.named_parameters())
    factors = [p for name, p in named.items() if "lora_" in name]
    return {"weights": size(named.values()) - size(factors), "adapter": size(factors),
            "gradients": size(p.grad for p in named.values() if p.grad is not None),
            "optimizer states": size(t for state in optimizer.state.values() for t in state.values()
                                     if isinstance(t, torch.Tensor) and t.ndim)}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check(args)
    group, device = start(args.device)
    try:
        model, tokenizer, settings = prepared(args, group, device)
        optimizer, traffic, losses = adamw(model), Traffic(), []
        if args.save:
            check_settings(args.save, settings)
        done = load_checkpoint(args.save, model, optimizer) if args.save else 0
        batches = itertools.islice(bistro.batches(tokenizer, args.steps, args.rows, args.seed), done, None)
        steps = train(model, batches, args.steps, rate(args), optimizer=optimizer, first_step=done, processes=group,
                      pieces=args.pieces)
        for i in range(done, args.steps):                # one step is counted: the second, as the first makes ready
            with traffic if i == min(done + 1, args.steps - 1) else contextlib.nullcontext():
                step = next(steps)
            losses.append(step.loss)
            if group.rank == 0:
                print(f"{step.step} {step.loss:.12f} {step.grad_norm:.9f}", flush=True)
            if args.save and (step.step % args.every == 0 or step.step == args.steps):
                save_checkpoint(args.save, model, optimizer, step.step, group, settings)
        everyone: list = [None] * group.size
        dist.all_gather_object(everyone, held(model, optimizer))
        whole = gathered(model)
        if group.rank == 0:
            if args.out and any(lora_layers(whole)):
                save_adapter(whole, args.out, base_name=args.model)
            elif args.out:
                whole.save_folder(args.out)
            report(args, done, losses, traffic, everyone)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def report(args: argparse.Namespace, done: int, losses: list[float], traffic: Traffic, everyone: list[dict]) -> None:
    """What a step sends, and the JSON file, with the losses since this start and what each process holds."""
    a_step = dict(sorted(traffic.given.items()))
    print("bytes a step: " + (", ".join(f"{kind} {size:,.0f}" for kind, size in a_step.items()) or "none"))
    if args.report and losses:
        write_text(args.report, json.dumps({"first step": done + 1, "losses": losses, "bytes a step": a_step,
                                            "held": everyone}) + "\n")
    elif args.report:
        print(f"all {args.steps} steps were made before: {args.report} is left as it is.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as refused:
        sys.exit(f"process {os.environ.get('RANK', 0)}: {refused}")
