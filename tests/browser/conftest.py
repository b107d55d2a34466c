"""A real JupyterLab on loopback and a real Chromium, for the tests of this folder.

Nothing of the user's is read or changed: Jupyter's settings, config, data and runtime folders lie in pytest's own
temporary folder, the notebooks are copies, and each gets a workspace of its own. A test that fails leaves a screenshot
there, and says where. How long a key took to become a picture is printed at the end of the run.
"""
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A time limit here is for a busy machine; on an idle one a notebook opens in 5 s and a picture changes in 0.3 s.
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},   # else cells off screen are taken out of the page
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},
}
# What the page says when a kernel is truly connected; running cells before that opens a dialog.
IDLE = """() => {
  const session = window.jupyterapp?.shell?.currentWidget?.sessionContext, kernel = session?.session?.kernel;
  return !!(session?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle');
}"""
# The pixels of every image in the outputs. Not their addresses: a widget's image gets a new one at every update.
PIXELS = """async () => {
  const found = [];
  for (const image of document.querySelectorAll('.jp-OutputArea-output img')) {
    try { await image.decode() } catch { continue }
    const canvas = Object.assign(document.createElement('canvas'), {width: image.naturalWidth, height:
    image.naturalHeight}); canvas.getContext('2d').drawImage(image, 0, 0);
    found.push(canvas.toDataURL());
  }
  return found;
}"""
SLIDER = ".jp-OutputArea-output .widget-slider:not(:has([disabled]))"
# When a key went down, and when the next picture stood loaded: the page's own clock, which no polling slows down.
WATCH = """() => {
  window.pressed = window.drawn = null;
  document.addEventListener('keydown', () => { window.pressed = performance.now() }, {capture: true, once: true});
  document.addEventListener('load', () => { window.drawn ??= performance.now() }, {capture: true, once: true});
}"""
LATENCY = 1.0   # seconds from a key to its picture; 0.05 to 0.3 on an idle machine
ERRORS = ", ".join(f".jp-RenderedText[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("stderr", "error"))


@pytest.fixture(scope="session")
def chromium():
    """The browser; the tests are skipped, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install "
                                                                   "playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or install Google Chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory, chromium):
    """A JupyterLab that serves an empty folder: (that folder, its address, its token)."""
    work = tmp_path_factory.mktemp("jupyterlab")
    served, settings = work / "served", work / "settings"
    served.mkdir()
    for plugin, values in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    own = {"HOME": work, "IPYTHONDIR": work / "ipython"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": settings, "JUPYTERLAB_WORKSPACES_DIR": work / "workspaces"}
    own |= {f"JUPYTER_{name}_DIR": work / name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
    env = os.environ | {name: str(path) for name, path in own.items()}
    env |= {"PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1", "LORA_EDU_DEVICE": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={served}", f"--IdentityProvider.token={token}",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    with running(command, env, work / "jupyter.log", f"{address}/api/status?token={token}"):
        yield served, address, token


@contextmanager
def running(command, env, log: Path, status: str, timeout: float = 180):
    """A server in a process group of its own, which is ended with the kernels it started and nothing else."""
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + timeout
        while not answers(status):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError("JupyterLab did not start:\n" + log.read_text()[-2000:])
            time.sleep(0.2)
        yield
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports
               if getattr(report, "when", "") == "call"]
    lines = [f"{said}  {report.nodeid}" for report in reports for name, said in report.user_properties
             if name == "key to picture"]
    if lines:
        terminalreporter.section("from a key to its picture")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def open_notebook(lab, chromium, tmp_path, record_property):
    """``with open_notebook(path) as page:`` opens a copy without outputs, its kernel ready; yields a `NotebookPage`."""
    served, address, token = lab

    @contextmanager
    def opened(path: Path):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)   # what is seen later was made here
        name = f"{secrets.token_hex(4)}_{Path(path).name}"
        (served / name).write_text(json.dumps(content), encoding="utf-8")
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(180_000)
        notebook = NotebookPage(page, record_property)
        try:
            page.goto(f"{address}/lab/workspaces/{name[:8]}/tree/{name}?token={token}", wait_until="commit")
            page.wait_for_selector(".jp-Notebook .jp-CodeCell")
            page.wait_for_function(IDLE)
            yield notebook
            assert not notebook.script_errors, notebook.script_errors
        except BaseException as error:
            page.screenshot(path=tmp_path / "failed.png")
            error.add_note(f"screenshot: {tmp_path / 'failed.png'}")
            raise
        finally:
            page.evaluate("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.shutdown()")
            page.close()
    return opened


@pytest.fixture
def open_cell(open_notebook, tmp_path):
    """``with open_cell(source) as page:`` opens a notebook of one cell, which ends by displaying ``box``."""
    def opened(source: str):
        cell = {"cell_type": "code", "id": "only", "metadata": {}, "source": source + "display(box)"}
        cell |= {"outputs": [], "execution_count": None}
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        path = tmp_path / "one_cell.ipynb"
        path.write_text(json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}),
                        encoding="utf-8")
        return open_notebook(path)
    return opened


class NotebookPage:
    """A notebook in the browser: run it, look at its pictures, move its sliders that are not locked."""

    def __init__(self, page, record):
        self.page, self.record, self.script_errors = page, record, []
        page.on("pageerror", lambda error: self.script_errors.append(str(error)))

    def run_all(self, timeout: float = 600) -> None:
        """Run every cell, as the Run menu does, and wait until the last picture stands still."""
        self.page.evaluate("() => { window.ran = false; window.jupyterapp.commands.execute('notebook:run-all-cells')"
                           ".then(() => { window.ran = true }) }")
        self.page.wait_for_function("() => window.ran", timeout=1000 * timeout)
        self.page.wait_for_function(IDLE, timeout=1000 * timeout)
        self.settle()

    def restart_kernel(self) -> None:
        """As the Kernel menu does, without its question."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        self.page.wait_for_function(IDLE)

    def idle(self) -> bool:
        return self.page.evaluate(IDLE)

    def click(self, button: str) -> None:
        """Click a widget's button by its text."""
        self.page.locator(".jp-OutputArea-output").get_by_role("button", name=button, exact=True).click()

    def errors(self) -> list[str]:
        return self.page.locator(ERRORS).all_inner_texts()

    def text(self) -> str:
        """What the widgets say about their pictures."""
        return "\n".join(self.page.locator(".jp-OutputArea-output [role=status]").all_inner_texts())

    def pictures(self) -> list[str]:
        return [hashlib.sha256(pixels.encode()).hexdigest()[:12] for pixels in self.page.evaluate(PIXELS)]

    def settle(self, quiet: float = 0.6, timeout: float = 60) -> list[str]:
        """Wait until the pictures stand still (a drag sends many values), and return them."""
        end, last, since = time.monotonic() + timeout, None, time.monotonic()
        while time.monotonic() < end:
            now = self.pictures()
            if now != last:
                last, since = now, time.monotonic()
            elif now and time.monotonic() - since > quiet:
                return now
            self.page.wait_for_timeout(50)
        raise TimeoutError("the pictures never stood still" if last else "there is no picture on the page")

    def check_slider(self, index: int = 0, timeout: float = 30) -> None:
        """Move a slider by key, then by drag: each time the handle moves, a picture changes, and no error appears.

        One key of three must become a picture within a second; the fastest is printed at the end of the run.
        """
        handle = self.handle(index)
        handle.scroll_into_view_if_needed()
        errors = self.errors()
        for move in (self._press, self._drag):
            before, value = self.settle(), handle.get_attribute("aria-valuenow")
            move(handle, index)
            self._wait_for_change(before, move.__name__.strip("_"), timeout)
            assert handle.get_attribute("aria-valuenow") != value, "the handle did not move"
            if move == self._press:
                self._check_latency(handle, index, timeout)
        self.settle()
        assert self.errors() == errors, "moving the slider put an error on the page"
        assert not re.search("cannot be drawn", self.text()), self.text()

    def check_text(self, index: int, timeout: float = 30) -> None:
        """Move a slider that has no picture by a key: the line on the page goes on."""
        handle, before = self.handle(index), self.text()
        handle.scroll_into_view_if_needed()
        self._press(handle, index)
        end = time.monotonic() + timeout
        while self.text() == before and time.monotonic() < end:
            self.page.wait_for_timeout(50)
        assert self.text() != before, "no text changed"

    def handle(self, index: int):
        return self.page.locator(f"{SLIDER} .noUi-handle").nth(index)

    def sliders(self) -> list[str]:
        """What stands before each slider."""
        return self.page.locator(f"{SLIDER} .widget-label").all_inner_texts()

    def _check_latency(self, handle, index: int, timeout: float) -> None:
        """Of the key just pressed, or of two more: another program may have held the machine during one."""
        seconds = [self._latency(timeout)]
        while seconds[-1] >= LATENCY and len(seconds) < 3:
            self.settle()
            self._press(handle, index)
            seconds.append(self._latency(timeout))
        self.record("key to picture", f"{min(seconds):.2f} s  {self.sliders()[index]}")
        assert min(seconds) < LATENCY, (
            f"a key needs {min(seconds):.2f} s to become a picture: should be under {LATENCY:g} s"
        )

    def _latency(self, timeout: float) -> float:
        self.page.wait_for_function("() => window.drawn", timeout=1000 * timeout)
        return self.page.evaluate("() => window.drawn - window.pressed") / 1000

    def _wait_for_change(self, before: list[str], how: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            now = self.pictures()
            if len(now) == len(before) and now != before:   # while a picture is replaced there may be one less
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{how}: no picture changed")

    def _press(self, handle, index: int) -> None:
        handle.focus()
        self.page.evaluate(WATCH)
        self.page.keyboard.press("ArrowLeft" if self._share(handle) > 0.5 else "ArrowRight")

    def _drag(self, handle, index: int) -> None:
        box = handle.bounding_box()
        track = self.page.locator(f"{SLIDER} .noUi-target").nth(index).bounding_box()
        height = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] / 2, height)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + track["width"] * (0.1 if self._share(handle) > 0.5 else 0.9), height, steps=5)
        self.page.mouse.up()

    def _share(self, handle) -> float:
        """Where the handle stands, from 0 (left) to 1 (right)."""
        low, now, high = (float(handle.get_attribute(f"aria-value{name}")) for name in ("min", "now", "max"))
        return (now - low) / (high - low)
