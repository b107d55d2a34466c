"""The course in a real browser: run a notebook in JupyterLab, move its slider, see the picture change."""
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# How many sliders each has: the voice and the dial, the picture's rank, the picker's rank, the explorer's layer and
# rank, the trainer's rank and learning rate (its alpha is locked) and the grid's, the calculator's rank, batch
# and length, the merge lab's strength and factor.
PLAYED = {"00_": 2, "01_": 1, "02_": 1, "03_": 2, "04_": 4, "05_": 3, "06_": 2}
WRITTEN = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.name.startswith(tuple(PLAYED))]

DIAL = """
import numpy as np
from IPython.display import display
from lora_edu.course import alpha_dial
alphas = np.linspace(0, 1, 21)
box = alpha_dial(alphas, 4 - 3 * alphas, 3 + alphas, [f"text {i}" for i in range(21)])
"""
DISCONNECTED = DIAL + "box.children[0].children[0].unobserve_all()\n"
BROKEN = """
import ipywidgets
from IPython.display import display
from lora_edu.course.page.show import new_figure
from lora_edu.course.page.widgets import picture_with_controls
fig, ax = new_figure(title="one bar")
(bar,) = ax.barh(["a"], [1])
def update(level):
    bar.set_width(1 / (5 - level))
    return f"level {level}"
box = picture_with_controls(fig, update, level=ipywidgets.IntSlider(value=4, min=0, max=9, description="level"))
"""


CALCULATOR = """
from IPython.display import display
from lora_edu.course import memory_calculator
box = memory_calculator("llama-7b")
"""
LAB = """
import torch
from IPython.display import display
from lora_edu import load_pretrained
from lora_edu import load_adapter
from lora_edu.models.pretrained import BISTRO_ADAPTER
from lora_edu.course import merge_lab
model, _ = load_pretrained("fable")
load_adapter(model, BISTRO_ADAPTER)
ids = torch.arange(48).view(2, 24)
box = merge_lab(model, "model.layers.3.mlp.down_proj", (ids, ids + 1), (ids, ids + 2))
"""


WALK = [pytest.param(path, id=path.stem, marks=[] if path.name.startswith("00_") else pytest.mark.full)
        for path in WRITTEN]


@pytest.mark.parametrize("path", WALK)
def test_the_notebook_runs_and_every_slider_moves_a_picture(path, open_notebook):
    with open_notebook(path) as page:
        page.run_all()
        assert page.errors() == []
        assert len(page.sliders()) == PLAYED[path.name[:3]]
        for index, name in enumerate(page.sliders()):
            (page.check_text if name == "storyteller" else page.check_slider)(index)


@pytest.mark.full
def test_a_connected_dial_moves_its_picture_and_its_text(open_cell):
    with open_cell(DIAL) as page:
        page.run_all()
        assert "strength 1.00: new task 1.00, tales 4.00" in page.text() and "text 20" in page.text()
        page.check_slider(0)
        assert "strength 0.10" in page.text() and "text 2" in page.text()


@pytest.mark.full
def test_lists_buttons_and_the_box_of_the_calculator_move_its_picture(open_cell):
    with open_cell(CALCULATOR) as page:
        page.run_all()
        widget = page.page.locator(".jp-OutputArea-output")
        moves = [lambda i=i, value=value: widget.locator("select").nth(i).select_option(value)
                 for i, value in enumerate(("gpt2-xl", "attention", "nf4", "adamw-8bit"))]
        moves += [lambda: widget.locator("input[type=checkbox]").check(),
                  # four bits do not train in full
                  lambda: widget.locator("select").nth(2).select_option("16-bit"),
                  lambda: page.click("full")]
        for i, move in enumerate(moves):
            before, said = page.settle(), page.text()
            move()
            page._wait_for_change(before, f"move {i}", timeout=30)
            page.settle()
            assert page.text() != said and "cannot be drawn" not in page.text(), i
        assert page.errors() == [] and "gpt2-xl: 1,557,611,200 parameters; 1,557,611,200 numbers train" in page.text()


@pytest.mark.full
def test_the_merge_labs_dtype_moves_its_picture(open_cell):
    with open_cell(LAB) as page:
        page.run_all()
        for dtype in ("float16", "float32", "bfloat16"):
            before = page.settle()
            page.click(dtype)
            page._wait_for_change(before, dtype, timeout=30)
            page.settle()
            assert page.text().startswith(f"{dtype}, strength 1.0")
        assert page.errors() == []


@pytest.mark.full
def test_a_disconnected_dial_fails_the_same_check(open_cell):
    """The proof that the check can fail: the handle moves, and nothing answers it."""
    with open_cell(DISCONNECTED) as page:
        page.run_all()
        with pytest.raises(AssertionError, match="press: no picture changed"):
            page.check_slider(0, timeout=2)


@pytest.mark.full
def test_an_error_in_a_callback_is_on_the_page_and_fails_the_check(open_cell):
    with open_cell(BROKEN) as page:
        page.run_all()
        with pytest.raises(AssertionError, match="no picture changed"):
            page.check_slider(0, timeout=2)   # from 4 to 5: a division by zero
        page.page.get_by_text("This setting cannot be drawn: ZeroDivisionError").wait_for(timeout=30_000)
