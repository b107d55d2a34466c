"""The labs in the front end that goes with Colab's versions: classic Notebook 6.5, ipywidgets 7.7, anywidget 0.9.

    python tests/browser/classic.py JUPYTER_NOTEBOOK FOLDER    its program, and the folder with the notebooks

`dev.py colab` calls it, with the Python of .venv, which has the driver. A lab of notebook 01 is moved by a key,
and the trainer of 04 plays; the status is 1 where one of them does not answer.
"""
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

from playwright import sync_api

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.browser.conftest import CHROMIUM, FLAGS, running  # noqa: E402

READY = "() => window.Jupyter?.notebook?.kernel?.is_connected()"
TEXT = "document.querySelector('.lora-lab .say').textContent"


def only_what_a_lab_needs(path: Path, words: str) -> dict:
    """Set-up, imports, and the cells up to the one that shows the lab; without outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    last = next(i for i, cell in enumerate(code) if words in "".join(cell["source"]))
    for cell in code:
        cell.update(outputs=[], execution_count=None)
    return notebook | {"cells": code[:last + 1]}


def opened(browser, address: str):
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(180_000)
    page.goto(address)
    page.wait_for_function(READY)
    page.wait_for_timeout(2000)
    page.evaluate("() => Jupyter.notebook.execute_all_cells()")
    page.wait_for_selector(".lora-lab")
    return page


def main(program: str, folder: Path) -> int:
    if CHROMIUM is None:
        print("no Chromium on this machine, so the labs were not looked at")
        return 1 if os.environ.get("CI") else 0
    with socket.socket() as probe, tempfile.TemporaryDirectory() as home:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        served = Path(home) / "notebooks"
        served.mkdir()
        probe.close()
        for name, words in (("01", "rank_picture(picture)"), ("04", "live_trainer()")):
            path = next(folder.glob(f"{name}_*.ipynb"))
            (served / f"{name}.ipynb").write_text(json.dumps(only_what_a_lab_needs(path, words)), encoding="utf-8")
        env = os.environ | {"HOME": home, "JUPYTER_CONFIG_DIR": home, "LORA_EDU_DEVICE": "cpu"}
        command = [program, "--no-browser", "--allow-root", f"--port={port}", "--NotebookApp.token=labs",
                   f"--notebook-dir={served}"]
        address = f"http://127.0.0.1:{port}"
        with running(command, env, Path(home) / "log", f"{address}/api/status?token=labs"), \
                sync_api.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
            page = opened(browser, f"{address}/notebooks/01.ipynb?token=labs")
            before = page.evaluate(TEXT)
            page.locator(".lora-lab input[type=range]").first.press("ArrowRight")
            page.wait_for_function(f"(before) => {TEXT} !== before", arg=before)
            page = opened(browser, f"{address}/notebooks/04.ipynb?token=labs")
            page.locator(".lora-lab [data-name=play]").first.click()
            page.wait_for_function(f"() => /^step [1-9]/.test({TEXT})")
            browser.close()
    print("the labs answer in classic Notebook with ipywidgets 7.7 and anywidget 0.9")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
