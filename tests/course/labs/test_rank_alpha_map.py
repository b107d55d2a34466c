"""The explorer of a recorded grid: what goes to the page is the record, the best is found by validation.
"""
import copy

import pytest

from lora_edu.course.labs.rank_alpha_map import check_grid, grid_explorer

RANKS, RATES, RULES, TASKS = [1, 4, 16], [0.002, 0.004, 0.008, 0.016], ["2r", "fixed"], ["bistro", "python_docs"]
BEFORE = {"bistro": 4.0, "python_docs": 3.0}


def run(task, rule, rank, lr) -> dict:
    """Losses that are least at 0.008 on bistro (rank 1: at 0.016); rank 16 diverges at the largest rate."""
    i, j = RANKS.index(rank), RATES.index(lr)
    alpha = 2 * rank if rule == "2r" else 16
    loss = BEFORE[task] - 1.5 - 0.3 * i + 0.2 * abs(j - (3 if rank == 1 else 2)) + (0.05 if rule == "fixed" else 0)
    made = {"task": task, "rule": rule, "rank": rank, "alpha": alpha, "scaling": alpha / rank, "lr": lr, "seed": 0,
            "valid": loss,
            "test": loss + 0.01 + 0.001 * j, "tales": 3.2 + j + 0.1 * i, "diverged": None, "trainable": 19520 * rank,
            "path": [[50, loss + 0.55, loss + 0.45], [100, loss - 0.05, loss]]}
    if task == "bistro":
        made["slots"] = 0.1 * (i + j)
    if (rank, lr) == (16, 0.016):
        made |= dict.fromkeys({"valid", "test", "tales", "slots"} & made.keys()) | {"diverged": 7,
                                                                                    "path": [[50, None, None]]}
    return made


@pytest.fixture
def record():
    return {"settings": {"ranks": RANKS, "rates": RATES, "rules": RULES, "fixed alpha": 16,
                         "tasks": {t: {"steps": 100} for t in TASKS}},
            "before": {"task": {t: {"valid": BEFORE[t], "test": BEFORE[t] + 0.1} for t in TASKS},
                       "tales": {"its own": 3.14}},
            "grid": [run(t, rule, rank, lr) for t in TASKS for rule in RULES for rank in RANKS for lr in RATES]}


class Trainer:
    def __init__(self):
        self.opened = []

    def put_to(self, **setting):
        if setting["rank"] == 1:
            raise ValueError("rank 1 is too small")
        self.opened.append(setting)


def test_what_goes_to_the_page_is_the_record(record):
    lab = grid_explorer(record)
    assert lab.data["grid"] == record["grid"] and lab.data["before"] == record["before"] and not lab.data["trains"]
    assert lab.data["tasks"]["python_docs"] == {"words": "documentation", "steps": 100}
    assert lab.data["rules"] == {"2r": "alpha = 2r", "fixed": "alpha fixed"}
    assert lab.state == {"task": "bistro", "measure": "test", "rule": "2r", "rank": 4, "lr": 0.008}


def test_the_stored_cell_says_the_best_of_each_row_by_validation(record):
    better = next(r for r in record["grid"] if (r["task"], r["rule"], r["rank"], r["lr"]) == ("bistro", "2r", 4, 0.002))
    better["valid"] = 0.1                        # its test loss stays the worst of its row
    for r in record["grid"]:
        if (r["rule"], r["rank"]) == ("fixed", 1):
            r |= {"valid": None, "test": None, "tales": None, "diverged": 3, "path": []}
    shown = grid_explorer(record)._repr_mimebundle_()[0]
    said = shown["text/plain"].splitlines()
    assert said[-1] == "Run this cell to move it." and said[3].startswith("documentation, the best learning rate")
    assert len(said) == 7 and said[:3] == [
        "restaurants, the best learning rate of each rank, chosen on validation (test loss in nats per token)",
        "alpha = 2r: rank 1: 0.016 (2.513), rank 4: 0.002 (2.610), rank 16: 0.008 (1.912)",
        "alpha fixed: rank 1: none, rank 4: 0.008 (2.262), rank 16: 0.008 (1.962)"]
    assert "<img alt=" in shown["text/html"]


def test_the_button_hands_the_setting_over_and_says_what_came_of_it(record, monkeypatch):
    trainer, sent = Trainer(), []
    lab = grid_explorer(record, trainer)
    monkeypatch.setattr(lab, "send", lambda message: sent.append(message["said"]))
    for rank in (16, 1):
        lab._handle_custom_msg({"open": {"task": "bistro", "rule": "2r", "rank": rank, "alpha": 32, "lr": 0.004}}, [])
    assert trainer.opened == [{"task": "bistro", "rule": "2r", "rank": 16, "alpha": 32, "lr": 0.004}]
    assert sent == ["in the trainer: task restaurants, rule 2r, rank 16, alpha 32, lr 0.004",
                    "the trainer cannot open this setting: ValueError: rank 1 is too small"]


def test_a_record_that_is_not_whole_is_refused(record):
    broken = copy.deepcopy(record)
    gone = [r for r in broken["grid"]
            if (r["task"], r["rule"], r["rank"], r["lr"]) == ("python_docs", "fixed", 4, 0.008)][0]
    broken["grid"].remove(gone)
    with pytest.raises(ValueError, match="1 of the grid's 48 cells are missing, the first of them rank 4 at learning "
                                         "rate 0.008, rule 'fixed', on python_docs"):
        grid_explorer(broken)
    broken["grid"] += [gone, gone]
    with pytest.raises(ValueError, match="has 49 cells where its settings name 48"):
        check_grid(broken)
    with pytest.raises(ValueError, match="no 'before'"):
        check_grid({"settings": {}, "grid": []})
