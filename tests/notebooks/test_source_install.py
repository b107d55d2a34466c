"""A notebook that is opened alone, where lora_edu is not installed: its setup cell fetches the library and it runs.

The environment is a new one that sees the packages of this one through links, lora_edu excepted; pip installs into it
from a wheel, without the network. The kernel is the new environment's.
"""
import os
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tools import links

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WHERE = "import lora_edu, sys; print(lora_edu.__file__); print(sys.prefix)"


@pytest.fixture
def bare(tmp_path):
    """The Python of an environment with torch and the rest, but without lora_edu."""
    others = tmp_path / "others"
    others.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        # the links leave out the editable install, and with it what pip knows of it
        for entry in Path(folder).iterdir():
            if not entry.name.lower().startswith(("lora_edu", "__editable__", "_lora_edu")) and entry.suffix != ".pth":
                (others / entry.name).symlink_to(entry)
    env = tmp_path / "env"
    venv.create(env, symlinks=os.name != "nt")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)}))
    (site / "others.pth").write_text(f"{others}\n", encoding="utf-8")
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


class Kernels(KernelSpecManager):
    """The kernel of one environment, with variables that keep pip off the network."""

    def __init__(self, python, variables):
        super().__init__()
        self.python, self.variables = python, variables

    def get_kernel_spec(self, kernel_name):
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, env=self.variables, display_name="bare", language="python")


def execute(notebook, python, folder, source, monkeypatch):
    for name in ("PYTHONPATH", "LORA_EDU_SOURCE"):   # the kernel inherits what is set here
        monkeypatch.delenv(name, raising=False)
    variables = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "LORA_EDU_DEVICE": "cpu"}
    variables |= {"LORA_EDU_SOURCE": str(source)} if source else {}
    client = NotebookClient(notebook, km=AsyncKernelManager(kernel_spec_manager=Kernels(python, variables)),
                            timeout=300,
                            resources={"metadata": {"path": str(folder)}})
    client.execute(cleanup_kc=True)
    return ["".join(output.get("text", "")) for output in notebook.cells[-1].outputs]


def the_notebook():
    """Notebook 01, and a last cell that says where lora_edu came from; a setup cell alone while there is no 01."""
    found = sorted((ROOT / "notebooks").glob("01_*.ipynb"))
    notebook = (
        nbformat.read(found[0], as_version=4)
        if found
        else new_notebook(cells=[new_code_cell(links.setup_source("OWNER/x"))])
    )
    notebook.cells.append(new_code_cell(WHERE))
    return notebook


def test_a_notebook_runs_where_lora_edu_is_not_installed(bare, wheel, tmp_path, monkeypatch):
    work = tmp_path / "alone"
    work.mkdir()
    (text,) = execute(the_notebook(), bare, work, wheel, monkeypatch)
    where, prefix = map(Path, text.split("\n")[:2])
    assert prefix == bare.parents[1]
    assert where.is_relative_to(bare.parents[1])


def test_with_an_address_the_variable_still_decides(bare, wheel, tmp_path, monkeypatch):
    notebook = new_notebook(cells=[new_code_cell(links.setup_source("no-such-owner/no-such-repository")),
                                   new_code_cell(WHERE)])
    (text,) = execute(notebook, bare, tmp_path, wheel, monkeypatch)
    assert Path(text.split("\n")[0]).is_relative_to(bare.parents[1])


def test_without_an_address_and_a_source_one_sentence_says_what_to_do(bare, tmp_path, monkeypatch):
    """It also shows that the environment does not have lora_edu by itself."""
    notebook = new_notebook(cells=[new_code_cell(links.setup_source("OWNER/lora_edu"))])
    with pytest.raises(CellExecutionError, match="lora_edu is not installed, and there is no wheel of it"):
        execute(notebook, bare, tmp_path, None, monkeypatch)
