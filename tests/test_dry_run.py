"""A GPU rehearsed: everything that takes a model runs on a device that is not the CPU (tests/dry_device.py).

Each test in a process of its own, because that device changes torch for good.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCENES = ("layers", "training", "adapters", "text", "stacks", "changes", "rivals", "measures", "labs",
          "four_bits")


def dry_run(*what):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "dry_run.py"), *what], capture_output=True, text=True,
                          cwd=ROOT, timeout=600, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_every_public_function_finds_on_the_device_what_it_finds_on_the_cpu():
    status, said, errors = dry_run("functions")
    assert status == 0, errors[-4000:]
    assert [line for line in said if line.endswith(" ok")] == [f"{scene} ok" for scene in SCENES]


@pytest.mark.parametrize("numbers", [("00", "02"), ("03", "06"), ("07",), ("08",)])
def test_the_notebooks_that_use_a_device(numbers):
    status, said, errors = dry_run("notebooks", *numbers)
    assert status == 0, errors[-4000:]
    assert [line[:2] for line in said if line.endswith(" ok") and line[:2] in numbers] == list(numbers)


def test_every_notebook_is_rehearsed_or_says_that_a_cpu_is_enough():
    books = {path.name[:2]: path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert {number for number, text in books.items() if "CPU is enough" not in text} == {"00", "02", "03", "06",
                                                                                                 "07", "08"}


def test_a_tensor_made_without_a_device_is_found():
    status, said, errors = dry_run("functions", "layers", "--plant")
    assert status == 1 and "on cpu meets one on dry:0" in errors and not any(line.endswith(" ok") for line in said)
