"""A sweep against the same runs one at a time; its chunks, its memory, and what it does when a run, the reader or a
file spoils it.
"""
import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lora_edu.lora.factors import lora_layers
from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack, StackedLinear
from lora_edu.training import sweep as module
from lora_edu.training.loop import constant, evaluate, train
from lora_edu.training.stacked import evaluate_stack, side_by_side, train_stack
from lora_edu.training.sweep import SweepTable, sweep
from tests.lora.test_stack import batches as batches_of
from tests.lora.test_stack import wrapped
from tests.lora.tiny import our_llama

STEPS = 12
GRID = [LoRASettings(8, 16.0, lr=0.004, seed=1), LoRASettings(1, 2.0, ("q_proj", "v_proj"), lr=0.02, seed=2),
        LoRASettings(4, 8.0, lr=0.005, seed=2),
        LoRASettings(1, 16.0, lr=0.01, seed=1), LoRASettings(2, 8.0, rslora=True, lr=0.01, seed=1)]
HELDOUT = list(batches_of(5, 2, rows=11)) + list(batches_of(6, 1, rows=2, width=5))


def batches(seed):
    """Of one number of rows, and of another length for another seed."""
    return batches_of(seed, STEPS, width=6 + seed)


@pytest.fixture
def base():
    return our_llama().double().eval()


@pytest.fixture
def pairs(monkeypatch):
    """Two runs in a chunk."""
    monkeypatch.setattr(module, "CPU", 2)


def run(base, grid=GRID, **how):
    return sweep(base, grid, batches, STEPS, HELDOUT, **how)


def assert_equal_runs(a, b):
    assert (a["diverged"], a["rank"], a["lr"]) == (b["diverged"], b["rank"], b["lr"])
    assert a["losses"] == pytest.approx(b["losses"], abs=1e-9)
    assert [step for step, _ in a["heldout"]] == [step for step, _ in b["heldout"]]
    assert [loss for _, loss in a["heldout"]] == pytest.approx([loss for _, loss in b["heldout"]], abs=1e-9)


def test_every_row_is_that_of_the_run_alone_in_the_order_of_the_grid(base, pairs):
    """Oracle: `train` and `evaluate` on a model with that adapter; the chunks of two are cut by rank, not in the
    grid's order.
    """
    seen = []
    table = run(base, every=5, watch=lambda chunk, step: seen.append((chunk, step)))
    assert [chunk for chunk, step in seen if step.step == 1] == [[1, 3], [4, 2], [0]]
    for i, (row, adapter) in enumerate(zip(table, GRID, strict=True)):
        alone, heldout = wrapped(base, adapter), []
        losses = []
        for step in train(alone, batches(adapter.seed), STEPS, adapter.lr):
            losses.append(step.loss)
            if step.step in (5, 10, 12):
                heldout.append([step.step, evaluate(alone, HELDOUT)])
        settings = {"rank": adapter.rank, "lr": adapter.lr, "diverged": None}
        assert_equal_runs(row, settings | {"losses": losses, "heldout": heldout})
        assert row["trainable"] == sum(p.numel() for p in alone.parameters() if p.requires_grad)
        assert row["scaling"] == adapter.scaling and row["steps"] == STEPS and row["seed"] == adapter.seed
        assert row["target_modules"] == adapter.target_modules and row["rslora"] == adapter.rslora
        assert row["alpha"] == adapter.alpha
        assert [step.losses[chunk.index(i)] for chunk, step in seen if i in chunk] == row["losses"]
    assert [row["heldout"] for row in run(base)] == [row["heldout"][-1:] for row in table]


