"""Run notebooks from top to bottom and store their outputs, ready for `pytest --nbval`.

`python dev.py notebooks [NAME...]` calls this with the environment's Python. Left out of what is stored is what would
only make noise in a diff: the widgets' state (half of a small notebook, with new ids each time) and the views that need
it, the cells' start and end times, the kernel's exact version. The state is taken out afterwards, because nbclient 0.11
ends in a KeyError when told not to store it and an Output widget is shown. A notebook with a failing cell stays as it
was.
"""
import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TIMEOUT = 600   # seconds a cell
os.environ["LORA_EDU_CLAIMS"] = "raise"      # what is stored has held


class ThisPython(KernelSpecManager):
    """The kernel is the Python that runs this file, whatever kernels are installed for the user."""

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def find(names, folder=NOTEBOOKS):
    """The notebooks that are meant: by number (01), by name or a part of it, by path; all of them if none is named."""
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    found = []
    for name in names:
        stem = Path(name).stem
        matches = [path for path in known if stem in (path.stem, path.stem[:2])] or [
            path for path in known if len(stem) > 2 and stem.lower() in path.stem]
        if not matches:
            raise ValueError(f"no notebook is called {name!r}: there are "
                             f"{', '.join(path.stem for path in known) or 'none'}.")
        found += matches
    return found if names else known


def clean(notebook):
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if not is_progress_bar(out)]
            for out in cell.outputs:
                if "text/html" in out.get("data", {}):       # a lab: its picture stays, where a view needs a kernel
                    out.data.pop("application/vnd.jupyter.widget-view+json", None)


def is_progress_bar(output):
    """tqdm's widget, whose text form is "  0%|          | 0/100" or "extract:   0%|…": it belongs to the reader's
    run, not to the file.
    """
    return bool(re.match(r"([\w ]+:)?\s*\d+%\|", output.get("data", {}).get("text/plain", "")))


def failure(notebook, error):
    """"cell 3 of 7 (x = 1 / 0) raised ZeroDivisionError: division by zero": one line about where it stopped."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    failed = [i for i, cell in enumerate(cells) if any(out.output_type == "error" for out in cell.outputs)]
    started = [i for i, cell in enumerate(cells) if cell.execution_count]
    i = failed[0] if failed else started[-1] if started else 0
    what = f"{error.ename}: {error.evalue}" if isinstance(error,
                                                          CellExecutionError) else str(error).strip().splitlines()[0]
    return f"code cell {i + 1} of {len(cells)} ({cells[i].source.strip().splitlines()[0]}) raised {what}"


def store(path):
    """Run one notebook in its own folder and replace it by the result. Returns None, or what went wrong."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, km=AsyncKernelManager(kernel_spec_manager=ThisPython()), timeout=TIMEOUT,
                            record_timing=False, resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute(cleanup_kc=True)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return failure(notebook, error)
    clean(notebook)
    part = path.with_name(f".{path.name}.part")
    nbformat.write(notebook, part)
    os.replace(part, path)
    if path.stem.startswith("00"):
        store_picture(notebook, path.parents[1] / "docs" / "dial.png")
    return None


def store_picture(notebook, target):
    """The README's picture is the first one that notebook 00 shows."""
    found = (re.search(r'src="data:image/png;base64,([^"]+)"', out.get("data", {}).get("text/html", ""))
             for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs)
    picture = next((match[1] for match in found if match), None)
    if picture:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(base64.b64decode(picture))


def main(names):
    try:
        paths = find(names)
    except ValueError as error:
        print(error)
        return 1
    bad = 0
    for path in paths:
        start = time.perf_counter()
        problem = store(path)
        bad += problem is not None
        print(f"{path.name}: not stored, the file is as it was: {problem}" if problem
              else f"{path.name}: stored, {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
