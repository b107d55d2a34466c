"""Every exercise has a hidden solution, and the solution passes its checker."""
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
CALL = re.compile(r"^(check_\w+)\((.+)\)$", re.M)


def exercises(path):
    """(number, checker, argument, solution): the exercise's last code cell before its <details>, and what the
    details say.
    """
    found, call = [], None
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            call = CALL.search(source) or call
        elif "<details><summary>Solution</summary>" in source:
            assert call, f"a solution without a checker: {source[:80]}"
            code = re.search(r"```python\n(.*?)```", source, re.S) or re.search(r"`([^`]+)`", source)
            found.append((call[1], call[2], code[1]))
            call = None
    return found


CASES = [pytest.param(path, *case, id=f"{path.stem[:2]}-{case[0]}") for path in NOTEBOOKS for case in exercises(path)]


@pytest.mark.parametrize("path, checker, argument, solution", CASES)
def test_the_hidden_solution_passes(path, checker, argument, solution):
    checks = __import__(f"lora_edu.course.checks.nb{path.stem[:2]}", fromlist=["*"])
    scope = {}
    exec("import torch\nfrom torch import nn\nfrom lora_edu import *\n", scope)
    if argument.startswith("{"):                                    # check_mystery({"P": None, ...})
        answer = eval(solution, scope)
    else:
        exec(solution, scope)
        answer = scope[argument]
    assert getattr(checks, checker)(answer).passed is True


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_exercises_are_complete(path):
    """Two to four that write code, one diagnosis, one decision; each with a solution; the stored answer is "not
    attempted".
    """
    nb = json.loads(path.read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    headed = re.findall(r"^\*\*Exercise (\d+\.\d+)\*\* · (diagnose|decide)?", text, re.M)
    kinds = [kind for _, kind in headed]
    assert kinds.count("diagnose") == 1 and kinds.count("decide") == 1 and 2 <= kinds.count("") <= 4, headed
    assert [n for n, _ in headed] == [f"{int(path.stem[:2])}.{i + 1}" for i in range(len(headed))]
    assert len(exercises(path)) == len(headed)
    printed = "".join(t for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"]
                      for t in o.get("text", []))
    assert printed.count("not attempted yet") == len(headed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_hint_stands_before_each_solution_and_ten_questions_at_the_end(path):
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
             if c["cell_type"] == "markdown"]
    solutions = [i for i, text in enumerate(cells) if text.startswith("<details><summary>Solution</summary>")]
    hints = [i for i, text in enumerate(cells) if text.startswith("<details><summary>A hint</summary>")]
    assert hints == [i - 1 for i in solutions] and len(hints) == len(exercises(path))
    (quiz,) = [text for text in cells if "<summary>Could you say? Ten questions" in text]
    assert [int(n) for n in re.findall(r"^(\d+)\. \*\*.+?\*\* \S", quiz, re.M)] == list(range(1, 11))
