"""Run the course's checkers over notebooks that were handed in: `python dev.py grade FOLDER...`

Of a notebook nothing is executed but the functions that the checkers judge, with the imports and names they use, in a
process of its own that has a time limit; answers in words are read, not run. (No sandbox: what a function does, it
does.) The result is a CSV, one row an exercise: notebook, exercise, verdict (passed, wrong, not attempted, missing, no
answer), and the checker's line. A notebook that does not parse, or in which an exercise was removed, is a row, too.
"""
import argparse
import ast
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

COURSE = Path(__file__).resolve().parents[1] / "notebooks"
CHECKS = "lora_edu.course.checks."
VERDICTS = {True: "passed", False: "wrong", None: "not attempted"}
LIMIT = 180       # seconds for all exercises of one notebook; a function has ten of them


@dataclass
class Task:
    """A checker's call: where it is from, and the sources that make its arguments."""

    module: str
    checker: str
    sources: list[str]
    argument: str


def code_of(path: Path) -> str:
    """All code of a notebook, without magics; raises ValueError for what is no notebook or no Python."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"this is no notebook: {type(error).__name__}: {error}") from None
    lines = "\n".join(part for part in parts if not part.lstrip().startswith("%%")).splitlines()
    return "\n".join(line[:len(line) - len(line.lstrip())] + "pass" if line.lstrip().startswith(("%", "!")) else line
                     for line in lines)


def tasks(code: str) -> dict[str, Task]:
    """The checkers that a notebook calls, with what each judges; the last call of each counts.

    Raises SyntaxError where the code does not parse.
    """
    tree = ast.parse(code)
    imported = {name.asname or name.name: (node.module, name.name) for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(CHECKS) for name in node.names}
    defined, found = {}, {}
    for statement in tree.body:                        # what is defined later, an answer cannot have meant
        if isinstance(statement, ast.FunctionDef):
            defined[statement.name] = statement
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            defined[statement.targets[0].id] = statement
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            defined |= {(name.asname or name.name).split(".")[0]: statement for name in statement.names}
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and (
                    node.func.id in imported and node.func.id.startswith("check_")):
                module, checker = imported[node.func.id]
                found[checker] = Task(module, checker, _needed(node.args[0], defined), ast.unparse(node.args[0]))
    return found


def _needed(node: ast.AST, defined: dict[str, ast.stmt]) -> list[str]:
    """The sources of what the argument uses: functions with what they use in turn, imports, names with a literal."""
    order, open_names, seen = [], [name.id for name in ast.walk(node) if isinstance(name, ast.Name)], set()
    while open_names:
        name = open_names.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        source = defined[name]
        if isinstance(source, ast.Assign) and not _is_literal(source.value):
            continue                                   # an experiment of the notebook, and no answer
        order.insert(0, ast.unparse(source))
        open_names += [each.id for each in ast.walk(source) if isinstance(each, ast.Name)]
    return sorted(order, key=lambda text: not text.startswith(("import ", "from ")))


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return False
    return True


RUNNER = """
import contextlib, importlib, io, json, sys
answered = sys.stdout
for task in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            names = {}
            exec("import math\\nimport numpy as np\\nimport torch\\nfrom torch.nn import functional as F\\n"
                 + "\\n".join(task["sources"]), names)
            checker = getattr(importlib.import_module(task["module"]), task["checker"])
            verdict = checker(eval(task["argument"], names))
        found = [task["checker"], verdict.passed, verdict.line]
    except BaseException as error:
        found = [task["checker"], False, f"the answer cannot be read: {type(error).__name__}: {error}"]
    print(json.dumps(found), file=answered, flush=True)
"""


def run(wanted: dict[str, Task], limit: float) -> dict[str, tuple[str, str]]:
    """{checker: (verdict, line)}, as far as the time limit lets them come."""
    process = subprocess.Popen([sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    try:
        out, _ = process.communicate(json.dumps([vars(task) for task in wanted.values()]), timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    rows = {name: (VERDICTS[passed], line) for name, passed, line in map(json.loads, filter(None, out.splitlines()))}
    return {name: rows.get(name, ("no answer", f"nothing came back within {limit:g} seconds")) for name in wanted}


def grade(path: Path, course: Path = COURSE, limit: float = LIMIT) -> list[tuple[str, str, str, str]]:
    """The rows of one notebook: (notebook, exercise, verdict, line)."""
    name = path.name
    try:
        handed = tasks(code_of(path))
    except (ValueError, SyntaxError, RecursionError) as error:
        return [(name, "", "no answer", f"this notebook cannot be read: {' '.join(str(error).split())[:150]}")]
    original = next((file for file in sorted(course.glob("*.ipynb")) if file.name[:2] == name[:2]), None)
    expected = tasks(code_of(original)) if original else handed
    if not expected:
        return [(name, "", "no answer", "no exercise of the course is in it")]
    found = run({checker: task for checker, task in handed.items() if checker in expected}, limit)
    missing = ("missing", "the exercise, or its checker's call, is not in this notebook")
    return [(name, _number(checker, found), *found.get(checker, missing)) for checker in expected]


def _number(checker: str, found: dict) -> str:
    words = found.get(checker, ("", ""))[1].split()
    return words[1].strip(":") if words[:1] == ["Exercise"] else checker


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py grade", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="+", type=Path, help="folders with notebooks, or notebooks")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"), help="the CSV to write (default: grades.csv)")
    options = parser.parse_args()
    files = sorted({file for each in options.folder for file in ([each] if each.is_file() else each.rglob("*.ipynb"))
                    if ".ipynb_checkpoints" not in file.parts})
    if not files:
        parser.error("there is no notebook in " + ", ".join(map(str, options.folder)))
    rows = []
    for file in files:
        found = grade(file)
        rows += [(str(file.parent), *row) for row in found]
        mine = [verdict for _, _, verdict, _ in found]
        counts = ", ".join(f"{mine.count(verdict)} {verdict}" for verdict in dict.fromkeys(mine))
        print(f"{file}: {counts}", flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("folder", "notebook", "exercise", "verdict", "line"), *rows])
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    main()
