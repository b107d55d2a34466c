"""With CI=true a skip is a failure, unless it is marked gpu or optional. Run on a small project of its own."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "test_skips.py": """
import pytest

@pytest.mark.skip(reason="mark says so")
def test_marked(): ...

def test_in_the_body():
    pytest.skip("body says so")

@pytest.fixture
def absent():
    pytest.skip("fixture says so")

def test_in_a_fixture(absent): ...

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no CUDA here")
def test_gpu(): ...

@pytest.mark.optional
def test_optional():
    pytest.skip("not built here")

@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail():
    raise ValueError

def test_passes(): ...
""",
    "test_module.py": "import pytest\npytest.importorskip('no_such_package_anywhere')\n",
}
TURNED = ["mark says so", "body says so", "fixture says so", "no_such_package_anywhere"]


def pytest_in(folder, ci, *arguments):
    folder.joinpath("conftest.py").write_text((ROOT / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "--rootdir", str(folder),
               *arguments]
    done = subprocess.run(command, cwd=folder, env=dict(env, CI=ci) if ci else env, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def project(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_with_ci_each_skip_fails_and_is_listed(project, workers):
    code, out = pytest_in(project, "true", "--continue-on-collection-errors", *workers)
    assert code == 1
    assert "1 failed, 1 passed, 2 skipped, 1 xfailed, 3 errors" in out
    listed = out.split("skipped although CI=true")[1].split("short test summary")[0]
    assert [reason for reason in TURNED if reason not in listed] == []
    assert "no CUDA" not in listed and "known" not in listed


def test_a_module_that_skips_itself_stops_the_run(project):
    code, out = pytest_in(project, "true")
    assert code != 0 and "no_such_package_anywhere" in out.split("skipped although CI=true")[1]


@pytest.mark.parametrize("ci", ["", "false"])
def test_without_ci_a_skip_is_a_skip(project, ci):
    code, out = pytest_in(project, ci)
    assert code == 0
    assert "1 passed, 6 skipped, 1 xfailed" in out and "skipped although" not in out


def test_with_ci_and_no_skips_nothing_is_added(tmp_path):
    (tmp_path / "test_fine.py").write_text("def test_fine(): ...\n", encoding="utf-8")
    code, out = pytest_in(tmp_path, "true")
    assert code == 0 and "skipped although" not in out


KINDS = """
import pytest

@pytest.mark.full
def test_full(): ...

@pytest.mark.slow
def test_slow(): ...

@pytest.mark.browser
def test_browser(): ...

def test_plain(): ...
"""


@pytest.mark.parametrize("options, ran", [([], {"slow", "browser", "plain"}), (["--quick"], {"plain"}),
                                          (["--full"], {"full", "slow", "browser", "plain"})])
def test_what_a_run_leaves_out_is_deselected_and_no_skip(tmp_path, options, ran):
    (tmp_path / "test_kinds.py").write_text(KINDS, encoding="utf-8")
    code, out = pytest_in(tmp_path, "true", "-v", *options)
    assert code == 0 and set(re.findall(r"test_(\w+) PASSED", out)) == ran and "skipped" not in out
