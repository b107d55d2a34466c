"""The record of the real model: the code on a tiny Llama; what is stored, and what the notebook reads of it."""
import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course.records import real
from lora_edu.course.records.stored import Record, load_record
from tests.course.records.conftest import tiny

pytestmark = pytest.mark.slow
SIZES = {"steps": 3, "valid": 4, "test": 4, "scored": 2}


@pytest.fixture
def few(monkeypatch):
    tokenizer = load_pretrained()[1]
    monkeypatch.setattr(real, "load_pretrained", lambda name: (tiny(), tokenizer))
    monkeypatch.setattr(real, "sixteen_bits", lambda device: None)
    monkeypatch.setattr(real, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(real, "tune", lambda rates, one_run: [one_run(lr) for lr in rates[:2]])


def test_it_runs_on_a_tiny_model_and_goes_on_where_it_was_cut_off(few, tmp_path, monkeypatch):
    found = real.real_model(str(tmp_path), SIZES, {"fable": "fable"})
    for method in real.METHODS:
        runs = [run for run in found["runs"] if run["method"] == method]
        assert [run["seed"] for run in runs] == list(real.SEEDS) and all(run["model"] == "fable" for run in runs)
        assert all(run["path"][-1][0] == 3 and run["change"] > 0 for run in runs)
        assert runs[0]["slots"] is not None and runs[1]["slots"] is None
        assert len([run for run in found["grid"] if run["method"] == method]) == 2
    its = found["models"]["fable"]
    assert set(its) == {"before", "stored", "at full's rate", "orders", "repaired"} and set(its["stored"]) == {
        "int8", "nf4"}
    assert its["stored"]["nf4"]["bytes"] < its["stored"]["int8"]["bytes"]
    monkeypatch.setattr(real.Bench, "trained", lambda *_, **__: pytest.fail("it was kept"))
    monkeypatch.setattr(real.Bench, "repaired", lambda *_, **__: pytest.fail("it was kept"))
    assert real.real_model(str(tmp_path), SIZES, {"fable": "fable"}) == found


def test_what_is_kept_of_an_update_and_where_an_adapter_is_merged(few):
    bench = real.Bench("fable", "fable", None, SIZES)
    torch.manual_seed(0)
    full = bench.run("full", 1e-2, seed=1, report=True)
    kept = full["kept"]
    assert kept["energy"] == sorted(kept["energy"]) and kept["energy"][kept["ranks"].index(16)] == 1.0
    assert kept["test"][kept["ranks"].index(16)] == pytest.approx(full["test"], abs=1e-3), "a tiny one is of rank 16"
    over = bench.run("rank 16 on nf4", 5e-2, seed=1, report=True)
    ways = over["merges"]
    assert ways["apart"] == over["test"] == pytest.approx(ways["into the four bits' values"], abs=1e-3)
    assert len(set(ways.values())) >= 3, "the other two ways give other models"


@pytest.fixture(scope="module")
def record():
    return load_record("real_model")


def test_the_stored_record_keeps_the_rules(record):
    """Rates chosen inside their grid, on the same seed, and reported on others."""
    for model in ("fable", "SmolLM2"):
        for method in real.METHODS:
            grid, runs = record.runs("grid", model=model, method=method), record.runs(model=model, method=method)
            rates = sorted(grid.of("lr"))
            assert len(rates) >= 3 and set(grid.of("seed")) == {0} and runs.of("seed") == list(real.SEEDS)
            assert set(runs.of("lr")) == {grid.best()["lr"]} and rates[0] < runs[0]["lr"] < rates[-1]
            assert [step for step, *_ in grid[0]["path"]] == [10, 20, 30, 40, 50, 60]


def test_what_a_model_says_by_hand(record):
    said, runs = real.said_by("SmolLM2", record), record["runs"]

    def mean(method, what="test"):
        values = [run[what] for run in runs if run["model"] == "SmolLM2" and run["method"] == method]
        return sum(values) / len(values)
    before = record["models"]["SmolLM2"]["before"]
    assert said.rank_1 == pytest.approx((before["test"] - mean("rank 1")) / (before["test"] - mean("full")))
    assert sum(said.apart) / 2 == pytest.approx(mean("rank 16") - mean("full"))
    assert said.forgot["full"] == pytest.approx(mean("full", "own") - before["own"])
    assert 0 < said.energy < said.gain <= 1.05


@pytest.mark.parametrize("name, model", [("SmolLM2-135M-Instruct", "SmolLM2"), ("fable", "fable")])
def test_the_trainers_pale_paths_are_the_grids(record, name, model):
    found = real.recorded_paths(name)
    assert found["settings"]["rows"] == 4 and found["settings"]["tasks"] == {"restaurants": {"steps": 60}}
    assert {(run["rank"], run["alpha"]) for run in found["grid"]} == {(1, 2), (16, 32)}
    wanted = record.runs("grid", model=model, method="rank 16")
    assert [run["path"] for run in found["grid"] if run["rank"] == 16] == wanted.of("path")
    assert isinstance(record, Record)
