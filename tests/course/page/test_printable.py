"""Verdicts and tables on terminals that know no tick and no Δ."""
import os
import subprocess
import sys

import pytest

CODE = """
from torch import nn
from lora_edu import apply_lora, merge_lora
from lora_edu.course import claim
from lora_edu.course.page.exercises import say
claim("ΔW is low-rank", True)
say("1.1", False, "almost")
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
print(apply_lora(model, ["0"], rank=1))
print(merge_lora(model))
"""


@pytest.mark.parametrize("encoding, want", [("ascii", "[yes] holds: dW is low-rank"),
                                            ("utf-8", "✓ holds: ΔW is low-rank"),
                                            ("cp1252", "[yes] holds: dW is low-rank")])
def test_a_verdict_is_printed_in_any_encoding(encoding, want):
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    assert "|dW|/|W0|" in done.stdout.decode(encoding) or encoding == "utf-8"
    assert lines[0] == want and lines[1] in ("Exercise 1.1 [no] almost", "Exercise 1.1 ✗ almost")
