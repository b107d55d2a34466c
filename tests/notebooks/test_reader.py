"""A reader stops the training of notebook 00 after five steps: nothing below it is red, and the claims say why."""
import os
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from tools.store_outputs import ThisPython

ROOT = Path(__file__).resolve().parents[2]
STOPPED = """
from lora_edu.training import loop
whole = loop.train
def train(*args, **how):
    for step in whole(*args, **how):
        yield step
        if step.step == {step}:
            raise KeyboardInterrupt          # what the stop button sends
loop.train = train
"""


@pytest.mark.full
@pytest.mark.parametrize("step", [5])
def test_a_training_stopped_early_leaves_nothing_red(step, monkeypatch):
    monkeypatch.delenv("LORA_EDU_CLAIMS", raising=False)
    monkeypatch.setenv("LORA_EDU_DEVICE", "cpu")
    notebook = nbformat.read(next((ROOT / "notebooks").glob("00_*.ipynb")), as_version=4)
    notebook.cells.insert(2, new_code_cell(STOPPED.format(step=step)))
    client = NotebookClient(notebook, km=AsyncKernelManager(kernel_spec_manager=ThisPython()), timeout=300,
                            resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute(cleanup_kc=True)          # no cell raises
    said = "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code"
                   for output in cell.outputs)
    assert f"Stopped after {step} of 150 steps" in said
    assert "✗ here 'differs here', in the course 'holds': Your adapter learned the trade" in said
    assert "measured: after = " in said and os.environ.get("LORA_EDU_CLAIMS") is None
