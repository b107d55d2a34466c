"""What the processes of test_distributed.py do: four, then two, then one; rank 0 writes what came out to {n}.json.

    python tests/training/distributed_run.py FOLDER

They are forked, with the environment that torchrun would give them: what they import takes longer than what they do.
"""
import contextlib
import itertools
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch._dynamo        # DDP and FSDP2 import it when they are first used, and forked it is there
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.profiler import ProfilerActivity, profile

from lora_edu.lora.adapter_file import save_adapter
from lora_edu.lora.inject import apply_lora, unfreeze_matrices
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.quantize import quantize_
from lora_edu.training.distributed import gathered, held, spread, start
from lora_edu.training.group import STRATEGIES, Group
from lora_edu.training.loop import adamw, loss_on, train
from lora_edu.training.restart import load_checkpoint, save_checkpoint
from lora_edu.training.traffic import Traffic

STEPS, ROWS = 20, 5
MIXTURES = {"bf16 base": (torch.bfloat16, ""), "some train": (torch.float64, "some"), "nf4": (torch.float32, "nf4")}
MEMORY = (("lora", torch.float32), ("lora", torch.bfloat16), ("full", torch.float32))


def batches(seed=0):
    """Random tokens in rows of unlike length: what counts is another share in every process."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        ids = torch.randint(52, (ROWS, 13), generator=generator)
        targets = ids[:, 1:].clone()
        for row in range(ROWS):
            targets[row, torch.randint(2, 12, (), generator=generator):] = -100
        if step == 3:
            targets[-1] = -100                           # the last of four processes has this row alone: nothing counts
        yield ids[:, :-1], targets


def model_of(method, dtype, tied=False, kind=""):
    """`kind`: "nf4" stores the base in four bits; "some" adapts two matrices a block and trains one norm as well."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(52, 16, 24, 2, 2, 1, 32, tie_word_embeddings=tied)).to(dtype)
    torch.manual_seed(1)
    if kind == "nf4":
        quantize_(model)
    if method == "lora":
        apply_lora(model, ["q_proj", "down_proj"] if kind == "some" else "all-linear", rank=4, alpha=8)
    else:
        model.requires_grad_(True)
        unfreeze_matrices(model)
    if kind == "some":
        model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    return model


class MeanOfMeans(Group):
    """The classic fault: every process's mean counts the same, however few its tokens are."""

    def total(self, value, device):
        counts = isinstance(value, int)                      # the tokens
        return max(1, value) * self.size if counts else super().total(value, device)


def trained(method, strategy, dtype, group, device, tied=False, folder=None, kind="", pieces=1):
    """20 steps: losses, the bytes of a step, and the model; with a folder it is saved at step 10."""
    model = spread(model_of(method, dtype, tied, kind), strategy, group, device)
    optimizer, traffic, losses = adamw(model), Traffic(), []
    steps = train(model, batches(), STEPS, 1e-2, optimizer=optimizer, processes=group, pieces=pieces)
    for i in range(STEPS):
        with traffic if i == 1 else contextlib.nullcontext():
            step = next(steps)
        losses.append(step.loss)
        if folder and step.step == 10:
            save_checkpoint(folder, model, optimizer, step.step, group)
    return losses, dict(traffic.given), model


def mixtures(group, device):
    """Models that are not of one kind: {name: (losses, bytes)}; and what is refused: {name: sentence}."""
    found, said = {}, {}
    for strategy in ("ddp", "fsdp"):
        for name, (dtype, kind) in MIXTURES.items():
            found[f"{name} {strategy}"] = trained("lora", strategy, dtype, group, device, kind=kind)[:2]
        found[f"pieces {strategy}"] = trained("lora", strategy, torch.float64, group, device, pieces=2)[:2]
        try:
            apply_lora(spread(model_of("full", torch.float32), strategy, group, device), rank=2)
        except ValueError as error:
            said[f"late {strategy}"] = str(error)
    model = model_of("lora", torch.bfloat16, kind="some")            # a norm in 16 bits trains beside float32 factors
    try:
        next(train(spread(model, "fsdp", group, device), batches(), 1, 1e-2, processes=group))
    except (ValueError, AssertionError, RuntimeError) as error:
        said["two dtypes train"] = f"{type(error).__name__}: {error}"
    return found, said


