"""The explorer of a recorded grid: every control changes picture and text, the numbers are the record's, the best is
found by valid.
"""
import copy
import re

import numpy as np
import pytest

from lora_edu.course.labs import rank_alpha_map
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

    def open(self, **setting):
        if setting["rank"] == 1:
            raise ValueError("rank <1> is too small")
        self.opened.append(setting)


@pytest.fixture
def pictures(monkeypatch):
    """The pictures behind the explorers that a test builds."""
    made, init = [], rank_alpha_map._Picture.__init__
    monkeypatch.setattr(rank_alpha_map._Picture, "__init__", lambda self,
                        *args: (init(self, *args), made.append(self))[0])
    return made


def controls(box) -> dict:
    return {control.description: control for control in box.children[0].children}


def choose(box, **values):
    for name, value in values.items():
        controls(box)[{"rank": "rank r", "lr": "rate"}.get(name, name)].value = value


def said(box) -> str:
    return re.sub("<[^>]*>", "", box.children[2].value)


def state(box):
    return bytes(box.children[1].value), box.children[2].value


def test_the_controls_offer_the_record_and_are_no_dropdowns(record):
    box = grid_explorer(record)
    assert {name: type(control).__name__ for name, control in controls(box).items()} == {
        "task": "ToggleButtons", "rule": "ToggleButtons", "measure": "ToggleButtons",
        "rank r": "SelectionSlider", "rate": "SelectionSlider"}
    assert list(controls(box)["rank r"].options) == RANKS
    assert [value for _, value in controls(box)["rate"].options] == RATES
    assert [value for _, value in controls(box)["task"].options] == TASKS
    assert [value for _, value in controls(box)["rule"].options] == RULES
    assert len(box.children) == 3, "no trainer, no button"


@pytest.mark.parametrize("control, values",
                         [("task", ["python_docs"]), ("rule", ["fixed"]), ("measure", ["tales", "slots"]),
                                             ("rank", [1, 16]), ("lr", [0.002, 0.016, 0.004])])
def test_every_move_changes_the_picture_and_the_text(record, control, values):
    box = grid_explorer(record)
    seen = [state(box)]
    for value in values:
        choose(box, **{control: value})
        seen.append(state(box))
    assert all(len(set(part)) == len(values) + 1 for part in zip(*seen)) and all(p[:4] == b"\x89PNG" for p, _ in seen)
    choose(box, **{control: values[0]})
    assert state(box) == seen[1], "going back must give the same picture and text"


def test_the_text_holds_the_numbers_of_the_cell(record):
    box = grid_explorer(record)
    choose(box, rule="fixed", rank=4, lr=0.004)
    want = run("bistro", "fixed", 4, 0.004)       # by hand: 4 - 1.5 - 0.3 + 0.2 + 0.05 = 2.45
    assert want["valid"] == pytest.approx(2.45)
    first, second, path, row, best = said(box).splitlines()
    assert first == ("restaurants, alpha fixed: rank 4, alpha 16, scaling 4, learning rate 0.004; 78,080 trainable "
                     "numbers, an adapter of 312,320 bytes in float32")
    assert second == ("after 100 steps, nats per token: test 2.461 (before 4.10), validation 2.450, tales 4.30 (before "
                      "3.14); slots right: 20%")
    assert path == "path, train / held-out: step 50: 3.00 / 2.90; step 100: 2.40 / 2.45"
    assert row == ("this row, loss on the new task (nats per token) at each learning rate: 0.002: 2.66, 0.004: 2.46, "
                   "0.008: 2.26, 0.016: 2.46")
    assert best == ("best by validation: in this row rank 4 at learning rate 0.008, test 2.262; in the whole map rank "
                    "16 at learning rate 0.008, test 1.962")


def test_other_measures_show_their_own_row(record):
    box = grid_explorer(record)
    choose(box, rank=1, measure="slots")
    assert "this row, slots right (%) at each learning rate: 0.002: 0, 0.004: 10, 0.008: 20, 0.016: 30" in said(box)
    choose(box, measure="tales", rank=16)
    assert ("loss on the tales (nats per token) at each learning rate: 0.002: 3.40, 0.004: 4.40, 0.008: 5.40, 0.016: "
            "diverged") in said(box)


def test_a_task_without_slots_shows_its_loss_and_says_so(record):
    box = grid_explorer(record)
    choose(box, task="python_docs", measure="slots")
    assert said(box).startswith("documentation has no slots: the map shows the loss on the task\n")
    assert "; slots right" not in said(box)
    assert "this row, loss on the new task" in said(box)


def test_a_diverged_cell_is_crossed_and_has_no_number_or_colour(record, pictures):
    box = grid_explorer(record)
    choose(box, rank=16, lr=0.016)
    assert "diverged at step 7 of 100: there is no loss to show\npath, train / held-out: step 50: - / -\n" in said(box)
    picture = pictures[0]
    x, y = picture.crosses.get_data()
    # column 3, row 2 and nothing else
    assert (np.nanmin(x), np.nanmax(x), np.nanmin(y), np.nanmax(y)) == (2.5, 3.5, 1.5, 2.5)
    assert picture.numbers[2, 3].get_text() == "" and picture.image.get_array()[2, 3].tolist() == [1, 1, 1]
    assert picture.note.get_text() == "diverged at step 7"
    choose(box, lr=0.008)
    assert picture.note.get_text() == ""


