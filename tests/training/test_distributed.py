"""Several processes train on the same thing as one. Oracle: `train` in this process, without any of it."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from lora_edu.lora.factors import lora_parameters
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from lora_edu.lora.inject import apply_lora, unfreeze_matrices
from lora_edu.lora.merge import remove_lora
from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import BISTRO_ADAPTER, FABLE, load_pretrained
from lora_edu.measure.memory import bill
from lora_edu.models.sizes import Sizes
from lora_edu.training import bistro, distributed, restart
from lora_edu.training.group import STRATEGIES, Group
from lora_edu.training.loop import adamw, loss_on, train
from tests.training.distributed_run import MIXTURES, ROWS, STEPS, batches, model_of

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LORA_EDU_DEVICE": "cpu"}
CLOSE = {"float32": 1e-6, "float64": 1e-10}
RUNS = [f"{method} {strategy} {dtype}" for method in ("lora", "full") for strategy in ("ddp", "fsdp")
        for dtype in CLOSE]
MEMORY_RUNS = [("lora float32", "fp32"), ("lora bfloat16", "bf16-mixed"), ("full float32", "fp32")]
IN_TRANSIT = ("UNSHARDED_PARAM", "ALL_GATHER", "UNSHARDED_GRAD", "REDUCE_SCATTER")


@contextlib.contextmanager
def torchrun(processes, *arguments, restarts=0, limit=300):
    """Started, and read by the caller; ended with what it started after so many seconds; it has ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "--max-restarts", str(restarts), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as complaints:            # a pipe that nobody reads would hold them up
        running = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=complaints, text=True)
        late = threading.Timer(limit, running.terminate)        # it takes the others along
        late.start()
        try:
            yield running
            running.communicate()
        finally:
            late.cancel()
            running.terminate()
        complaints.seek(0)
        assert running.returncode == 0, complaints.read()[-3000:]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """{processes: what came out}: four first, whose checkpoints two go on from."""
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run([sys.executable, "tests/training/distributed_run.py", folder], cwd=ROOT, env=ENV, timeout=300,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {processes: json.loads((folder / f"{processes}.json").read_text()) | {"folder": folder}
            for processes in (4, 2, 1)}


@pytest.fixture(scope="module")
def alone():
    """The losses of 20 steps, by run, in one process and without a group."""
    found = {}
    for method in ("lora", "full"):
        for dtype in CLOSE:
            model = model_of(method, getattr(torch, dtype))
            found[f"{method} {dtype}"] = [step.loss for step in train(model, batches(), STEPS, 1e-2,
                                                                      optimizer=adamw(model))], model
    return found


def off(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_one_two_and_four_processes_have_the_losses_of_one_loop(name, several, alone):
    method, _, dtype = name.split()
    for processes, said in several.items():
        assert off(said["losses"][name], alone[f"{method} {dtype}"][0]) < CLOSE[dtype], processes


@pytest.mark.full
@pytest.mark.slow
def test_tied_embeddings_go_through_both(several):
    for strategy in ("ddp", "fsdp"):
        runs = [said["losses"][f"lora {strategy} tied"] for said in several.values()]
        assert off(runs[0], runs[1]) < 1e-10 and off(runs[1], runs[2]) < 1e-10


@pytest.mark.full
@pytest.mark.slow
def test_means_of_unlike_batches_averaged_are_another_training(several, alone):
    """The fault that nobody sees: with one process it is none."""
    right = alone["lora float64"][0]
    assert off(several[1]["mean of means"], right) < 1e-10
    assert off(several[2]["mean of means"], right) > 1e-3 and off(several[4]["mean of means"], right) > 1e-3


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("dtype, size", [("float32", 4), ("float64", 8)])
def test_what_is_sent_is_what_the_formulas_say(dtype, size, several, alone):
    """DDP reduces the gradients of what trains. FSDP2 gathers every block before its forward and its backward pass, the
    rest once, and reduces the same gradients.
    """
    for processes in (2, 4):
        for method in ("lora", "full"):
            model = alone[f"{method} {dtype}"][1]
            trains = size * sum(p.numel() for p in model.parameters() if p.requires_grad)
            blocks = size * sum(p.numel() for p in model.model["layers"].parameters())
            rest = size * sum(p.numel() for p in model.parameters()) - blocks
            ddp, fsdp = (several[processes]["bytes"][f"{method} {strategy} {dtype}"] for strategy in ("ddp", "fsdp"))
            assert ddp["all-reduce"] == pytest.approx(trains, rel=0.01)
            assert fsdp["all-gather"] == pytest.approx(2 * blocks + rest, rel=0.01)
            assert fsdp["reduce-scatter"] == pytest.approx(trains, rel=0.01)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name, recipe", MEMORY_RUNS)
def test_what_is_held_is_what_the_bill_says(name, recipe, several):
    """Oracles: the tensors' own sizes, DDP's account, and what the CPU's allocator counted."""
    method, dtype = name.split()
    for processes in (2, 4):
        for strategy in ("ddp", "fsdp"):
            found = several[processes]["memory"][f"{method} {strategy} {dtype}"]
            parts = bill(Sizes("llama", 300, 128, 344, 4, 4, 4, 64, 32), method, rank=4, recipe=recipe, length=8,
                         strategy=strategy, processes=processes).parts
            for what in ("weights", "adapter", "gradients", "optimizer states"):
                assert found[what] == parts[what], (strategy, processes, what)
            if strategy == "ddp":
                assert found["buckets"] == parts["in transit"]
            outside = (2 * 300 * 128 + 128) * (2 if dtype == "bfloat16" else 4)
            block = (processes * (parts["weights"] + parts["adapter"]) - outside) / 4
            comes = parts["activations"] + parts["temporary"]
            if (method, strategy) == ("lora", "ddp"):
                assert found["most"] == pytest.approx(comes, rel=0.03)
            elif method == "lora":       # at least: gloo copies blocks on threads of its own, more or fewer at a time
                assert found["most"] > outside + 2 * block


def sharded_step(model, processes):
    """(the most bytes in transit, and what comes and goes beside them at that moment) in an FSDP2 step of a process of
    so many, by torch's own accounting. The others are played: nothing is sent, and what comes is held all the same.
    """
    # torch's own tools, which may move in another version: no other test shall fall with them
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPModMemStats
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        model = distributed.spread(model, "fsdp", Group(0, processes), torch.device("cpu"))
        ids = torch.arange(9)[None]
        tracker = FSDPMemTracker(model)
        with tracker:
            loss_on(model, (ids[:, :-1], ids[:, 1:])).backward()
    finally:
        dist.destroy_process_group()
    moments = [{str(kind).split(".")[-1]: size for kind, size in moment[torch.device("cpu")].items()}
               for seen in tracker.memory_tracking.values() if isinstance(seen, _FSDPModMemStats)
               for moments in seen.snapshots.values() for moment in moments]
    return max((sum(moment.get(kind, 0) for kind in IN_TRANSIT), moment["TEMP"]) for moment in moments)


@pytest.mark.parametrize("processes, layers", [(2, 4), (4, 4), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("name, recipe", MEMORY_RUNS)
def test_what_fsdp_has_in_transit_is_what_the_bill_says(name, recipe, processes, layers):
    """Oracle: torch's FSDPMemTracker, which follows every tensor of FSDP2 by its kind."""
    method, dtype = name.split()
    model = Llama(LlamaConfig(300, 128, 344, layers, 4, 4, 64)).to(getattr(torch, dtype)).requires_grad_(True)
    if method == "lora":
        apply_lora(model, rank=4)
    most, other = sharded_step(model, processes)
    said = bill(Sizes("llama", 300, 128, 344, layers, 4, 4, 64, 32), method, rank=4, recipe=recipe, length=8,
                strategy="fsdp", processes=processes).parts["in transit"]
    head = 4 * 300 * 128 if method == "full" else 0          # its gradient: torch has it in what comes and goes
    assert most + head == said
    assert head <= other < head + 0.01 * said                # beside it gradients of activations, of eight tokens


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{kind} {strategy}" for kind in (*MIXTURES, "pieces") for strategy in STRATEGIES])
def test_models_of_several_kinds_of_numbers(name, several):
    """A base in bfloat16 or in four bits beside float32 factors, a part that trains, and a batch in two pieces."""
    kind, _, strategy = name.rpartition(" ")
    losses, sent = several[2]["mixtures"][name]
    dtype, what = MIXTURES.get(kind, (torch.float64, ""))
    model = model_of("lora", dtype, kind=what)
    alone = [step.loss for step in train(model, batches(), STEPS, 1e-2)]
    assert off(losses, alone) < {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    trains = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert sent["all-reduce" if strategy == "ddp" else "reduce-scatter"] == trains      # in pieces too: once a step
    if strategy == "fsdp":
        blocks = sum(p.nbytes for p in model.model["layers"].parameters())
        rest = sum(p.nbytes for p in model.parameters()) - blocks
        assert sent["all-gather"] == pytest.approx((2 if kind == "pieces" else 1) * (2 * blocks + rest), rel=0.01)


@pytest.mark.full
@pytest.mark.slow
def test_what_is_refused_in_several_processes(several):
    """Factors that come too late; and, by torch, a norm in bfloat16 that trains beside factors in float32."""
    said = several[2]["refused"]
    assert "change the model first, then put DistributedDataParallel around it" in said["late ddp"]
    assert "apply LoRA before the model is sharded" in said["late fsdp"]
    assert "uniform original parameter dtype" in said["two dtypes train"]


@pytest.mark.full
@pytest.mark.slow
def test_ddp_as_it_comes_sends_a_base_in_four_bits_in_every_forward_pass(several):
    """Codes are buffers, and those it keeps alike by sending them; `spread` tells it not to."""
    stored = sum(b.nbytes for b in model_of("lora", torch.float32, kind="nf4").buffers())
    assert several[2]["buffers sent"]["broadcast"] == pytest.approx(stored, rel=0.02)
    assert "broadcast" not in {kind for kind, size in several[2]["mixtures"]["nf4 ddp"][1].items() if size > 1000}


@pytest.mark.full
@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_the_checkpoint(several, alone):
    for processes in (2, 1):
        for strategy in ("ddp", "fsdp"):
            assert off(several[processes][f"resumed {strategy}"], alone["lora float64"][0][10:]) < 1e-10


@pytest.mark.full
@pytest.mark.slow
def test_rank_0_writes_an_ordinary_adapter(several, alone):
    for processes, said in several.items():
        for strategy in ("ddp", "fsdp"):
            stored = load_file(said["folder"] / f"{processes}.{strategy}" / "adapter_model.safetensors")
            for theirs, own in zip(stored.values(), sorted_like(stored, alone["lora float64"][1])):
                torch.testing.assert_close(theirs.double(), own, atol=1e-6, rtol=0)
            assert len(stored) == len(lora_parameters(alone["lora float64"][1]))


def sorted_like(stored, model):
    for name in stored:
        module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        yield getattr(model.get_submodule(module), factor).detach()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A small LLaMA with fable's tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    Llama(LlamaConfig(2048, 32, 48, 2, 2, 2, 256)).save_folder(folder)
    shutil.copy(FABLE / "tokenizer.json", folder)
    return folder


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_that_is_killed_is_started_again_and_the_run_ends_as_it_would_have(strategy, tiny_folder, tmp_path):
    """Oracle: the same batches in this process, undisturbed."""
    model, tokenizer = load_pretrained(str(tiny_folder), torch.float64)
    torch.manual_seed(0)
    apply_lora(model, rank=8, alpha=16)
    alone = [step.loss for step in train(model, bistro.batches(tokenizer, 12, 4, 0), 12, 1e-2)]
    lines, killed = [], []
    with torchrun(2, "-m", "lora_edu.training.distributed", "--model", tiny_folder, "--strategy", strategy, "--steps",
                  12, "--rows", 4, "--dtype", "float64", "--save", tmp_path / "run", "--every", 2, restarts=1) as run:
        for line in run.stdout:
            lines.append(line)
            if line.startswith("5 ") and not killed:
                killed.append(children(run.pid)[-1])
                os.kill(killed[0], signal.SIGKILL)
    losses = {int(line.split()[0]): float(line.split()[1]) for line in lines if line[0].isdigit()}
    assert killed and [*losses] == [*range(1, 13)] and off(losses.values(), alone) < 1e-10
    assert len(lines) >= 13          # some steps may have been made twice


@pytest.mark.full
@pytest.mark.slow
def test_accelerate_and_peft_have_our_losses(tiny_folder, tmp_path):
    """The way out: transformers, PEFT and accelerate in two processes, from the same factors, on the same data. Rows
    are dealt out otherwise, which changes nothing.
    """
    model, tokenizer = load_pretrained(str(tiny_folder), torch.float64)
    apply_lora(model, rank=8, alpha=16)
    save_adapter(model, tmp_path / "adapter")
    remove_lora(model, merge=False)
    load_adapter(model, tmp_path / "adapter")                        # in float32, as in the file
    made = list(bistro.batches(tokenizer, 8, 5, 0))
    torch.save(made, tmp_path / "batches.pt")
    alone = [step.loss for step in train(model, made, 8, 1e-2)]
    asked = (tiny_folder, tmp_path / "adapter", tmp_path / "batches.pt", tmp_path / "out.json")
    with torchrun(2, "tests/training/accelerate_run.py", *asked):
        pass
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["processes"] == 2 and off(said["losses"], alone) < 1e-6


def children(process):
    """The processes that this one started, by the kernel's list."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


# -- refusals ----------------------------------------------------------------------------------------------------------

def test_fewer_rows_than_processes():
    rows = torch.zeros(ROWS, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="5 rows for 8 processes"):
        Group(0, 8).mine((rows, rows))


def test_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="torchrun --standalone"):
        distributed.start()


def test_a_gpu_that_is_not_there(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "9")
    with pytest.raises(RuntimeError, match=f"there are {torch.cuda.device_count()}: start fewer"):
        distributed.start("cuda")


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(other.getsockname()[1])}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(RuntimeError, match="is another training there"):
            distributed.start("cpu")


def test_started_again_without_a_checkpoint(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="give --save FOLDER from the first start"):
        distributed.main([])


def test_full_fine_tuning_in_16_bits():
    with pytest.raises(ValueError, match="round small steps away"):
        distributed.main(["--method", "full", "--dtype", "bfloat16"])


@pytest.mark.parametrize("words, lr", [([], 0.01), (["--method", "full"], 0.001), (["--lr", "0"], 0.0)])
def test_a_rate_of_zero_is_a_rate(words, lr):
    assert distributed.rate(distributed.parser().parse_args(words)) == lr


def test_factors_that_come_after_ddp(group_of_one):
    """In DDP they would train in every process by themselves. Oracle: before it, they are among what it sends."""
    model = model_of("full", torch.float32)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for adds in (lambda: apply_lora(wrapped, rank=2), lambda: unfreeze_matrices(wrapped), lambda: LoRAStack(
            wrapped, [LoRASettings(rank=2)]), lambda: load_adapter(wrapped, BISTRO_ADAPTER)):
        with pytest.raises(ValueError, match="change the model first"):
            adds()
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(monkeypatch, tiny_folder):
    """main() as the one process that torchrun would start."""
    def start(*words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        distributed.main(["--model", str(tiny_folder), "--rows", "2", "--device", "cpu", *map(str, words)])
    return start


def test_what_was_trained_is_kept_to_the_last_step(run, tmp_path, tiny_folder):
    """By the checkpoint, and by --out: an adapter, or the whole model."""
    run("--steps", 3, "--every", 2, "--save", tmp_path / "run", "--out", tmp_path / "adapter", "--report",
        tmp_path / "report.json")
    assert (tmp_path / "run" / "latest").read_text() == "3\n"
    report = (tmp_path / "report.json").read_text()
    assert json.loads(report)["first step"] == 1 and len(json.loads(report)["losses"]) == 3
    load_adapter(load_pretrained(str(tiny_folder))[0], tmp_path / "adapter")
    run("--steps", 3, "--save", tmp_path / "run", "--report", tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == report, "nothing was left to do, and nothing is lost"
    run("--steps", 1, "--method", "full", "--out", tmp_path / "model")
    trained, plain = (Llama.from_folder(folder) for folder in (tmp_path / "model", tiny_folder))
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert moved == {f"{name}.weight" for name in unfreeze_matrices(plain)}


@pytest.mark.parametrize("words, error, message", [
    (["--steps", 0], ValueError, "--steps 0"), (["--rows", 0], ValueError, "--rows 0"),
    (["--pieces", -1], ValueError, "--pieces -1"), (["--every", 0], ValueError, "--every 0"),
    (["--out", "FILE"], FileExistsError, "is a file, and a folder"), (["--save", "FILE"], FileExistsError, "is a file"),
    (["--report", "FILE/x.json"], FileNotFoundError, "there is no folder .* to write x.json in"),
    (["--report", "FOLDER"], PermissionError, "is a folder: give another name")])
def test_what_could_not_be_kept_is_refused_before_it_begins(words, error, message, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = {"FILE": str(tmp_path / "file"), "FOLDER": str(tmp_path), "FILE/x.json": str(tmp_path / "file" / "x.json")}
    with pytest.raises(error, match=message):
        distributed.main([places.get(word, str(word)) for word in words])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_goes_on_with_its_own_training_only(run, tmp_path, tiny_folder):
    with pytest.raises(ValueError, match="lr=nan"):
        run("--lr", "nan", "--save", tmp_path / "run")
    assert not (tmp_path / "run").exists(), "what was refused leaves no mark"
    run("--steps", 2, "--save", tmp_path / "run")
    run("--steps", 2, "--save", tmp_path / "run", "--lr", "0.01")              # the default, said aloud
    with pytest.raises(ValueError, match="holds a training with rank 8, and now it is rank 4: give the same"):
        run("--steps", 2, "--save", tmp_path / "run", "--rank", 4)
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    torch.manual_seed(9)
    Llama(LlamaConfig(2048, 32, 48, 2, 2, 2, 256)).save_folder(other)
    file = tmp_path / "run" / "settings.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"model": str(other)}))
    with pytest.raises(ValueError, match="holds a training with base [0-9a-f]{12}, and now it is base"):
        run("--steps", 2, "--save", tmp_path / "run", "--model", other)
    file.unlink()
    with pytest.raises(ValueError, match="has checkpoints and no settings.json"):
        run("--steps", 2, "--save", tmp_path / "run")


@pytest.mark.parametrize("latest", ["", "seven", "9"])
def test_a_latest_that_names_no_checkpoint(latest, tmp_path):
    (tmp_path / "latest").write_text(latest)
    with pytest.raises(ValueError, match="and no such checkpoint is beside it"):
        restart.newest(tmp_path)


def test_a_damaged_checkpoint_is_refused_and_the_model_is_as_it_was(group_of_one, tmp_path):
    model = model_of("lora", torch.float32)
    optimizer = adamw(model)
    list(train(model, batches(), 2, 1e-2, optimizer=optimizer))
    restart.save_checkpoint(tmp_path / "run", model, optimizer, 2, Group())
    (part,) = (tmp_path / "run" / "step-2").glob("*.distcp")
    whole, meta = part.read_bytes(), tmp_path / "run" / "step-2" / ".metadata"
    for spoil in (lambda: part.write_bytes(whole[:len(whole) // 2]), lambda: part.write_bytes(b""), meta.unlink):
        spoil()
        other = model_of("lora", torch.float32)
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match="step-2 is damaged, or of another model"):
            restart.load_checkpoint(tmp_path / "run", other, adamw(other))
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before))


@pytest.mark.parametrize("rank, size", [(-1, 2), (2, 2), ("0", 2), (0, 0), (0, 2.0)])
def test_a_process_that_there_is_not(rank, size):
    with pytest.raises(ValueError, match="the first is 0"):
        Group(rank, size)


class Pair(Group):
    """Two processes of which the other is played: it finds what this one finds."""

    def total(self, value, device):
        return 2 * value


def test_more_pieces_than_the_smallest_share_has_rows():
    """In every process, before one waits for the other."""
    for rank in (0, 1):
        with pytest.raises(ValueError, match="5 rows for 6 pieces of all processes"):
            next(train(model_of("lora", torch.float64), batches(), 1, 1e-2, processes=Pair(rank, 2), pieces=3))


def test_what_a_batch_does_not_reach_is_refused_before_the_processes_go_apart():
    model = model_of("lora", torch.float64)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="1 of .* tensors that train got no gradient"):
        next(train(model, batches(), 1, 1e-2, processes=Pair(0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    next(train(model, batches(), 1, 1e-2))                                  # alone it may be so


def test_what_was_tied_is_gathered_as_tied(group_of_one):
    model = model_of("full", torch.float32, tied=True)
    whole = distributed.gathered(distributed.spread(model, "fsdp", Group(), torch.device("cpu")))
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_a_refusal_is_a_sentence():
    done = subprocess.run([sys.executable, "-m", "lora_edu.training.distributed", "--steps", "0"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "process 0: --steps 0: choose a whole number, 1 or more.\n"


def test_an_unknown_strategy():
    with pytest.raises(ValueError, match="strategy='pipeline'"):
        distributed.spread(model_of("lora", torch.float32), "pipeline", Group(0, 1), torch.device("cpu"))


def test_fsdp_of_a_model_whose_blocks_nobody_named():
    with pytest.raises(ValueError, match="this is a Sequential, .* choose 'ddp', or train it with PEFT"):
        distributed.spread(nn.Sequential(nn.Linear(2, 2)), "fsdp", Group(), torch.device("cpu"))