def test_the_schedule_is_passed_on(base):
    alone = wrapped(base, GRID[4])
    losses = [step.loss for step in train(alone, batches(1), STEPS, GRID[4].lr, schedule=constant)]
    assert run(base, [GRID[4]], schedule=constant)[0]["losses"] == pytest.approx(losses, abs=1e-9)
    assert run(base, [GRID[4]])[0]["losses"] != pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_plain_again(base, training):
    before = copy.deepcopy(base.train(training))
    run(base)
    assert [(n, type(m), m.training) for n, m in base.named_modules()] == [(n, type(m), m.training)
                                                                           for n, m in before.named_modules()]
    assert all(torch.equal(a, b) and a.grad is None
               for a, b in zip(base.parameters(), before.parameters(), strict=True))


def test_score_gets_an_ordinary_trained_model_and_may_move_it(base):
    found = []

    def score(model):
        found.append(sorted({type(m).__name__ for m in model.modules()} & {"LoRALinear", "StackedLinear"}))
        loss = evaluate(model, HELDOUT)
        model.float()                                   # as a move to another device: the base must not follow
        return {"own": loss, "layers": len(list(lora_layers(model))), "odd": math.nan, "text": "x"}
    table = run(base, score=score)
    assert found == [["LoRALinear"]] * 5
    for row in table:
        assert row["own"] == pytest.approx(row["heldout"][-1][1], abs=1e-9)
        assert row["layers"] == (14 if row["target_modules"] == "all-linear" else 4)
        assert row["odd"] is None and row["text"] == "x"
    assert {p.dtype for p in base.parameters()} == {torch.float64}


# -- runs that diverge


@pytest.mark.parametrize("lr, schedule", [(1e200, constant), (1e30, None)])
def test_an_absurd_rate_is_marked_and_harms_nobody(lr, schedule, pairs, monkeypatch, tmp_path):
    """1e200 leaves float64 at the first update; 1e30 leaves float32. Both runs sit between sane ones in a stack."""
    monkeypatch.setattr(module, "CPU", 4)
    dtype = torch.float64 if schedule else torch.float32
    base, how = our_llama().to(dtype), {"schedule": schedule} if schedule else {}
    wild = LoRASettings(1, 2.0, lr=lr, seed=1)
    table = run(base, [GRID[1], wild, GRID[3], GRID[2]], every=1, score=lambda model: {"scored": True},
                out=tmp_path / "a.json", **how)
    without = run(base, [GRID[1], GRID[3], GRID[2]], every=1, **how)
    assert table[1]["diverged"] in (1, 2, 3) and "scored" not in table[1]
    assert all(math.isfinite(x) for x in table[1]["losses"]) and len(table[1]["losses"]) == table[1]["diverged"] - 1
    assert [step for step, _ in table[1]["heldout"]] == list(range(1, table[1]["diverged"]))
    for row, want in zip([table[0], table[2], table[3]], without, strict=True):
        assert row["scored"] and row["diverged"] is None
        assert row["losses"] == pytest.approx(want["losses"], abs=1e-9 if schedule else 2e-5)
    strict = json.loads((tmp_path / "a.json").read_text(),
                        parse_constant=lambda literal: pytest.fail(f"{literal} is no JSON"))
    assert len(strict) == 4
    assert f"diverged at step {table[1]['diverged']}" in str(table) and table.best(rank=1)["lr"] < 1


def test_a_run_that_breaks_in_its_last_update_has_diverged_too(base, tmp_path):
    table = sweep(base, [LoRASettings(1, 2.0, lr=1e200), GRID[3]], batches, 1, HELDOUT, out=tmp_path / "a.json")
    assert table[0]["diverged"] == 1 and table[0]["heldout"] == [] and table[1]["diverged"] is None
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_a_diverged_adapter_goes_back_to_its_start(base):
    stack = LoRAStack(base, [GRID[3], LoRASettings(2, 4.0, lr=1e200, seed=9)])
    start = [p.clone() for p in stack.parameters_of(1)]
    steps = list(train_stack(stack, (side_by_side([b, b]) for b in batches(1)), 6))
    nans = [math.isnan(step.losses[1]) for step in steps]
    assert nans == sorted(nans) and nans[-1] and not any(math.isnan(step.losses[0]) for step in steps)
    assert all(torch.equal(a, b) for a, b in zip(start, stack.parameters_of(1), strict=True))


