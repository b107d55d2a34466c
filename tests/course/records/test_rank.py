"""The records of notebook 04: they run end to end on a tiny model and tiny settings, and hold what the explorer and
the notebook read.
"""
import itertools
import json

import pytest

from lora_edu.course.records import rank
from lora_edu.course.records.rank import best_of, beyond_the_edge, planted_rank, rank_alpha, rank_seeds, two_rates
from lora_edu.lora.settings import LoRASettings

pytestmark = pytest.mark.slow

GRID = {"ranks": (1, 8), "rates": (0.05, 0.1, 1e30), "rules": ("2r", "fixed", "rslora"),
        "tasks": {"bistro": {"steps": 3, "every": 2}, "python_docs": {"steps": 2, "every": 1}}}
PLANTED = {"matrix": "model.layers.1.mlp.down_proj", "planted": (1, 2), "ranks": (1, 2, 3), "rates": (0.02, 0.04),
           "steps": 3, "rows": 2,
           "tokens": 8}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def made(small, scratch):
    return rank_alpha(GRID, n=32, prompts=2, scratch=str(scratch))


def test_every_cell_of_the_grid_is_there_once(made):
    assert [(c["task"], c["rule"], c["rank"], c["lr"]) for c in made["grid"]] == \
        list(itertools.product(GRID["tasks"], GRID["rules"], GRID["ranks"], GRID["rates"]))


def test_the_settings_and_the_untouched_base_are_there(made):
    settings = made["settings"]
    assert settings["ranks"] == [1, 8] and settings["rates"] == [0.05, 0.1, 1e30]
    assert settings["rules"] == ["2r", "fixed", "rslora"]
    assert settings["tasks"]["bistro"]["steps"] == 3 and settings["fixed alpha"] == 16 and settings["rows"] == 8
    assert settings["targets"] == "all-linear" and settings["seed"] == 0 and settings["rules not kept"]
    for task in GRID["tasks"]:
        assert made["before"]["task"][task].keys() == {"valid", "test"} and made["before"]["task"][task]["valid"] > 7
    assert made["before"]["tales"]["its own"] > 7
    json.dumps(made, allow_nan=False)


def test_a_cell_is_what_the_explorer_reads(made):
    for cell in made["grid"]:
        adapter = LoRASettings.by_rule(cell["rule"], cell["rank"], lr=cell["lr"])
        assert (cell["alpha"], cell["seed"]) == (adapter.alpha, 0)
        assert cell["scaling"] == pytest.approx(adapter.scaling, abs=1e-6)
        assert cell["trainable"] == cell["rank"] * 2 * (4 * (16 + 16) + 3 * (16 + 24))
        if cell["lr"] == 1e30:
            assert cell["diverged"] and cell["valid"] is cell["test"] is cell["tales"] is None and "slots" not in cell
            assert all(step < cell["diverged"] for step, _, _ in cell["path"])
            continue
        assert cell["diverged"] is None and 0 < cell["valid"] < 20 and 0 < cell["test"] < 20 and 0 < cell["tales"] < 20
        assert ("slots" in cell) == (cell["task"] == "bistro")
        assert [step for step, _, _ in cell["path"]] == ([2, 3] if cell["task"] == "bistro" else [1, 2])
        assert cell["path"][-1][2] == cell["valid"] and all(0 < train < 20 for _, train, _ in cell["path"])
    assert len({c["valid"] for c in made["grid"] if c["lr"] == 0.05}) >= 8        # they are different runs


def test_at_rank_8_two_rules_are_one_run(made):
    by_key = {(c["task"], c["rule"], c["rank"], c["lr"]): {k: v for k, v in c.items() if k != "rule"}
              for c in made["grid"]}
    for task, lr in itertools.product(GRID["tasks"], GRID["rates"]):
        assert by_key[task, "2r", 8, lr] == by_key[task, "fixed", 8, lr]
        if lr < 1:
            assert by_key[task, "2r", 1, lr] != by_key[task, "fixed", 1, lr]
            assert by_key[task, "rslora", 8, lr]["valid"] == pytest.approx(by_key[task, "2r", 8, lr]["valid"], abs=1e-3)


def test_the_rules_agree_at_rank_8():
    assert LoRASettings.by_rule("2r", 4, lr=0.01, seed=3) == LoRASettings(4, 8, lr=0.01, seed=3)
    assert LoRASettings.by_rule("fixed", 4) == LoRASettings(4, 16)
    assert {rank: [round(LoRASettings.by_rule(rule, rank).scaling, 3) for rule in GRID["rules"]]
            for rank in (2, 8, 32)} == \
        {2: [2, 8, 4], 8: [2, 2, 2], 32: [2, 0.5, 1]}


def test_it_goes_on_from_what_is_in_the_scratch_folder(made, scratch, monkeypatch):
    """The runs of one task's file are thrown away, but for three; nothing else is trained again, and the record is
    the same.
    """
    trained = []

    def counted(model, grid, *args, **how):
        return ORIGINAL(model, grid, *args, watch=lambda chunk, step: trained.extend(chunk if step.step == 1 else []),
                        **how)
    ORIGINAL = rank.sweep
    monkeypatch.setattr(rank, "sweep", counted)
    file = scratch / "rank_alpha_bistro.json"
    runs = json.loads(file.read_text())
    file.write_text(json.dumps(runs[:3]))
    again = rank_alpha(GRID, n=32, prompts=2, scratch=str(scratch))
    assert sorted(trained) == list(range(3, len(runs))) and len(runs) == 3 * (2 * 3 - 1)
    for one, two in zip(made["grid"], again["grid"], strict=True):
        assert one["path"] == [pytest.approx(point, abs=2e-4) for point in two["path"]] and one.keys() == two.keys()


