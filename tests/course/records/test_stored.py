"""Stored experiments are found by name and give their runs as plain rows; a tie is a tie only if every seed says so."""
import json
import statistics

import pytest
import torch

from lora_edu.course.records.stored import RECORDS, Record, Runs, better, hardware, load_record, tie

NAMES = sorted(path.stem for path in RECORDS.glob("*.json"))


@pytest.mark.parametrize("differences, verdict", [
    ([0.01, -0.02, 0.0], True), ([0.03, 0.05], False), ([-0.03, -0.05], False), ([0.01, 0.03], None),
    ([-0.03, 0.03], None), ([0.02], True),
])
def test_tie(differences, verdict):
    assert tie(differences, margin=0.02) is tie(differences) is verdict


@pytest.mark.parametrize("differences, verdict", [([-0.03, -0.05], True), ([0.01, -0.01], False), ([0.03, 0.05], False),
                                                  ([-0.03, 0.0], None), ([0.03, -0.03], None)])
def test_better_is_lower_by_more_than_the_margin_at_every_seed(differences, verdict):
    assert better(differences) is verdict


def test_a_record_that_is_not_there_names_those_that_are():
    assert load_record("bistro_adapter")["made"]["command"] == "python -m lora_edu.record bistro_adapter"
    with pytest.raises(FileNotFoundError, match="no record 'nonsense'.*bistro_adapter"):
        load_record("nonsense")


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_the_json_and_says_how_it_was_made(name):
    record = load_record(name)
    assert record == json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    assert record["made"]["command"] in record.about() and record["made"]["date"] in record.about()


def test_runs_are_those_of_the_json_with_their_place_in_it():
    """Oracle: the same numbers, dug out by hand."""
    record = load_record("lora_beside_full")
    for task, methods in record["tasks"].items():
        for method, found in methods.items():
            runs = record.runs(task=task, method=method)
            assert runs.of("test") == [run["test"] for run in found["runs"]]
            assert runs.of("tales") == [run["tales"]["its own"] for run in found["runs"]]
            assert runs.of("change") == [run["change"]["frobenius"] for run in found["runs"]]
            assert runs.mean("test") == pytest.approx(statistics.mean(run["test"] for run in found["runs"]))
            assert record.runs("tuning", task=task, method=method).best()["lr"] == found["lr"]
    assert record.runs("patient")[0]["lr"] == record["patient"]["lr"]
    seeds = load_record("rank_seeds")
    assert len(seeds.runs("short", task="bistro")) == len(seeds["short"]["bistro"])
    assert len(seeds.runs("long")) == len(seeds["long"]["runs"])
    assert len(seeds.runs("long tuning")) == len(seeds["long"]["tuning"])
    assert load_record("placements").runs(placement="MLP").of("rank") == [14] * 3


def test_what_was_cut_to_every_rank_has_lists():
    record = load_record("spectra")
    runs = record.runs(task="bistro", null=None, trains="matrices")
    raw = [run for run in record["runs"] if (run["task"], run["null"], run["trains"]) == ("bistro", None, "matrices")]
    mean, low, high = runs.band("loss")
    for i in range(len(record["settings"]["ranks"])):
        column = [run["cut"][0]["test"][i] for run in raw]
        assert (mean[i], low[i], high[i]) == (pytest.approx(sum(column) / 3), min(column), max(column))
    assert all(gain[0] == 0 and gain[-1] == 1 for gain in runs.of("gain"))
    assert runs[0]["slots"] == raw[0]["cut"][0]["slots"] and runs[0]["tales"] == raw[0]["cut"][0]["tales"]


def test_differences_are_paired_by_seed_whatever_the_order():
    one = Runs([{"seed": 1, "test": 1.0}, {"seed": 2, "test": 5.0}])
    other = Runs([{"seed": 2, "test": 1.0}, {"seed": 1, "test": 4.0}])
    assert one.apart(other) == [-3.0, 4.0]
    assert one.text("test", ".1f") == "3.0 (1.0 to 5.0)" and list(one.by("seed")) == [1, 2]


def test_the_best_is_never_one_that_diverged():
    assert Runs([{"valid": None}, {"valid": 2.0}, {"valid": 1.0, "lr": 3}]).best()["lr"] == 3


def test_no_such_run_says_what_there_is():
    with pytest.raises(ValueError, match="no run of this record has part='runs' and {'placement': 'head'}: .*'MLP'"):
        load_record("placements").runs(placement="head")
    with pytest.raises(ValueError, match="no run of this record"):
        Record(settings={}).runs()


def test_times_are_ratios_to_the_base():
    record = load_record("latency")
    row = record["models"]["fable"]["shapes"][0]
    ratio = record.times("fable")[f"{row['batch']}×{row['length']}"]["LoRA"]
    assert (ratio.value, ratio.low, ratio.high) == tuple(row["prefill"]["LoRA"][key] for key in
                                                         ("ratio", "ratio_low", "ratio_high"))
    assert "base" not in record.times("135M", "decode")["1×16"]


def test_hardware_is_named_by_what_it_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert hardware(torch.device("cuda")) == "Tesla T4 (compute capability 7.5)"
    assert hardware(torch.device("cpu")).startswith("cpu (")