# -- interruptions and files


def stop_in(chunk_wanted, at=3):
    def watch(chunk, step):
        if chunk == chunk_wanted and step.step == at:
            raise KeyboardInterrupt
    return watch


def test_a_stopped_sweep_goes_on_from_its_finished_chunks(base, pairs, tmp_path, capsys):
    whole = run(base, every=5)
    before, out = copy.deepcopy(base.train()), tmp_path / "new" / "a.json"
    part = run(base, every=5, out=out, watch=stop_in([4, 2]))
    assert part == [whole[1], whole[3]] and "Stopped: 2 of 5 runs are finished" in capsys.readouterr().out
    assert [(n, type(m), m.training) for n, m in base.named_modules()] == [(n, type(m), m.training)
                                                                           for n, m in before.named_modules()]
    seen = []
    rest = run(base, every=5, out=out, watch=lambda chunk, step: seen.append(chunk))
    assert rest == whole and [1, 3] not in seen and seen[0] == [4, 2]
    assert run(base, every=5, out=out, watch=lambda *_: pytest.fail("nothing is left to do")) == whole
    assert not list(tmp_path.rglob("*.part"))


def test_equal_adapters_share_a_finished_run(base, tmp_path):
    whole = run(base, [GRID[3], GRID[1], GRID[3]], out=tmp_path / "a.json")
    again = run(base, [GRID[3], GRID[1], GRID[3]], out=tmp_path / "a.json",
                watch=lambda *_: pytest.fail("nothing is left to do"))
    assert again == whole and whole[0]["losses"] == pytest.approx(whole[2]["losses"], abs=1e-12)


def test_a_larger_grid_takes_up_what_is_there(base, tmp_path):
    first = run(base, GRID[:2], out=tmp_path / "a.json")
    seen = []
    table = run(base, GRID, out=tmp_path / "a.json", watch=lambda chunk, step: seen.extend(chunk))
    assert list(table[:2]) == list(first) and set(seen) == {2, 3, 4}


@pytest.mark.parametrize("text, message", [
    ("[{", "is not the JSON of a sweep"), ('{"a": 1}', "is not the JSON of a sweep"),
    ("[1]", "is not the JSON of a sweep"),
    ('[{"rank": 1}]', "is not the JSON of a sweep"), (None, "holds a run of another sweep")])
def test_a_file_of_something_else_is_left_alone(text, message, base, tmp_path):
    file = tmp_path / "a.json"
    if text is None:
        sweep(base, GRID[:1], batches, 2, HELDOUT, out=file)          # the same adapter, other steps
    else:
        file.write_text(text)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(base, GRID[:1], out=file, watch=lambda *_: pytest.fail("it trained"))
    assert file.read_bytes() == before


# -- what cannot be trained says so before any training


@pytest.mark.parametrize("change, message", [
    ({"grid": []}, "no adapters: give a list"),
    ({"steps": 0}, "steps=0 and .* at least one of each"),
    ({"heldout": []}, "0 held-out tokens that count"),
    ({"heldout": [(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -100))]}, "0 held-out tokens that count"),
    ({"grid": [*GRID, LoRASettings(9)]}, "adapter 5: .*rank=9 does not fit"),
    ({"grid": [GRID[0], LoRASettings(target_modules=("v_porj",))]}, "adapter 1: .*Did you mean 'v_proj'"),
    ({"memory": 1e4}, r"an adapter of rank 1 needs about 0 MB for batches of \(3, 8\), and memory=0 MB"),
    ({"batches": lambda seed: iter([])}, r"batches\(2\) gives no batch"),
])
def test_bad_settings(change, message, base):
    how = {"grid": GRID, "batches": batches, "steps": STEPS, "heldout": HELDOUT} | change
    before = list(base.named_modules())
    with pytest.raises(ValueError, match=message):
        sweep(base, how.pop("grid"), how.pop("batches"), how.pop("steps"), how.pop("heldout"),
              watch=lambda *_: pytest.fail("it trained"), **how)
    assert list(base.named_modules()) == before


