"""Grading what was handed in: answers of every kind, and notebooks that were tampered with: rows, never a crash."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import grade

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BILL = next((ROOT / "notebooks").glob("05_*.ipynb"))
GOOD = {"def adam_bytes": "def adam_bytes(parameters, weight, state):\n"
                          "    return parameters * (2 * weight + 2 * state)\n",
        "def lora_count": "BOTH = 2\n\n\ndef rows(hidden, kv):\n    return (hidden + hidden) + (hidden + kv)\n\n\n"
                          "def lora_count(layers, hidden, kv, rank):\n    return layers * rank * rows(hidden, kv)\n",
        "wrong_row = None": 'wrong_row = "70B with LoRA"\n', "my_choice = None": 'my_choice = ("nf4", 6, True)\n'}
NUMBERS = ["5.1", "5.2", "5.3", "5.4"]


def handed_in(folder: Path, answers: dict[str, str], name: str = BILL.name, change=None) -> Path:
    """A copy of notebook 05 in which the first line of these cells, and a function's stub, is what was answered."""
    notebook = json.loads(BILL.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for start, answer in answers.items():
            if source.startswith(start):
                cell["source"] = answer + "\n" + source[source.index("from lora_edu.course.checks"):]
    if change:
        change(notebook)
    (folder / name).write_text(json.dumps(notebook), encoding="utf-8")
    return folder / name


def verdicts(rows):
    return {exercise: verdict for _, exercise, verdict, _ in rows}


def test_what_is_right_passes_and_functions_bring_what_they_use(tmp_path):
    rows = grade.grade(handed_in(tmp_path, GOOD))
    assert verdicts(rows) == dict.fromkeys(NUMBERS, "passed"), rows
    assert all(line.startswith("Exercise 5.") and "✓" in line for *_, line in rows)


def test_the_untouched_notebook_was_not_attempted(tmp_path):
    assert verdicts(grade.grade(handed_in(tmp_path, {}))) == dict.fromkeys(NUMBERS, "not attempted")


def test_wrong_answers_a_raise_and_a_loop_without_an_end(tmp_path):
    raises = "def adam_bytes(parameters, weight, state):\n    raise SystemExit\n"
    endless = "def lora_count(layers, hidden, kv, rank):\n    while True:\n        pass\n"
    rows = grade.grade(handed_in(tmp_path, {"def adam_bytes": raises, "def lora_count": endless,
                                            "wrong_row = None": 'wrong_row = "8B in full"\n'}))
    lines = {exercise: line for _, exercise, _, line in rows}
    assert verdicts(rows) == {"check_adam_bytes": "wrong", "5.2": "wrong", "5.3": "wrong", "5.4": "not attempted"}
    assert "SystemExit" in lines["check_adam_bytes"] and "loop without an end" in lines["5.3"]


def test_a_process_that_never_comes_back_is_no_answer(tmp_path):
    rows = grade.grade(handed_in(tmp_path, GOOD), limit=0.1)
    assert {verdict for _, _, verdict, _ in rows} == {"no answer"} and len(rows) == 4


def remove_an_exercise(notebook):
    notebook["cells"] = [cell for cell in notebook["cells"] if "def adam_bytes" not in "".join(cell["source"])]


def its_own_checker(notebook):
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "import check_adam_bytes" in source:
            cell["source"] = source.replace("from lora_edu.course.checks.nb05 import check_adam_bytes",
                                            "check_adam_bytes = print")


@pytest.mark.parametrize("change", [remove_an_exercise, its_own_checker])
def test_an_exercise_that_was_removed_or_judges_itself_is_missing(tmp_path, change):
    found = verdicts(grade.grade(handed_in(tmp_path, GOOD, change=change)))
    assert found.pop("check_adam_bytes") == "missing" and set(found.values()) == {"passed"}


def test_nothing_else_of_the_notebook_runs(tmp_path):
    mark = tmp_path / "was here"
    source = f"open({str(mark)!r}, 'w').close()\n%pip install nonsense\nif True:\n    !ls\n"
    cell = {"cell_type": "code", "source": [source]}
    rows = grade.grade(handed_in(tmp_path, GOOD, change=lambda notebook: notebook["cells"].insert(0, cell)))
    assert not mark.exists() and set(verdicts(rows).values()) == {"passed"}


@pytest.mark.parametrize("content", ["not json", "{}", '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}', "[1, 2]",
                                     json.dumps({"cells": [{"cell_type": "code", "source": ["def f(:\n"]}]})])
def test_what_is_no_notebook_is_a_row(tmp_path, content):
    (tmp_path / "05_broken.ipynb").write_text(content)
    (row,) = grade.grade(tmp_path / "05_broken.ipynb")
    assert row[2] == "no answer" and "cannot be read" in row[3]


def test_the_command_writes_a_table_of_all_folders(tmp_path):
    for who, answers in (("ada", GOOD), ("bob", {})):
        (tmp_path / who).mkdir()
        handed_in(tmp_path / who, answers)
    (tmp_path / "bob" / "notes.ipynb").write_text("{")
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "grade.py"), str(tmp_path), "--out",
                           str(tmp_path / "table.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert len(rows) == 9 and [row["verdict"] for row in rows[:4]] == ["passed"] * 4
    assert {Path(row["folder"]).name for row in rows} == {"ada", "bob"}
    assert subprocess.run([sys.executable, str(ROOT / "tools" / "grade.py"), str(tmp_path / "ada" / "x")],
                          capture_output=True).returncode == 2


def test_every_exercise_of_the_course_is_found():
    files = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = {file.name[:2]: len(grade.tasks(grade.code_of(file))) for file in files}
    assert found == {"00": 4, "01": 5, "02": 4, "03": 5, "04": 5, "05": 4, "06": 4, "07": 4, "08": 5,
                     "09": 4}
