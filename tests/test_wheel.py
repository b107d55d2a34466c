"""What pip installs elsewhere is complete: the code, the weights that go with it, the command."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import lora_edu, torch
from lora_edu import load_pretrained
model, tokenizer = load_pretrained("fable")
with torch.no_grad():
    print(lora_edu.__file__, tuple(model(torch.tensor([tokenizer.encode("Once upon a time").ids])).shape[::2]),
    sep="\\n")
"""


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """A folder with the wheel's content, and the variables that put it first on Python's path."""
    target = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target),
               str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target, dict(os.environ, PYTHONPATH=str(target))


def python(elsewhere, *arguments):
    target, env = elsewhere
    done = subprocess.run([sys.executable, *arguments], cwd=target.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_fable_loads_from_the_installed_wheel(elsewhere):
    """Package data included; the first line says which lora_edu it was, the second (batch, vocabulary) of the
    logits.
    """
    where, shape = python(elsewhere, "-c", LOAD)
    assert Path(where).is_relative_to(elsewhere[0])
    assert shape == "(1, 2048)"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """Every module and data file of lora_edu/, no tests and no notebooks."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    rooms = {name.split("/")[0] for name in names}
    assert rooms == {"lora_edu", f"{wheel.name.split('-py3')[0]}.dist-info"}
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lora_edu").rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}
    assert ours - names == set()


def test_every_folder_with_modules_is_a_package():
    """setuptools leaves out a folder without __init__.py, and nothing says so."""
    folders = {path.parent for path in (ROOT / "lora_edu").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_command_is_installed_with_it(elsewhere):
    (line,) = python(elsewhere, str(elsewhere[0] / "bin" / "lora-edu"), "--version")
    assert line == "lora-edu 0.1.0"