def test_too_little_memory_for_the_largest_is_said_before_the_smallest_trains(base):
    small, large = (module._bytes_for(base, GRID[i], next(batches(1)), None) for i in (3, 0))
    with pytest.raises(ValueError, match="an adapter of rank 8 needs"):
        run(base, [GRID[3], GRID[0]], memory=(small + large) / 2, watch=lambda *_: pytest.fail("it trained"))


def test_batches_that_end_early_or_differ_in_rows(base):
    with pytest.raises(ValueError, match="the batches ended after 12 steps, and 20 were asked for"):
        sweep(base, GRID, batches, 20, HELDOUT)
    assert not any(isinstance(m, StackedLinear) for m in base.modules())
    # 6 rows would divide by 2 adapters
    with pytest.raises(ValueError, match="batches of 2 and 4 rows side by side"):
        sweep(base, [GRID[0], GRID[4], GRID[2]], lambda seed: batches_of(seed, 3, rows=2 * seed), 3, HELDOUT)
    stack = LoRAStack(base, GRID[:2])
    with pytest.raises(ValueError, match="3 rows for 2 adapters"):
        list(train_stack(stack, batches(1), 3))
    with pytest.raises(ValueError, match="no held-out token counts"):
        evaluate_stack(stack, [])


# -- chunks and memory


def test_chunks_are_as_many_as_fit(base, monkeypatch):
    monkeypatch.setattr(module, "CPU", 100)
    alike, batch = [LoRASettings(4, 8.0, seed=1)] * 10, next(batches(1))
    one = module._bytes_for(base, alike[0], batch, None)
    assert [module._fitting(base, alike, batches, share * one, None) for share in (1.01, 3.01, 3.99, 50)] == [1, 3, 3,
                                                                                                              10]
    # the largest rank counts for all: the others are padded
    mixed = [LoRASettings(1, 2.0, seed=1)] * 3 + alike
    assert module._fitting(base, mixed, batches, 4.01 * one, None) == 4
    assert module._fitting(base, mixed, batches, 3.99 * one, None) == 3
    assert not any(isinstance(m, StackedLinear) for m in base.modules())


def test_the_estimate_grows_with_rank_rows_and_precision(base):
    def need(rank=1, rows=3, model=base):
        return module._bytes_for(model, LoRASettings(rank, 2.0), next(batches_of(1, 1, rows=rows)), None)
    activations, factors = need(1, 6) - need(1, 3), need(8) - need(1)
    numbers = sum(7 * sum(p.shape) for n, p in base.named_parameters() if p.ndim == 2 and "proj" in n)
    assert activations == pytest.approx(need(1, 9) - need(1, 6), rel=0.05) and factors > 20 * numbers
    assert need(model=our_llama()) < 0.75 * need()


def test_a_cpu_parts_ranks_that_differ_much(base):
    grid = [LoRASettings(1, 2.0)] * 2 + [LoRASettings(8, 2.0, ("gate_proj",))] + [LoRASettings(12, 2.0,
                                                                                               ("gate_proj",))] * 2
    assert module._fitting(base, grid, batches, 4e9, None) == 3


