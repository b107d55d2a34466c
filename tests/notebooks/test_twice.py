"""Readers run cells again: every cell of every notebook, run twice in a row, raises neither time. In the notebooks of
`LONG` trainings are a step long, and no claim is judged: what raises there is a name or a shape, not a number.
"""
import copy
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from store_outputs import ThisPython  # noqa: E402

from tests import shortened  # noqa: E402

LONG = ("00_", "02_", "03_", "06_", "07_")      # in the others little would be saved


@pytest.mark.full
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_every_cell_may_be_run_twice_in_a_row(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [copy.deepcopy(cell) for cell in notebook.cells if cell.cell_type == "code" for _ in range(2)]
    if path.name.startswith(LONG):
        notebook.cells.insert(2, nbformat.v4.new_code_cell(shortened.CELL))
    for cell in notebook.cells:
        cell.id = nbformat.v4.new_code_cell().id
    manager = AsyncKernelManager(kernel_spec_manager=ThisPython())
    # an error in a cell raises, and its text names the cell
    NotebookClient(notebook, km=manager, timeout=900, record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute(cleanup_kc=True)
    assert any(cell.outputs for cell in notebook.cells)
