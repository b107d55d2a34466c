"""The README says nothing that is not there: links, picture, commands, the table of notebooks, and the code that it
shows.
"""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_edu.course.lessons import ORDERS
from tools import links

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLAB = f"{links.COLAB}{links.repository(ROOT)}/blob/main/notebooks/"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


# of the blocks that are not indented; that one is Colab's: test_bundle.py
CODE = re.findall(r"^```python\n(.*?)```", README, re.S | re.M)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "TEACHING.md", "lora_edu/models/fable/README.md"])
def test_links_lead_somewhere(page):
    file = ROOT / page
    targets = re.findall(r"\]\(([^)#\s]+)\)", file.read_text(encoding="utf-8"))
    missing = [target for target in targets if not target.startswith("http") and not (file.parent / target).exists()]
    assert not missing


def test_every_notebook_has_a_row_with_its_badge():
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    assert len(rows) == len(NOTEBOOKS)
    for path, row in zip(NOTEBOOKS, rows):
        assert f"notebooks/{path.name}" in row and f"[Open in Colab]({COLAB}{path.name})" in row


def test_the_picture_is_the_first_one_of_notebook_00():
    cells = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))["cells"]
    pages = ("".join(out.get("data", {}).get("text/html", "")) for cell in cells for out in cell.get("outputs", []))
    first = next(page.partition("base64,")[2].partition('"')[0] for page in pages if "base64," in page)
    assert (ROOT / "docs"
            / "dial.png").read_bytes() == base64.b64decode(first), "store it again: python dev.py notebooks 00"


def test_a_training_that_is_cut_off_goes_on(tmp_path):
    """The block as it stands: once to the end; and once more, with step 40 of the first run to begin from."""
    code = next(block for block in CODE if "load_training" in block)

    def run(code):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout.splitlines()
    whole = run(code)
    assert [line.split()[0] for line in whole] == ["20", "40", "60"]
    shutil.rmtree(tmp_path / "run")
    cut_off = code.replace("        print(", "        if step.step == 40: raise SystemExit\n        print(")
    assert run(cut_off) == whole[:1]
    assert run(code) == whole[2:]


def test_the_code_runs():
    code = CODE[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.split("\n")
    losses = [float(line.split()[1]) for line in lines if re.fullmatch(r"\d+ \d+\.\d+", line)]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0] and "156,160 of 3,844,864" in done.stdout


def test_the_code_for_a_file_of_your_own_runs(tmp_path):
    """On fable, and with the course's orders as the file."""
    shutil.copy(ORDERS, tmp_path / "my.csv")
    done = subprocess.run([sys.executable, "-c", CODE[1]], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"LORA_EDU_REAL": "fable"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "without reading the question 0.23" in done.stdout
    assert {path.name for path in (tmp_path / "my_adapter").iterdir()} == {"adapter_config.json",
                                                                            "adapter_model.safetensors"}


# what a fenced block or a line in it begins with -> how it is tried, or why not
COMMANDS = {"git clone": "needs a network; the walk before resolving clones", "cd lora_edu": "a folder",
            "python3 dev.py lab": "test_dev.py, and the walk: it installs and does not end",
            "python3 dev.py test": "this run",
            "export PIP_EXTRA_INDEX_URL=": "pip's own variable; the workflow sets it",
            "lora-edu spectrum": "tests/test_cli.py", "lora-edu extract": "tests/test_cli.py",
            "lora-edu memory": "below", "lora-edu inspect": "test_convert.py", "lora-edu convert": "test_convert.py",
            "lora-edu gguf": "test_gguf.py", "torchrun": "tests/training/test_distributed.py"}


def test_every_fenced_command_is_tried_or_says_why_not():
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    blocks = [block for language, block in fenced if not language]
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert lines and [line for line in lines if not line.startswith(tuple(COMMANDS))] == []
    assert [start for start in COMMANDS if not any(line.startswith(start) for line in lines)] == []
    cli = (ROOT / "tests" / "test_cli.py").read_text(encoding="utf-8")
    assert '"spectrum"' in cli and '"extract"' in cli and not any("#" in line for line in blocks[0].splitlines())
    (memory,) = [line.split("  ")[0].split() for line in lines if line.startswith("lora-edu memory")]
    done = subprocess.run([sys.executable, "-m", "lora_edu.cli", *memory[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and "activations" in done.stdout


def test_commands_exist():
    helped = subprocess.run([sys.executable, str(ROOT / "dev.py")], capture_output=True, text=True)
    for verb in re.findall(r"python3? dev\.py (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert f"dev.py {verb}" in helped.stdout + helped.stderr, verb
    for module in re.findall(r"python -m (lora_edu[\w.]+)", README):
        assert subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True).returncode == 0
