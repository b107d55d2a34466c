"""The course in a real JupyterLab: labs that move while cells run, and a stored page that speaks without a kernel."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# Two dials; the picture; the picker; the explorer; the trainer, the map, and the trainer below it; the calculator; the
# merge lab; the mixer.
LABS = {"00_": 2, "01_": 1, "02_": 1, "03_": 2, "04_": 3, "05_": 1, "06_": 1, "07_": 1, "08_": 2}
WRITTEN = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.name.startswith(tuple(LABS))]
WALK = [pytest.param(path, id=path.stem, marks=[] if path.name.startswith("00_") else pytest.mark.full)
        for path in WRITTEN]
PICTURE = """
from IPython.display import display
from lora_edu.course import rank_picture, sample_picture
box = rank_picture(sample_picture(64))
"""
DISCONNECTED = PICTURE + "box._esm = box._esm.replace('page.redraw();', '')\n"
# 3 to 4 px more than there is room for make a scrollbar under an output
SCROLLBARS = """() => [...document.querySelectorAll('.jp-OutputArea-output, .jp-OutputArea-output *')].filter(node =>
  node.scrollWidth > node.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(node).overflowX) &&
  node.clientWidth > 0).map(node => node.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("path", WALK)
def test_the_notebook_runs_and_its_labs_answer(path, open_notebook):
    """The first one as readers have it; in the others trainings are a step long, and their labs move all the same."""
    short = not path.name.startswith("00_")
    with open_notebook(path, short=short) as page:
        began = time.monotonic()
        page.start()
        page.lab(0).wait_for(timeout=600_000)
        if page.check_lab(0) and not short:
            page.record("run all to a lab in use", f"{time.monotonic() - began:.1f} s  {path.stem}")
        page.finish()
        assert page.errors() == [] and page.page.locator(".lora-lab").count() == LABS[path.name[:3]]
        for i in range(LABS[path.name[:3]]):
            page.check_lab(i)
        assert page.page.evaluate(SCROLLBARS) == []
        pictures = page.page.locator(".jp-OutputArea-output img").evaluate_all(
            "nodes => nodes.map(node => [node.alt, node.complete && node.naturalWidth > 0])")
        assert pictures and all(alt and loaded for alt, loaded in pictures), pictures


def test_a_dial_answers_while_the_kernel_is_busy(open_notebook):
    """Run all of 00, and the first dial is moved by a key before the last cell has run."""
    with open_notebook(NOTEBOOKS / "00_start_here.ipynb") as page:
        page.start()
        page.lab(0).wait_for(timeout=600_000)
        busy = not page.idle()
        page.check_lab(0)
        assert busy and not page.ran(), "the kernel was to be busy"


def test_an_arrow_key_stays_on_its_control(open_cell):
    with open_cell(PICTURE) as page:
        page.run_all()
        slider = page.lab(0).locator("input[type=range]")
        slider.focus()
        for key in ("ArrowDown", "ArrowUp", "ArrowRight"):
            page.page.keyboard.press(key)
            assert slider.evaluate("node => node === document.activeElement"), key


@pytest.mark.full
def test_a_lab_that_is_cut_off_fails_the_same_check(open_cell):
    """The proof that the check can fail: the handle moves, and nothing answers it."""
    with open_cell(DISCONNECTED) as page:
        page.run_all()
        with pytest.raises(AssertionError, match="says the same"):
            page.check_lab(0)


@pytest.mark.full
def test_the_state_of_a_lab_reaches_python_and_a_reloaded_page_starts_from_it(open_cell):
    with open_cell(PICTURE) as page:
        page.run_all()
        page.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.page.wait_for_timeout(2000)
        page.lab(0).locator("input[type=range]").press("Home")       # after the file: it can only come from the kernel
        page.page.wait_for_timeout(1000)
        page.page.on("dialog", lambda dialog: dialog.accept())
        page.page.reload()
        page.page.wait_for_selector(".lora-lab", timeout=60_000)
        assert page.lab(0).locator(".say").inner_text().startswith("rank 1:")


@pytest.mark.full
def test_fable_lives_in_jupyterlab_too(open_cell):
    """The module of the web page, with its weights from the kernel; the dial is turned and it writes on."""
    with open_cell("from lora_edu.course.labs.fable_live import fable_live\nbox = fable_live()\n") as page:
        page.run_all()
        said = page.lab(0).locator(".say")
        page.page.wait_for_function("() => /tokens a second/.test(document.querySelector('.say').textContent)",
                                    timeout=60_000)
        page.lab(0).locator("input[type=range]").press("End")
        assert said.inner_text().startswith("strength 1.2")


# -- without a kernel --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", WALK)
def test_a_stored_page_speaks_without_a_kernel(path, open_notebook):
    """As it comes from the repository: untrusted, opened and not run."""
    with open_notebook(path, stored=True) as page:
        said = page.page.locator(".jp-OutputArea-output").get_by_text("Run this cell to move it.")
        said.first.wait_for()
        text = page.page.locator(".jp-Notebook").inner_text()
        assert said.count() == LABS[path.name[:3]] and "VBox(" not in text and "model not found" not in text
        pictures = page.page.locator(".jp-OutputArea-output img").evaluate_all(
            "nodes => nodes.map(node => [node.alt, node.complete && node.naturalWidth > 0])")
        assert len(pictures) >= LABS[path.name[:3]] - 1 and all(alt and loaded for alt, loaded in pictures)


@pytest.mark.full
@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in WRITTEN])
def test_the_html_of_nbconvert_speaks_too(path, tmp_path, chromium):
    """What GitHub does, as far as it can be had here: HTML without any of its scripts."""
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", str(tmp_path), str(path)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / f"{path.stem}.html").as_uri())
    assert page.get_by_text("Run this cell to move it.").count() == LABS[path.name[:3]]
    assert page.get_by_text("VBox(").count() == 0
    context.close()


@pytest.mark.full
def test_a_notebook_that_was_saved_is_alive_when_it_is_opened_again(open_cell, open_notebook, lab, tmp_path):
    with open_cell(PICTURE) as page:
        page.run_all()
        page.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        saved = Path(lab[0]) / page.name
        end = time.monotonic() + 30
        while "widgets" not in json.loads(saved.read_text(encoding="utf-8"))["metadata"] and time.monotonic() < end:
            page.page.wait_for_timeout(200)
        copy = tmp_path / "again.ipynb"
        copy.write_bytes(saved.read_bytes())
    with open_notebook(copy, stored=True) as page:
        page.lab(0).wait_for()
        page.check_lab(0)
