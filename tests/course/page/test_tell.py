"""Verdict lines on terminals that know no tick."""
import os
import subprocess
import sys

import pytest

CODE = """
from lora_edu.course import claim
from lora_edu.course.page.exercises import say
claim("ΔW is low-rank", True)
say("1.1", False, "almost")
"""


@pytest.mark.parametrize("encoding, want", [("ascii", "[yes] holds: DW is low-rank"),
                                            ("utf-8", "✓ holds: ΔW is low-rank"),
                                            ("cp1252", "[yes] holds: DW is low-rank")])
def test_a_verdict_is_printed_in_any_encoding(encoding, want):
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    assert lines[0] == want and lines[1] in ("Exercise 1.1 [no] almost", "Exercise 1.1 ✗ almost")
