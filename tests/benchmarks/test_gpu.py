"""benchmarks/gpu.py, rehearsed small: what it will measure on the day there is a GPU runs on what there is today."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu  # noqa: E402


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A GPU by name; each part leaves its name in `.ran`."""
    ran = []
    monkeypatch.setattr(gpu, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(gpu, "hardware", lambda device: "Tesla T4 (compute capability 7.5)")
    monkeypatch.setattr(gpu, "RECORD", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "PARTS", {name: lambda small, name=name: ran.append(name) or {"small": small}
                                       for name in ("a", "b")})
    return ran


def test_it_goes_on_where_it_was_stopped_and_says_what_is_missing(quick, monkeypatch, capsys):
    def stopped(small):
        raise KeyboardInterrupt
    whole = gpu.PARTS["b"]
    gpu.PARTS["b"] = stopped
    with pytest.raises(KeyboardInterrupt):
        gpu.main([])
    gpu.main(["--missing"])
    assert "yet: b;" in capsys.readouterr().out
    gpu.PARTS["b"] = whole
    assert gpu.main([]) == 0 and quick == ["a", "b"]
    record = json.loads(gpu.RECORD.read_text())
    assert record["made"]["device"] == "Tesla T4 (compute capability 7.5)" and record["a"] == {"small": False}
    monkeypatch.setattr(gpu, "hardware", lambda device: "NVIDIA L4 (compute capability 8.9)")
    assert gpu.main([]) == 0 and quick == ["a", "b", "a", "b"]         # another device, another record


def test_without_a_gpu_one_sentence_and_nothing_stored(quick, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "best_device", lambda: torch.device("cpu"))
    assert gpu.main([]) == 1 and "--rehearse" in capsys.readouterr().out
    assert gpu.main(["--rehearse"]) == 0 and not gpu.RECORD.exists() and quick == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["16 adapters", "latency", "peak memory"])
def test_a_part_rehearsed(part):
    result = gpu.PARTS[part](True)
    assert result and json.loads(json.dumps(result)) == result


@pytest.mark.full
def test_the_compiled_part_rehearsed():
    found = gpu.PARTS["step time"](True)
    assert {"lora_edu, compiled", "PEFT, compiled"} < set(found) and all(each["step"] > 0 for each in found.values())


def test_the_ledger_is_beside_the_peak():
    rows = gpu.peak_memory(True)
    assert [(row["method"], row["checkpointing"]) for row in rows] == [("full", False), ("full", True),
                                                                      ("lora", False), ("lora", True)]
    for row in rows:
        assert row["kept"] == pytest.approx(row["predicted kept"], rel=0.03) and row["predicted"] > row["kept"]
        assert row["peak"] > row["kept"]
