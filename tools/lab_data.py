"""What the web page needs of the labs: their data, as the notebooks make it. Run notebooks, store no output of theirs.

    python tools/lab_data.py            all of them
    python tools/lab_data.py 00 06      these

One JSON a lab in site/labs, called by the notebook's number and the cell's id: module, data, state. Labs that train in
the kernel have none, for a page has no kernel.
"""
import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
LABS = ROOT / "site" / "labs"
KEEP = "application/vnd.lora-edu.lab+json"
NEEDS_A_KERNEL = {"trainer"}


def lab_data(path: Path) -> int:
    """Run a notebook and write its labs' data; returns how many."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    found = {cell.id: output["data"][KEEP] for cell in book.cells if cell.cell_type == "code"
             for output in cell.outputs if KEEP in output.get("data", {})}
    for old in LABS.glob(f"{path.stem[:2]}-*.json"):
        old.unlink()
    kept = {cell: lab for cell, lab in found.items() if lab["module"] not in NEEDS_A_KERNEL}
    for cell, lab in kept.items():
        text = json.dumps(rounded(lab), separators=(",", ":"), ensure_ascii=False)
        (LABS / f"{path.stem[:2]}-{cell}.json").write_text(text + "\n", encoding="utf-8")
    return len(kept)


def rounded(value):
    """Seven digits are what float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def main(names: list[str]) -> None:
    LABS.mkdir(parents=True, exist_ok=True)
    os.environ |= {KEEP: "1", "LORA_EDU_DEVICE": "cpu", "LORA_EDU_REAL": "fable"}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if not names or path.stem[:2] in names:
            print(f"{path.name}: {lab_data(path)} labs", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
