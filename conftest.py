"""Which tests run, and what a skip means.

`python dev.py test` runs every cell of every notebook once and one notebook in a browser. `--full` adds the tests
marked `full`: notebooks and labs in a browser, every cell twice, as continuous integration does. `--quick` leaves out
notebooks, browser and what is marked `slow`.

Where everything is installed, a skipped test is a test that does not run: with CI=true a skip is a failure. Only tests
marked `gpu` or `optional` may be skipped there. What was turned into a failure is listed at the end of the run.
"""
import os
from pathlib import Path

import pytest

os.environ["LORA_EDU_CLAIMS"] = "raise"      # a claim that stops being true fails; for a reader it is a line
os.environ.setdefault("LORA_EDU_REAL", "fable")      # the real model has a test of its own

TURNED = "skipped, and with CI=true only tests marked gpu or optional may be: "


def there(*names):
    """Skip where these real weights are not in the cache: `.ci/run` fetches them, a reader may."""
    from lora_edu.course.page.real_model import real_copy
    from tools import real
    if not all((real_copy(folder) / "SOURCE.md").is_file() for name in names for folder in real.WEIGHTS[name].folders):
        pytest.skip(f"the real weights are not here: python dev.py real {' '.join(names)}")


@pytest.fixture(scope="session")
def real_weights():
    """The folder of the copy of SmolLM2 from the package index."""
    from lora_edu.course.page.real_model import real_copy
    there("smollm2")
    return real_copy()


@pytest.fixture(scope="session")
def published_weights():
    """Two published bases and three fine-tunes are in the cache."""
    there("minilm", "sre", "rxnfp")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the tests marked full, too: every notebook and lab in a "
                     "browser")
    parser.addoption("--quick", action="store_true", help="without notebooks, browser and the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped, with a reason, where there is none")
    config.addinivalue_line("markers", "optional: needs what is long to build, as llama.cpp; skipped where it is not")
    config.addinivalue_line("markers", "browser: drives JupyterLab with Chromium")
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("markers", "real: needs published weights; where they are not, skipped with the command "
                            "that fetches them")
    config.addinivalue_line("markers", "slow: left out by --quick")
    if getattr(config.option, "nbval", False) and config.option.nbval_sanitize_with is None:
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests" / "notebooks" / "pictures.cfg")


def pytest_collection_modifyitems(config, items):
    """Tests that this run leaves out are deselected, and so no skips. The longest files come first: with several
    workers no one of them is left alone with a notebook at the end.
    """
    left = set() if config.getoption("--full") else {"full"}
    left |= {"slow", "browser", "notebook"} if config.getoption("--quick") else set()

    def out(item):
        return "notebook" in left and ".ipynb" in item.nodeid or any(item.get_closest_marker(name) for name in left)
    leaving = [item for item in items if out(item)]
    if leaving:
        config.hook.pytest_deselected(items=leaving)
        items[:] = [item for item in items if not out(item)]
    items.sort(key=lambda item: ("test_twice" not in item.nodeid, item.get_closest_marker("browser") is None,
                                 ".ipynb" not in item.nodeid))


def strict():
    return os.environ.get("CI", "").lower() in ("true", "1")


def turn(report):
    """Make a failure of a skip; an expected failure (xfail) also comes as "skipped", and stays what it is."""
    if strict() and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = TURNED + reason.removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.get_closest_marker("gpu") is None and item.get_closest_marker("optional") is None:
        turn(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield   # a whole file that skips itself, as importorskip does
    turn(report)
    return report


def pytest_terminal_summary(terminalreporter):
    reports = [r for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, [])]
    turned = [r for r in reports if str(r.longrepr).startswith(TURNED)]
    books = sorted({r.nodeid.split("::")[0] for r in reports if ".ipynb" in r.nodeid})
    if books:
        terminalreporter.section("notebooks")
        terminalreporter.line(f"{', '.join(books)}: an output came out otherwise than it is stored, or a claim failed. "
                              "README.md, 'How to trust it', says what is compared; CONTRIBUTING.md, 'How stored "
                              "outputs work', how to store them.")
    if turned:
        terminalreporter.section("skipped although CI=true")
        for report in turned:
            terminalreporter.line(f"{report.nodeid}: {str(report.longrepr).removeprefix(TURNED)}")
