"""A real JupyterLab on loopback and a real Chromium, for the tests of this folder.

Nothing of the user's is read or changed: Jupyter's settings, config, data and runtime folders lie in pytest's own
temporary folder, the notebooks are copies, and each gets a workspace of its own. A test that fails leaves a screenshot
there, and says where. How long it took from "Run all" to a lab in use is printed at the end of the run.
"""
import json
import os
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

from tests import shortened

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
    "../@jupyter-widgets/jupyterlab-manager/plugin": {"saveState": True},      # as dev.py sets it
}
# What the page says when a kernel is truly connected; running cells before that opens a dialog.
IDLE = """() => {
  const session = window.jupyterapp?.shell?.currentWidget?.sessionContext, kernel = session?.session?.kernel;
  return !!(session?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle');
}"""
# A page with nothing but a place for a lab, and a stand-in for the widget's model.
PLAIN_PAGE = """<!doctype html><html lang="en"><head><title>A lab</title></head>
<body style="background: BACK; margin: 8px"><main><h1 style="display: none">A lab</h1><div id="place"></div></main>
</body></html>"""
START = """async ([source, traits]) => {
  const listeners = {};
  Object.assign(window, {saved: [], sent: []});
  const fire = (name, ...values) => (listeners[name] ?? []).slice().forEach((listener) => listener(...values));
  window.model = {
    get: (name) => structuredClone(traits[name]), set: (name, value) => { traits[name] = structuredClone(value) },
    save_changes: () => window.saved.push(structuredClone(traits.state)), send: (message) => window.sent.push(message),
    on: (name, listener) => { (listeners[name] ??= []).push(listener) },
    off: (name, listener) => { listeners[name] = (listeners[name] ?? []).filter((each) => each !== listener) } };
  window.tell = (name, value) => {
    if (name === 'message') return fire('msg:custom', value);
    traits[name] = value; fire('change:' + name, window.model, value); };
  window.lab = await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})));
  window.end = window.lab.default.render({model: window.model, el: document.getElementById('place')});
}"""
# What is wider than its room, and how long the fastest of twenty moves took, in ms.
TOO_WIDE = """() => [...document.querySelectorAll('html, .lora-lab, .lora-lab div')].filter(node =>
  node.scrollWidth > node.clientWidth + 1 && node.className !== 'quiet').map(node => node.outerHTML.slice(0, 120))"""
FASTEST = """() => Math.min(...Array.from({length: 20}, (_, i) => {
  const slider = document.querySelector('input[type=range]:not([disabled])'), start = performance.now();
  slider.value = i % (+slider.max + 1); slider.dispatchEvent(new Event('input'));
  document.body.getBoundingClientRect();
  return performance.now() - start; }))"""
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


@pytest.fixture
def open_lab(chromium):
    """``page = open_lab(lab)``: the lab's module in a page without a kernel; yields the Playwright page.

    What the module saves is in ``window.saved``, what it sends in ``window.sent``; ``window.tell(name, value)`` is the
    kernel's side: it sets a trait, or sends a message.
    """
    pages = []

    def opened(lab, width=1000, height=900, dark=False):
        page = chromium.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.failures = []
        page.on("pageerror", lambda error: page.failures.append(str(error)))
        page.set_default_timeout(20_000)
        page.set_content(PLAIN_PAGE.replace("BACK", "#111111" if dark else "#ffffff"))
        traits = {name: value for name, value in lab.get_state().items() if not name.startswith("_")}
        page.evaluate(START, [lab._esm, traits])
        return page
    yield opened
    failures = [failure for page in pages for failure in page.failures]
    for page in pages:
        page.close()
    assert not failures, failures


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
             if name == "run all to a lab in use"]
    if lines:
        terminalreporter.section("from Run all to a lab in use")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def open_notebook(lab, chromium, tmp_path, record_property):
    """``with open_notebook(path) as page:`` opens a copy without outputs, its kernel ready; yields a `NotebookPage`.
    ``stored=True``: with its outputs; ``short=True``: trainings are a step long.
    """
    served, address, token = lab

    @contextmanager
    def opened(path: Path, stored: bool = False, short: bool = False):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if cell["cell_type"] == "code" and not stored:
                cell.update(outputs=[], execution_count=None)   # what is seen later was made here
        if short:
            content["cells"].insert(2, {"cell_type": "code", "id": "short", "metadata": {}, "source": shortened.CELL,
                                        "outputs": [], "execution_count": None})
        name = f"{secrets.token_hex(4)}_{Path(path).name}"
        (served / name).write_text(json.dumps(content), encoding="utf-8")
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(180_000)
        notebook = NotebookPage(page, name, record_property)
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
    """A notebook in the browser: run it, and move its labs."""

    def __init__(self, page, name: str, record):
        self.page, self.name, self.record, self.script_errors = page, name, record, []
        page.on("pageerror", lambda error: self.script_errors.append(str(error)))

    def start(self) -> None:
        """Run every cell, as the Run menu does, without waiting for the end."""
        self.page.evaluate("() => { window.ran = false; window.jupyterapp.commands.execute('notebook:run-all-cells')"
                           ".then(() => { window.ran = true }) }")

    def finish(self, timeout: float = 600) -> None:
        self.page.wait_for_function("() => window.ran", timeout=1000 * timeout)
        self.page.wait_for_function(IDLE, timeout=1000 * timeout)

    def run_all(self, timeout: float = 600) -> None:
        self.start()
        self.finish(timeout)

    def ran(self) -> bool:
        return self.page.evaluate("() => window.ran")

    def restart_kernel(self) -> None:
        """As the Kernel menu does, without its question."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        self.page.wait_for_function(IDLE)

    def idle(self) -> bool:
        return self.page.evaluate(IDLE)

    def errors(self) -> list[str]:
        return self.page.locator(ERRORS).all_inner_texts()

    def lab(self, index: int = 0):
        return self.page.locator(".lora-lab").nth(index)

    def check_lab(self, index: int, wait: float = 2.0) -> bool:
        """Move each slider of a lab that is not locked, by key: it says something else, and keeps the focus."""
        lab = self.lab(index)
        sliders = lab.locator("input[type=range]:not([disabled])")
        for i in range(sliders.count()):
            slider = sliders.nth(i)
            if not slider.is_visible():
                continue
            slider.scroll_into_view_if_needed()
            before, value = lab.locator(".say").inner_text(), int(slider.input_value())
            slider.focus()
            self.page.keyboard.press("ArrowLeft" if value else "ArrowRight")
            assert int(slider.input_value()) != value, "the handle did not move"
            end = time.monotonic() + wait
            while lab.locator(".say").inner_text() == before:
                assert time.monotonic() < end, f"lab {index}, slider {i} says the same: {before}"
                self.page.wait_for_timeout(20)
            assert slider.evaluate("node => node === document.activeElement"), "the focus left the slider"
        return sliders.count() > 0
