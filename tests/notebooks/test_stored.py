"""The stored notebooks are from one clean run, so that nbval has something to compare, and small enough to open."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 500_000   # bytes
# a picture without words is none
PICTURE_IN_HTML = re.compile(r'<img alt="[^"]+" [^>]*src="data:image/png;base64,\w')
# a path of some machine: /home/..., /Users/..., C:\...
PATHS = re.compile(r"(?<![\w/.:])/(?:home|root|tmp|usr|var|opt|mnt|work|content|Users|private)/\w|\b[A-Z]:\\\w")


def code_of(cell):
    """A code cell's source without its comments and magics."""
    lines = "".join(cell["source"]).split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith(("#", "%", "!")))


def text_of(output):
    """Everything in an output that a reader could read, pictures left out."""
    data = output.get("data", {})
    pieces = [output.get("text", ""), *(value for kind, value in data.items() if not kind.startswith("image/p"))]
    text = "\n".join("".join(piece) if isinstance(piece, list) else str(piece) for piece in pieces)
    return re.sub(r'src="data:image/png;base64,[^"]*"', "", text)


def html_of(output):
    return "".join(output.get("data", {}).get("text/html", ""))


def complaints(notebook):
    """What is wrong with a stored notebook, one short sentence each."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    found = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("not from one run: counts are not 1..n")
    if "widgets" in notebook["metadata"]:
        found.append("widget state is stored")
    results = [tag for tag in tags if "setup" not in tag]       # the setup prints what pip prints, if anything
    if sum("nbval-ignore-output" in tag for tag in results) * 4 > len(results):
        found.append("more than a quarter of the code cells are tagged nbval-ignore-output")
    if any({"nbval-skip", "nbval-raises-exception", "raises-exception"} & set(tag) for tag in tags):
        found.append("a cell is tagged so that nbval does not check it")
    for number, cell in enumerate(cells, 1):
        found += [f"code cell {number}: {what}" for what in cell_complaints(cell)]
    return found


def cell_complaints(cell):
    source, outputs = code_of(cell), cell["outputs"]
    if any(output["output_type"] == "error" for output in outputs):
        yield "an error is stored"
    if re.search(r"\bpyplot\b|\bpylab\b|%matplotlib", "".join(cell["source"])):
        yield "uses pyplot"
    if re.search(r"(?<![\w.])(?<!def )show\(", source) and not any(PICTURE_IN_HTML.search(html_of(output))
                                                                   for output in outputs):
        yield "calls show() and has no picture"
    if any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs):
        yield "stores a widget's view, which is an error message without its kernel"
    if any(PATHS.search(text_of(output)) for output in outputs):
        yield "prints a path of the machine it ran on"
    if "NBVAL_" in "".join(cell["source"]):
        yield "steers nbval by a comment, where tags are counted"
    if "setup" not in cell["metadata"].get("tags", []):       # that one is the same everywhere, written by dev.py links
        lines = "".join(cell["source"]).split("\n")
        if len(lines) > 15:
            yield f"has {len(lines)} lines, and 15 are a cell"
        if max(map(len, lines)) > 100:
            yield f"is {max(map(len, lines))} columns wide, and a web page cuts it after 100"
    if "execution" in cell["metadata"]:
        yield "execution times are stored"


def test_every_notebook_is_stored_from_one_clean_run():
    found = {path.name: complaints(json.loads(path.read_text(encoding="utf-8")))
             for path in (ROOT / "notebooks").glob("**/*.ipynb")
             if ".ipynb_checkpoints" not in path.parts}
    assert {name: what for name, what in found.items() if what} == {}


def test_no_notebook_is_slow_to_open():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {name: size for name, size in sizes.items() if size >= LARGEST} == {}


def imports_pyplot(source):
    """pyplot keeps one current figure for all threads, and widget callbacks may run in threads."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = getattr(node, "module", None) or ""
        attribute = node.attr if isinstance(node, ast.Attribute) else ""
        if any(re.search(r"(^|\.)(pyplot|pylab)$", name) for name in [*names, module, attribute]):
            return True
    return False