def test_what_a_stored_record_has_is_taken_over(made, monkeypatch):
    """Two rules known, the third trained, at rank 1 alone: at rank 8 its cells are those of the others."""
    known = made | {"grid": [cell for cell in made["grid"] if cell["rule"] != "rslora"]}
    asked = []

    def counted(model, adapters, *args, **how):
        asked.extend(adapters)
        return ORIGINAL(model, adapters, *args, **how)
    ORIGINAL = rank.sweep
    monkeypatch.setattr(rank, "sweep", counted)
    again = rank_alpha(GRID, n=32, prompts=2, known=known)
    assert {(its.rank, its.rslora) for its in asked} == {(1, True)} and len(asked) == 2 * len(GRID["rates"])
    assert [cell for cell in again["grid"] if cell["rule"] != "rslora"] == known["grid"]
    for one, two in zip(made["grid"], again["grid"], strict=True):
        assert one["path"] == [pytest.approx(point, abs=1e-3) for point in two["path"]], (one["rule"], one["rank"])
        assert (one["rule"], one["alpha"], one["lr"]) == (two["rule"], two["alpha"], two["lr"])
    with pytest.raises(ValueError, match="other settings"):
        rank_alpha(GRID, n=32, prompts=3, known=known)


def test_more_seeds_and_more_steps(made, monkeypatch, tmp_path):
    monkeypatch.setattr(rank, "load_record", {"rank_alpha": made}.__getitem__)
    found = rank_seeds(steps=4, ranks=(1, 8), seeds=(1, 2), n=32, prompts=2, scratch=str(tmp_path))
    assert found["settings"]["seeds"] == [1, 2] and found["settings"]["rules not kept"]
    for task in GRID["tasks"]:
        runs = found["short"][task]
        assert [(r["seed"], r["rank"], r["lr"]) for r in runs] == [(seed, rank, best_of(made["grid"], task, rank)["lr"])
                                                                  for seed in (1, 2) for rank in (1, 8)]
        assert all(r["valid"] > 0 and r["test"] > 0 and ("slots" in r) == (task == "bistro") for r in runs)
    for its in (1, 8):
        tuning = [r for r in found["long"]["tuning"] if r["rank"] == its]
        rates = [r["lr"] for r in tuning]
        best = min(tuning, key=lambda r: r["valid"])["lr"]
        assert rates == sorted(rates) and rates[0] < best < rates[-1] and {r["seed"] for r in tuning} == {0}
        assert [r["seed"] for r in found["long"]["runs"] if r["rank"] == its and r["lr"] == best] == [1, 2]
    assert found["long"]["steps"] == 4 and len(found["long"]["runs"]) == 4
    json.dumps(found, allow_nan=False)


def test_two_rates_train_the_alphas_that_are_asked_for(made, monkeypatch):
    monkeypatch.setattr(rank, "load_record", {"rank_alpha": made}.__getitem__)
    found = two_rates(alphas={1: (4,), 8: (32, 64)}, rates=(0.002, 0.004), n=32)
    want = [(task, rank, alpha, lr) for task in GRID["tasks"] for rank, alpha in ((1, 4), (8, 32), (8, 64))
            for lr in (0.002, 0.004)]
    assert [(r["task"], r["rank"], r["alpha"], r["lr"]) for r in found["runs"]] == want
    assert all(r["scaling"] == r["alpha"] / r["rank"] and r["test"] > 0 and r["rule"] == "free" for r in found["runs"])
    json.dumps(found, allow_nan=False)


def test_a_planted_rank():
    found = planted_rank(PLANTED, seeds=(1, 2), n=40)
    assert [(s["planted"], s["rank"]) for s in found["students"]] == list(itertools.product((1, 2), (1, 2, 3)))
    for student in found["students"]:
        assert student["tuning"].keys() == {0.02, 0.04}
        assert student["lr"] == min(student["tuning"], key=student["tuning"].get)
        assert len(student["divergence"]) == 2 and all(d > 0 for d in student["divergence"])
    assert found["untrained"].keys() == {1, 2} and found["settings"]["seeds"] == [1, 2]
    assert found["settings"]["planted"] == (1, 2)
    json.dumps(found, allow_nan=False)


def test_the_rate_beyond_the_edge():
    def runs(*losses):
        return [{"lr": 0.01 * 2**i, "valid": loss} for i, loss in enumerate(losses)]
    assert beyond_the_edge(runs(1.0, 2.0, 3.0)) == [0.005] and beyond_the_edge(runs(3.0, 2.0, 1.0)) == [0.08]
    assert beyond_the_edge(runs(3.0, 1.0, 2.0)) == [] and beyond_the_edge(runs(2.0, None, None)) == [0.005]
    assert beyond_the_edge(runs(None, 2.0, None)) == []


def test_the_best_cell_of_a_row():
    cells = [{"task": "bistro", "rule": rule, "rank": rank, "valid": valid} for rule, rank, valid in
             [("2r", 1, None), ("2r", 1, 2.0), ("2r", 1, 1.5), ("2r", 8, 0.5), ("fixed", 1, 0.1)]]
    assert best_of(cells, "bistro", 1) is cells[2] and best_of(cells, "bistro", 1, "fixed") is cells[4]