def as_it_comes():
    """What DDP sends in a forward pass of a model in four bits if it is not told otherwise."""
    model = nn.parallel.DistributedDataParallel(model_of("lora", torch.float32, kind="nf4"))
    model(torch.zeros(1, 4, dtype=torch.long))           # the first makes ready
    with Traffic() as traffic:
        model(torch.zeros(1, 4, dtype=torch.long))
    return dict(traffic.given)


def resumed(strategy, group, device, folder):
    """From the checkpoint of another number of processes to the end."""
    model = spread(model_of("lora", torch.float64), strategy, group, device)
    optimizer = adamw(model)
    done = load_checkpoint(folder, model, optimizer)
    rest = train(model, itertools.islice(batches(), done, None), STEPS, 1e-2, optimizer=optimizer, first_step=done,
                 processes=group)
    return [step.loss for step in rest]


def memory(method, strategy, dtype, group, device):
    """Bytes in this process: what is held after a step; DDP's buckets, as it says itself; and the most that comes on
    top of weights, adapter and states within a step, by the allocator's own count.
    """
    torch.manual_seed(0)
    model = Llama(LlamaConfig(300, 128, 344, 4, 4, 4, 64)).to(dtype)
    if method == "lora":
        apply_lora(model, rank=4)
    else:
        model.requires_grad_(True)
    model = spread(model, strategy, group, device)
    optimizer = adamw(model)
    ids = torch.arange(group.size * 9).view(-1, 9) % 300
    batch = group.mine((ids[:, :-1], ids[:, 1:]))

    def step():
        optimizer.zero_grad()
        loss_on(model, batch).backward()
        optimizer.step()

    for _ in range(2):                                   # the states are made in the first, DDP's buckets anew after it
        step()
    optimizer.zero_grad()
    # oneDNN packs 16-bit matrices on CPUs that multiply them themselves, in memory that is that CPU's affair
    with torch.backends.mkldnn.flags(enabled=False):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    buckets = model._get_ddp_logging_data()["rebuilt_bucket_sizes"] if strategy == "ddp" else "0"
    return held(model, optimizer) | {"buckets": sum(map(int, buckets.split(","))),
                                     "most": max(itertools.accumulate(sizes))}


def process(rank, processes, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    all_runs(folder / f"{processes}.json", folder / "checkpoints")


def all_runs(out, folder):
    group, device = start("cpu")
    said = {"losses": {}, "bytes": {}, "memory": {}, "processes": group.size}
    for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        before = folder / (strategy if group.size == 2 else other)          # of four processes, or of two
        if (before / "latest").is_file():
            said[f"resumed {strategy}"] = resumed(strategy, group, device, before)
    for strategy in ("ddp", "fsdp"):
        for method in ("lora", "full"):
            for dtype in (torch.float32, torch.float64):
                save = folder / strategy if (method, dtype) == ("lora", torch.float64) else None
                losses, sent, model = trained(method, strategy, dtype, group, device, folder=save)
                name = f"{method} {strategy} {str(dtype).removeprefix('torch.')}"
                said["losses"][name], said["bytes"][name] = losses, sent
                whole = gathered(model)
                if save and group.rank == 0:
                    save_adapter(whole, out.with_suffix(f".{strategy}"))
        losses, _, _ = trained("lora", strategy, torch.float64, group, device, tied=True)
        said["losses"][f"lora {strategy} tied"] = losses
    wrong = MeanOfMeans(group.rank, group.size)
    said["mean of means"] = trained("lora", "ddp", torch.float64, wrong, device)[0]
    for method, dtype in MEMORY if group.size > 1 else ():
        for strategy in ("ddp", "fsdp"):
            said["memory"][f"{method} {strategy} {str(dtype)[6:]}"] = memory(method, strategy, dtype, group, device)
    if group.size == 2:
        said["mixtures"], said["refused"] = mixtures(group, device)
        said["buffers sent"] = as_it_comes()
    if group.rank == 0:
        out.write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def main():
    folder = Path(sys.argv[1])
    for processes in (4, 2, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_processes(process, (processes, port, folder), processes, start_method="fork")   # raises what they raise
        for strategy in STRATEGIES:                     # the next goes on from step 10 of this one
            (folder / "checkpoints" / strategy / "latest").write_text("10\n")


if __name__ == "__main__":
    main()