MEMORY = """
import torch
from pathlib import Path
from lora_edu.lora.stack import LoRASettings
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.training import sweep

torch.set_num_threads(1)
sweep.CPU = 100
model = Llama(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
num_attention_heads=4,
                          num_key_value_heads=4))
ids = torch.randint(256, (4, 65))
batch = ids[:, :-1], ids[:, 1:]
sizes = set()

def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if
    line.startswith("VmHWM"))

def run(count, memory):
    sweep.sweep(model, [LoRASettings(8, 16.0)] * count, lambda seed: iter([batch] * 3), 3, [batch], memory=memory,
                watch=lambda chunk, step: sizes.add(len(chunk)))

run(1, 4e9)                             # what is loaded once is loaded now
before = peak()
run(30, BUDGET)
print(peak() - before, max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads VmHWM, which Linux keeps")
def test_a_sweep_keeps_to_its_budget():
    """Peak memory in a process of its own, with glibc told to give large blocks back at once.

    The estimate counts what the forward pass keeps and two tensors of the logits' size; the rest of what the backward
    pass makes is smaller than what it has freed by then. Slack: 15 per cent, here 22 MB, for what does not grow with a
    chunk (about 14 MB, measured at smaller and larger budgets): buffers of the matrix library and the small blocks that
    the allocator keeps.
    """
    budget = 150e6
    done = subprocess.run([sys.executable, "-c", MEMORY.replace("BUDGET", str(budget))], capture_output=True, text=True,
                          timeout=120,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    grown, largest = map(int, done.stdout.split())
    assert largest > 5 and 0.5 * budget < grown < 1.15 * budget, (grown, largest)


# -- the table


def test_the_table_is_read_and_kept(base, tmp_path):
    table = run(base, GRID, every=5)
    assert table.best() is min(table, key=lambda row: row["heldout"][-1][1])
    assert table.best(rank=1) is min((table[1], table[3]), key=lambda row: row["heldout"][-1][1])
    assert table.best(rank=1, seed=2) is table[1]
    with pytest.raises(ValueError, match=r"no finished run has \{'rank': 3\}: the table has 5 runs"):
        table.best(rank=3)
    lines = str(table).splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["rank", "alpha", "scaling", "learning", "rate", "seed", "held-out", "loss"]
    assert lines[2].split() == ["1", "2", "2", "0.02", "2", f"{table[1]['heldout'][-1][1]:.3f}"]
    page = table._repr_html_()
    assert page.startswith("<table>") and page.count("<tr>") == 6 and f">{table[0]['heldout'][-1][1]:.3f}</td>" in page
    table.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(list(table)))
    with pytest.raises(ValueError):
        SweepTable([{"rank": math.nan}]).save(tmp_path / "a.json")
    assert len(json.loads((tmp_path / "a.json").read_text())) == 5


def test_held_out_loss_is_that_of_evaluate(base):
    """Oracle: `evaluate` on each adapter alone; eleven rows are read in pieces of eight."""
    stack = LoRAStack(base, GRID)
    list(train_stack(stack, (side_by_side([b] * 5) for b in batches(1)), 3))
    base.train()
    assert evaluate_stack(stack, HELDOUT) == pytest.approx([evaluate(stack.unstack(i), HELDOUT) for i in range(5)],
                                                           abs=1e-12)
    assert base.training


def test_rows_of_which_no_token_counts_and_adapters_that_would_not_move_are_said():
    model, ids = our_llama(vocab_size=50), torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    good = (ids[:, :-1], ids[:, 1:])
    grid = [LoRASettings(rank=1), LoRASettings(rank=2, alpha=0)]
    with pytest.raises(ValueError, match="adapter 1's first gradient is exactly zero"):
        sweep(model, grid, lambda seed: [good] * 3, 3, [good])
    with pytest.raises(ValueError, match="step 2: no token of adapter 0's rows counts"):
        sweep(model, grid[:1], lambda seed: [good, (good[0], torch.full_like(good[1], -100))], 2, [good])
    stack = LoRAStack(model, grid[:1])
    model.bfloat16()
    with pytest.raises(ValueError, match="stack's factors are in 16 bits"):
        next(train_stack(stack, [good], 1))


def test_numbers_of_numpy_are_kept_as_json(tmp_path):
    model, ids = our_llama(vocab_size=50), torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    good, out = (ids[:, :-1], ids[:, 1:]), tmp_path / "s.json"
    grid = [LoRASettings(rank=np.int64(1), alpha=np.float32(2), lr=np.float64(1e-3), seed=np.int32(0))]
    table = sweep(model, grid, lambda seed: [good] * 2, np.int64(2), [good], out=out)
    assert json.loads(out.read_text())[0]["steps"] == table[0]["steps"] == 2

