"""The house keeps its plan: imports point one way, nothing runs in a circle, and the library knows nothing of the course."""
import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_edu"
# room -> the rooms it may import from; itself and the ground (tables, files) always. What is not named here is a room of its own.
ALLOWED = {
    "tables": set(), "files": set(), "lora": set(), "models": set(),
    "checkpoints": {"lora"},
    "training": {"models", "lora"},
    "rivals": {"training", "models", "lora"},
    "measure": {"rivals", "training", "models", "checkpoints", "lora"},
    "course": {"measure", "rivals", "training", "models", "checkpoints", "lora"},
    "cli": {"course", "measure", "rivals", "training", "models", "checkpoints", "lora"},
    "record": {"course"},
    "__init__": {"measure", "rivals", "training", "models", "checkpoints", "lora"},
}
GROUND = {"tables", "files"}
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
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module for alias in node.names}
    return {name for name in found if name in MODULES} - {module_of(file)}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_point_one_way(file):
    here = room(module_of(file))
    wrong = {name for name in imports(file) if room(name) not in ALLOWED[here] | {here} | GROUND and name != "lora_edu"}
    assert not wrong, f"{here} may not import from {', '.join(sorted(wrong))}"
    assert "lora_edu" not in imports(file), "import from the module that defines the name: through the package's face it is a circle"


def test_no_circle():
    try:
        order = list(TopologicalSorter({module_of(file): imports(file) for file in FILES}).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")
    assert len(order) == len(FILES)


def test_the_library_needs_no_widgets_and_no_matplotlib():
    """In a process where they, and the course, cannot be imported."""
    code = ("import sys\n"
            "for name in ('ipywidgets', 'matplotlib', 'IPython', 'transformers', 'peft', 'huggingface_hub', 'tqdm', 'lora_edu.course'):\n"
            "    sys.modules[name] = None\n"
            "import lora_edu\n"
            "assert all(hasattr(lora_edu, name) for name in lora_edu.__all__)\n"
            "model, tokenizer = lora_edu.load_pretrained()\n"
            "print(lora_edu.apply_lora(model).trainable)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "156160\n", done.stderr