def frames(lines) -> set:
    """(row, column) of every square that is drawn, from its lower left corner."""
    (black, white) = (np.array(line.get_data()).T for line in lines)
    assert np.array_equal(black, white, equal_nan=True)
    return {(int(y), int(x)) for x, y in np.round([np.nanmean(part[:4], axis=0) for part in black.reshape(-1, 7, 2)])}


def test_the_map_shows_each_number_and_frames_the_best_of_each_row(record, pictures):
    box = grid_explorer(record)
    choose(box, rank=4, lr=0.002)
    picture = pictures[0]
    for (y, x), text in picture.numbers.items():
        want = run("bistro", "2r", RANKS[y], RATES[x])["test"]
        assert text.get_text() == ("" if want is None else f"{want:.2f}") and text.get_position() == (x, y)
    assert frames(picture.best) == {(0, 3), (1, 2), (2, 2)} and frames(picture.here) == {(1, 0)}
    choose(box, measure="tales")
    assert frames(picture.best) == {(0, 3), (1, 2), (2, 2)}, "the best is chosen by validation, whatever is shown"


def test_the_best_goes_by_validation_and_not_by_test(record):
    better = next(r for r in record["grid"] if (r["task"], r["rule"], r["rank"], r["lr"]) == ("bistro", "2r", 4, 0.002))
    better["valid"] = 0.1
    assert said(grid_explorer(record)).endswith("in this row rank 4 at learning rate 0.002, test 2.610; in the whole "
                                                "map rank 4 at learning rate 0.002, test 2.610")


@pytest.mark.parametrize("measure, better, worse",
                         [("test", (2, 2), (0, 0)), ("tales", (0, 0), (2, 2)), ("slots", (1, 3), (0, 0))])
def test_brighter_is_better_and_numbers_can_be_read(record, pictures, measure, better, worse):
    box = grid_explorer(record)
    choose(box, measure=measure)
    colors = pictures[0].image.get_array()
    assert colors[better].sum() > colors[worse].sum() + 0.2
    assert {text.get_color() for text in pictures[0].numbers.values()} == {"black", "white"}
    for place, text in pictures[0].numbers.items():
        grey = colors[place] @ (0.2126, 0.7152, 0.0722)
        assert text.get_color() == "white" or grey > 0.35, "white on dark, black on light"


def test_one_scale_for_all_rules(record, pictures):
    """The same loss under the other rule has the same colour."""
    for r in record["grid"]:
        if (r["rule"], r["rank"], r["lr"]) == ("fixed", 4, 0.004):
            r["test"] = run(r["task"], "2r", 4, 0.004)["test"]
    box = grid_explorer(record)
    first = pictures[0].image.get_array()[1, 1].tolist()
    choose(box, rule="fixed")
    assert pictures[0].image.get_array()[1, 1].tolist() == first


def test_the_path_is_that_of_the_record_within_axes_of_the_task(record, pictures):
    box = grid_explorer(record)
    choose(box, task="python_docs", rank=1, lr=0.016)
    picture, want = pictures[0], run("python_docs", "2r", 1, 0.016)["path"]
    assert picture.train.get_xydata().tolist() == [[s, t] for s, t, _ in want]
    assert picture.valid.get_xydata().tolist() == [[s, v] for s, _, v in want]
    assert list(picture.before.get_ydata()) == [3.0, 3.0]
    limits = picture.side.get_ylim()
    choose(box, rank=4, rule="fixed")
    assert picture.side.get_ylim() == limits and limits[0] < 0.9 < 3.0 < limits[1]


def test_a_row_and_a_map_that_diverged_whole(record):
    for r in record["grid"]:
        if r["rule"] == "fixed" or r["rank"] == 1:
            r |= {"valid": None, "test": None, "tales": None, "diverged": 3, "path": []}
    box = grid_explorer(record)
    choose(box, rank=1)
    assert "path, train / held-out: none\n" in said(box)
    assert "in this row none, every training diverged; in the whole map rank 16" in said(box)
    choose(box, rule="fixed", rank=4)
    assert said(box).endswith("in this row none, every training diverged; in the whole map none, every training "
                              "diverged")


def test_the_button_opens_the_chosen_setting(record):
    trainer = Trainer()
    box = grid_explorer(record, trainer)
    button, status = box.children[3].children
    assert button.description == "open this setting in the trainer"
    choose(box, task="python_docs", rule="fixed", rank=16, lr=0.004)
    button.click()
    assert trainer.opened == [{"task": "python_docs", "rule": "fixed", "rank": 16, "alpha": 16, "lr": 0.004}]
    assert "in the trainer: task python_docs, rule fixed, rank 16, alpha 16, lr 0.004" in status.value
    choose(box, rule="2r", rank=1)
    button.click()
    assert "cannot open this setting: ValueError: rank &lt;1&gt; is too small" in status.value
    assert len(trainer.opened) == 1


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


def test_it_is_drawn_at_a_size_that_redraws_fast(record, pictures):
    grid_explorer(record)
    assert pictures[0].fig.get_size_inches().prod() * pictures[0].fig.dpi**2 < 260_000
