"""Where everything is installed, a skipped test is a test that does not run: with CI=true a skip is a failure.

Only tests marked `gpu` may be skipped there. What was turned into a failure is listed at the end of the run.
"""
import os

import pytest

TURNED = "skipped, and with CI=true only tests marked gpu may be: "


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs CUDA; skipped, with a reason, where there is none")
    config.addinivalue_line("markers", "browser: drives JupyterLab with Chromium")


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
    if item.get_closest_marker("gpu") is None:
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
    if turned:
        terminalreporter.section("skipped although CI=true")
        for report in turned:
            terminalreporter.line(f"{report.nodeid}: {str(report.longrepr).removeprefix(TURNED)}")
