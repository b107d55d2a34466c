"""Notebook 08 in its two real settings: weights from a hub, and the copy from the package index. On fable it runs with
the other notebooks.
"""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

from lora_edu.course.page.real_model import NAME
from tests.hub import local_hub

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from store_outputs import ThisPython  # noqa: E402

NOTEBOOK = ROOT / "notebooks" / "08_a_real_model_on_a_gpu.ipynb"
pytestmark = pytest.mark.full


def test_with_the_copy_of_the_package_index_every_stored_output_comes_out(real_weights):
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=600", "-q",
               "-p", "no:cacheprovider", str(NOTEBOOK)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"LORA_EDU_REAL": str(real_weights), "LORA_EDU_DEVICE": "cpu"})
    assert done.returncode == 0, done.stdout[-4000:]


def test_from_a_hub_it_sets_up_and_takes_five_steps(real_weights, tmp_path, monkeypatch):
    """A server that answers like the hub, with the real files; everything up to the first training, which is cut."""
    root = tmp_path / "hub"
    (root / NAME).parent.mkdir(parents=True)
    (root / NAME).symlink_to(real_weights, target_is_directory=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if "losses = []" in cell.source)
    notebook.cells = notebook.cells[:last + 1]
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS, NAME = 40", "STEPS, NAME = 5")
    with local_hub(root) as (endpoint, asked):
        for name, value in {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
                            "XDG_CACHE_HOME": str(tmp_path / "none"), "LORA_EDU_DEVICE": "cpu"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("LORA_EDU_REAL", raising=False)
        NotebookClient(notebook, km=AsyncKernelManager(kernel_spec_manager=ThisPython()), timeout=600,
                       resources={"metadata": {"path": str(tmp_path)}}).execute(cleanup_kc=True)
    said = "".join(out.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs)
    assert f"the published weights, {NAME} on the hub" in said and "Paris" in said
    assert "numbers trained" in said and (tmp_path / "cache").is_dir()
    assert any(path.endswith("model.safetensors") for path in asked)