def test_no_module_uses_pyplot():
    files = [path for folder in ("lora_edu", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in files if imports_pyplot(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("source, found", [
    ("import matplotlib.pyplot as plt", True), ("from matplotlib import pyplot", True),
    ("from matplotlib.pyplot import plot", True),
    ("import matplotlib\nmatplotlib.pyplot.plot()", True), ("import pylab", True),
    ('"""Never pyplot."""\nfrom matplotlib.figure import Figure', False)])
def test_pyplot_is_found(source, found):
    assert imports_pyplot(source) is found


# Each complaint is provoked once, in a notebook that is fine otherwise.

PICTURE = {"output_type": "display_data", "metadata": {},
           "data": {"text/html": ['<img alt="a line" src="data:image/png;base64,iVBOR/home/x">'],
                    "text/plain": ["<Figure>"]}}
VIEW = {"output_type": "display_data", "metadata": {},
        "data": {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": ["VBox()"]}}


def stream(text):
    return {"output_type": "stream", "name": "stdout", "text": [text]}


def code(count, source, *outputs, **metadata):
    return {"cell_type": "code", "execution_count": count, "source": source.splitlines(keepends=True),
            "outputs": list(outputs),
            "metadata": metadata}


def fine():
    cells = [code(1, "try: ...", tags=["setup", "nbval-ignore-output"]), code(2, "print(1)", stream("1\n")),
             code(3, "# show( in a comment\nplots.show(1)\ndef show(x): ...\nprint('and/or 3/4')",
                  stream("and/or 3/4, see https://x.org/home/a\n")),
             code(4, "show(figure)", PICTURE), {"cell_type": "markdown", "source": ["show(x)"], "metadata": {}},
             code(None, "")]
    return {"cells": cells, "metadata": {}}


def test_a_notebook_as_it_should_be_has_no_complaints():
    assert complaints(fine()) == []


def change_cell(**changes):
    return lambda book: book["cells"][1].update(changes)


@pytest.mark.parametrize("change, complaint", [
    (change_cell(execution_count=None), "counts"), (change_cell(execution_count=7), "counts"),
    (lambda book: book["cells"].pop(0), "counts"),
    (lambda book: book["metadata"].update(widgets={}), "widget state"),
    (change_cell(metadata={"tags": ["nbval-ignore-output"]}), "quarter"),
    (change_cell(metadata={"tags": ["nbval-skip"]}), "does not check"),
    (change_cell(outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]), "error is stored"),
    (change_cell(source=["import matplotlib.pyplot as plt"]), "pyplot"),
    (change_cell(source=["%matplotlib inline"]), "pyplot"),
    (change_cell(source=["x = 1\n"] * 15 + ["x"]), "16 lines"), (change_cell(source=["x" * 101]), "101 columns"),
    (change_cell(outputs=[VIEW]), "widget's view"),
    (change_cell(source=["x = 1\n", "show(x)"]), "no picture"), (change_cell(source=["f(show(x))"]), "no picture"),
    (change_cell(outputs=[stream("saved to /home/ada/x.pt\n")]), "path"),
    (change_cell(outputs=[stream("C:\\Users\\ada\n")]), "path"),
    (change_cell(outputs=[{"output_type": "execute_result", "metadata": {}, "execution_count": 2,
                           "data": {"text/plain": ["PosixPath('/tmp/x')"]}}]), "path"),
    (change_cell(source=["# NBVAL_IGNORE_OUTPUT\n", "print(1)"]), "comment"),
    (change_cell(metadata={"execution": {"iopub.status.busy": "2026"}}), "times")])
def test_each_complaint_is_made(change, complaint):
    book = fine()
    change(book)
    assert [what for what in complaints(book) if complaint in what] != []
