"""The record that lays a trained LoRA's update beside full fine-tuning's: on a tiny Llama, and as it is stored."""
import numpy as np
import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course.records import from_scratch, real
from lora_edu.course.records.stored import load_record
from lora_edu.measure.spectra import Factors
from tests.course.records.conftest import tiny


def factors(updates: dict) -> Factors:
    return Factors(None, {name: (torch.zeros(0), *torch.linalg.svd(update, full_matrices=False))
                          for name, update in updates.items()})


def test_what_is_shared_is_the_mean_over_the_matrices_of_numpys_angles():
    generator = torch.Generator().manual_seed(0)
    one, other = ({name: torch.randn(size, generator=generator, dtype=torch.float64)
                   for name, size in (("q", (20, 30)), ("up", (40, 20)))} for _ in range(2))
    found = from_scratch.shared(factors(one), factors(other))
    for i, k in enumerate(from_scratch.SHARED):
        rows = []
        for name in one:
            (U, _, Vh), (V, _, Wh) = (np.linalg.svd(side[name].numpy(), full_matrices=False) for side in (one, other))
            rows.append([np.square(U[:, :k].T @ V[:, :k]).sum() / k, np.square(Vh[:k] @ Wh[:k].T).sum() / k,
                         k / len(U), k / Vh.shape[1]])
        assert np.allclose([found[what][i] for what in ("out", "in", "chance out", "chance in")], np.mean(rows, 0),
                           rtol=1e-3)
    own = from_scratch.shared(factors(one), factors(one))
    assert own["out"] == own["in"] == [1.0] * len(from_scratch.SHARED)


def test_it_runs_on_a_tiny_model(monkeypatch):
    tokenizer = load_pretrained()[1]
    monkeypatch.setattr(real, "load_pretrained", lambda name: (tiny(), tokenizer))
    monkeypatch.setattr(real, "sixteen_bits", lambda device: None)
    monkeypatch.setattr(real, "best_device", lambda: torch.device("cpu"))
    found = from_scratch.from_scratch({"steps": 2, "valid": 4, "test": 4, "scored": 2}, {"fable": "fable"})
    model = found["models"]["fable"]
    assert [(run["method"], run["seed"]) for run in model["runs"]] == [
        (method, seed) for method in from_scratch.METHODS for seed in real.SEEDS]
    for run in model["runs"]:
        assert run["energy"][-1] == pytest.approx(1) and run["energy"] == sorted(run["energy"])
    assert set(model["shared"]) == {"full and rank 16", "full, two seeds", "rank 16, two seeds"}


def test_the_stored_record_took_its_rates_from_the_record_before_it():
    record, before = load_record("from_scratch"), load_record("real_model")
    assert record["models"]["SmolLM2"]["matrices"] == 210 and record["models"]["fable"]["matrices"] == 28
    for name, model in record["models"].items():
        for run in model["runs"]:
            same = [row for row in before.runs(model=name, method=run["method"]) if row["seed"] == run["seed"]]
            assert run["lr"] == same[0]["lr"] and run["test"] == pytest.approx(same[0]["test"], abs=0.02)
        full = next(row["kept"] for row in before.runs(model=name, method="full") if row.get("kept"))
        assert model["runs"][0]["energy"] == pytest.approx(full["energy"], abs=0.02)
