"""The house keeps its plan: imports point one way, nothing runs in a circle, and the library knows nothing of the
course.
"""
import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_edu"
# room -> the rooms it may import from; itself and the ground (tables, files, numbers) always. What is not named here is
# a room of its own.
ALLOWED = {
    "tables": set(), "files": set(), "numbers": set(), "lora": set(), "models": set(),
    "checkpoints": {"lora"},
    "training": {"models", "lora"},
    "rivals": {"training", "models", "lora"},
    "measure": {"rivals", "training", "models", "checkpoints", "lora"},
    "course": {"measure", "rivals", "training", "models", "checkpoints", "lora"},
    "cli": {"course", "measure", "rivals", "training", "models", "checkpoints", "lora"},
    "record": {"course"},
    "__init__": {"measure", "rivals", "training", "models", "checkpoints", "lora"},
}
GROUND = {"tables", "files", "numbers"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(("lora_edu", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file) for file in FILES}


def imports(file: Path) -> set[str]:
    """The modules of this package that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                      for alias in node.names}
    return {name for name in found if name in MODULES} - {module_of(file)}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_point_one_way(file):
    here = room(module_of(file))
    wrong = {name for name in imports(file) if room(name) not in ALLOWED[here] | {here} | GROUND and name != "lora_edu"}
    assert not wrong, f"{here} may not import from {', '.join(sorted(wrong))}"
    assert "lora_edu" not in imports(file), (
        "import from the module that defines the name: through the package's face it is a circle"
    )


def test_no_circle():
    try:
        order = list(TopologicalSorter({module_of(file): imports(file) for file in FILES}).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")
    assert len(order) == len(FILES)


def lines_of(file: Path) -> int:
    """Without the examples in docstrings: they are tests."""
    example = r"^ +>>> .*?(?=\n *\n|\n *\"\"\")"
    text = re.sub(example, "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return text.count("\n")


def test_the_library_stays_small():
    """Labs, figures, records and checkers not counted: a guide against growth. Lines are under 120 columns (ruff).

    The plan is about 5,500; what is above it are sentences that refuse by name, four bits, and files: other programs'
    layouts, sums, a training that goes on, several processes that must not go apart; whole modules by PEFT's rules, and
    what is odd in a file.
    """
    lines = {str(file.relative_to(PACKAGE)): lines_of(file) for file in FILES if room(module_of(file)) != "course"}
    assert sum(lines.values()) <= 8_540, sorted(lines.items(), key=lambda pair: -pair[1])[:10]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_function_fits_a_screen(file):
    """40 lines without its docstring."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            said = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)
            assert lines <= 40, f"{node.name} has {lines} lines: split it by idea"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_says_what_it_is_for(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), "a module begins with what it is for"


def test_the_library_needs_no_widgets_and_no_matplotlib():
    """In a process where they, and the course, cannot be imported."""
    code = ("import sys\nfor name in ('ipywidgets', 'matplotlib', 'IPython', 'transformers', 'peft', "
            "'huggingface_hub', 'tqdm', 'lora_edu.course'):\n    sys.modules[name] = None\nimport lora_edu\nassert "
            "all(hasattr(lora_edu, name) for name in lora_edu.__all__)\nmodel, tokenizer = lora_edu.load_pretrained()\n"
            "print(lora_edu.apply_lora(model).trainable)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "156160\n", done.stderr
