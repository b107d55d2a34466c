"""The course in a real browser: run a notebook in JupyterLab, move its slider, see the picture change."""
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PLAYED = ("00_", "01_", "02_", "03_")   # these hold a slider: the alpha dial, the picture's rank, the picker's rank, the explorer's layer
WRITTEN = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.name.startswith(PLAYED)]

DIAL = """
import numpy as np
from IPython.display import display
from lora_edu.page.widgets import alpha_dial
alphas = np.linspace(0, 1, 21)
box = alpha_dial(alphas, 4 - 3 * alphas, 3 + alphas, [f"text {i}" for i in range(21)])
"""
DISCONNECTED = DIAL + "box.children[0].children[0].unobserve_all()\n"
BROKEN = """
import ipywidgets
from IPython.display import display
from lora_edu.page.plots import new_figure
from lora_edu.page.widgets import picture_with_controls
fig, ax = new_figure(title="one bar")
(bar,) = ax.barh(["a"], [1])
def update(level):
    bar.set_width(1 / (5 - level))
    return f"level {level}"
box = picture_with_controls(fig, update, level=ipywidgets.IntSlider(value=4, min=0, max=9, description="level"))
"""


def notebook(path: Path, source: str) -> Path:
    """A notebook of one cell that ends by displaying ``box``."""
    cell = {"cell_type": "code", "id": "only", "metadata": {}, "source": source + "display(box)", "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_the_notebook_runs_and_its_first_slider_moves_the_picture(path, open_notebook):
    with open_notebook(path) as page:
        page.run_all()
        assert page.errors() == []
        page.check_slider(0)


def test_a_connected_dial_moves_its_picture_and_its_text(open_notebook, tmp_path):
    with open_notebook(notebook(tmp_path / "dial.ipynb", DIAL)) as page:
        page.run_all()
        assert "strength 1.00: new task 1.00, tales 4.00" in page.text() and "text 20" in page.text()
        page.check_slider(0)
        assert "strength 0.10" in page.text() and "text 2" in page.text()


def test_a_disconnected_dial_fails_the_same_check(open_notebook, tmp_path):
    """The proof that the check can fail: the handle moves, and nothing answers it."""
    with open_notebook(notebook(tmp_path / "disconnected.ipynb", DISCONNECTED)) as page:
        page.run_all()
        with pytest.raises(AssertionError, match="press: no picture changed"):
            page.check_slider(0, timeout=2)


def test_an_error_in_a_callback_is_on_the_page_and_fails_the_check(open_notebook, tmp_path):
    with open_notebook(notebook(tmp_path / "broken.ipynb", BROKEN)) as page:
        page.run_all()
        with pytest.raises(AssertionError, match="no picture changed"):
            page.check_slider(0, timeout=2)   # from 4 to 5: a division by zero
        page.page.get_by_text("This setting cannot be drawn: ZeroDivisionError").wait_for(timeout=30_000)
