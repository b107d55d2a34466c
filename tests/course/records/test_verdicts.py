"""The records behind the verdicts that looked further: the code on a tiny Llama, and the grammar's own loss."""
import math
import random
from collections import Counter

import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course.records import verdicts
from lora_edu.course.records.runs import tales_to_forget
from lora_edu.course.records.stored import load_record
from lora_edu.course.tasks import Task, full_fine_tune
from lora_edu.training import bistro
from lora_edu.training.loop import evaluate
from tests.course.records.conftest import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def few(monkeypatch):
    tokenizer = load_pretrained()[1]
    monkeypatch.setattr(verdicts, "load_pretrained", lambda: (tiny(), tokenizer))
    monkeypatch.setattr(verdicts, "sixteen_bits", lambda device: None)
    monkeypatch.setattr(verdicts, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(verdicts, "tune", lambda rates, one_run: [one_run(lr) for lr in rates])
    monkeypatch.setattr("lora_edu.course.records.runs.tune", lambda rates, one_run: [one_run(lr) for lr in rates])
    monkeypatch.setattr(verdicts, "EQUAL_RANKS", {"all-linear": 2, "Q, K, V, O": 3})


def test_the_plateau_and_the_smaller_updates(tmp_path):
    found = verdicts.plateau(steps=4, seeds=(1,), n=32, scratch=str(tmp_path), rates={"lora": (1e-2,), "full": (1e-3,)})
    for method in ("lora", "full"):
        (run,) = found["tasks"]["bistro"][method]["runs"]
        assert run["path"][-1][0] == 4 and "slots" in run
    rows = found["smaller"]
    whole = [row for row in rows if row["value"] in (1.0, verdicts.CUTS[-1])]
    assert len(rows) == len(verdicts.SCALES) + len(verdicts.CUTS)
    assert whole[0]["test"] == pytest.approx(whole[1]["test"], abs=1e-3), "all of it, either way"
    assert len(list(tmp_path.iterdir())) == 3
    assert verdicts.plateau(steps=4, seeds=(1,), n=32, scratch=str(tmp_path), rates={"lora": (), "full": ()}) == found


def test_an_update_made_smaller():
    """Oracles: the fine-tune itself, and W₀ plus a share of the difference, entry by entry."""
    task, tales = Task("bistro", load_pretrained()[1], 32), tales_to_forget(None)
    rows = {(row["how"], row["value"]): row for row in verdicts.made_smaller(task, tales, 1, 0.05, steps=3)}
    base, tuned = tiny(), full_fine_tune("bistro", 3, 0.05, seed=1)
    whole = evaluate(tuned, task.test)
    assert rows["cut", 256]["test"] == rows["scaled", 1.0]["test"] == pytest.approx(whole, abs=1e-3)
    with torch.no_grad():
        for place, before in zip(tuned.parameters(), base.parameters()):
            place.copy_(before + 0.5 * (place - before))
    half = evaluate(tuned, task.test)
    assert rows["scaled", 0.5]["test"] == pytest.approx(half, abs=1e-3) != pytest.approx(rows["scaled", 1.0]["test"])


def test_placements_on_both_tasks():
    found = verdicts.placements_docs(steps=2, short=2, seeds=(1,), n=32, rates=(1e-2,))
    assert list(found["tasks"]["python_docs"]) == ["all-linear", "Q, K, V, O", "Q, K, V, O, rank 2"]
    assert list(found["tasks"]["bistro"]) == ["Q, K, V, O, rank 2"]
    counts = [its["runs"][0]["trainable"] for its in found["tasks"]["python_docs"].values()]
    assert counts[1] == 1.5 * counts[2] and "slots" in found["tasks"]["bistro"]["Q, K, V, O, rank 2"]["runs"][0]


def test_sgd_trains_the_matrices_and_is_measured():
    found = verdicts.optimizers(steps=2, seeds=(1,), n=32, rates=(0.1,))
    run = found["runs"][0]
    assert run["energy"][0] == 0 and run["energy"][-1] == pytest.approx(1) and run["rank 90"] >= 1
    assert run["test"] != pytest.approx(Task("bistro", load_pretrained()[1], 32).floor())


def test_the_floor_is_the_entropy_of_the_grammar():
    """Oracle: of two cards, every sentence that is said, counted over many draws; their surprise per token."""
    tokenizer = load_pretrained()[1]
    task, draw, surprise = Task("bistro", tokenizer, 2), random.Random(1), 0.0
    for card, _ in bistro.examples("test", 2):
        said = Counter(bistro.sentence(card, draw) for _ in range(40_000))
        surprise -= sum(n / said.total() * math.log(n / said.total()) for n in said.values())
    tokens = sum((targets != -100).sum().item() for _, targets in task.test)
    assert task.floor() * tokens == pytest.approx(surprise, abs=0.05)
    assert Task("bistro", tokenizer, 400).floor() == pytest.approx(0.1350, abs=1e-4)


def test_the_stored_rate_of_sgd_lies_inside_its_grid():
    record = load_record("optimizers")
    rates = sorted(run["lr"] for run in record["tuning"])
    best = min(record["tuning"], key=lambda run: run["valid"])["lr"]
    assert rates[0] < best < rates[-1] and all(run["lr"] == best for run in record["runs"])
    assert [run["seed"] for run in record["runs"]] == record["settings"]["seeds"] == [1, 2, 3]
