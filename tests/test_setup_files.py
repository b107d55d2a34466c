"""The ways to install say the same thing: pyproject.toml, the two constraint files, conda, dev.py, the workflow."""
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import dev

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
RUN_TIME = [Requirement(line) for line in PROJECT["dependencies"]]
ALL = RUN_TIME + [Requirement(line) for extra in EXTRAS.values() for line in extra]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pins(name):
    lines = (line.split("#")[0].strip() for line in read(name).splitlines())
    return {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, filter(None, lines))}


@pytest.mark.parametrize("name", ["constraints.txt", "colab-constraints.txt"])
def test_every_pin_is_exact(name):
    """And without a local label (+cpu), so that one file serves every build."""
    assert [f"{package}{pin}" for package, pin in pins(name).items() if not re.fullmatch(r"==[\w.]+", str(pin))] == []


def pinned(requirement, fixed):
    """The version that is pinned for a requirement, or None."""
    specifier = fixed.get(canonicalize_name(requirement.name))
    return next(iter(specifier)).version if specifier else None


def test_every_direct_dependency_is_pinned_to_a_version_that_pyproject_allows():
    versions = {str(req): pinned(req, pins("constraints.txt")) for req in ALL}
    assert [line for line, version in versions.items() if version is None] == []
    assert [line for line, version in versions.items() if not Requirement(line).specifier.contains(version)] == []


def test_the_colab_job_can_install_its_extras():
    """Colab's list pins only what Colab has; what it has must be allowed."""
    wanted = RUN_TIME + [Requirement(line) for name in ("hub", "test") for line in EXTRAS[name]]
    versions = {str(req): pinned(req, pins("colab-constraints.txt")) for req in wanted}
    assert [line for line, version in versions.items() if version
            and not Requirement(line).specifier.contains(version)] == []


def test_what_compares_notebooks_on_colabs_stack_is_what_compares_them_here():
    assert set(dev.COLAB_TOOLS) <= set(EXTRAS["test"])


def test_torch_is_pinned_to_the_version_the_course_names():
    assert str(pins("constraints.txt")["torch"]) == "==2.13.0"


def test_the_colab_stack_is_what_makes_colab_different():
    """The pins without which a run says nothing about Colab: its front end knows these versions only, and torch is
    older.
    """
    colab = {name: str(pin) for name, pin in pins("colab-constraints.txt").items()}
    assert colab["ipywidgets"] == "==7.7.1" and colab["ipython"] == "==7.34.0" and colab["ipykernel"] == "==6.17.1"
    assert colab["torch"] == "==2.11.0" and colab["notebook"] == "==6.5.7"


def test_colab_keeps_its_own_packages():
    """A floor above what Colab has would make `pip install` replace it there.

    A commented pin says what Colab has, too.
    """
    colab = dict(re.findall(r"^#? ?([\w-]+)==([\w.]+)", read("colab-constraints.txt"), re.MULTILINE))
    assert {req.name for req in RUN_TIME} <= set(colab)
    for req in RUN_TIME:
        assert req.specifier.contains(colab[req.name]), f"{req} would replace Colab's {colab[req.name]}"


def test_run_time_dependencies_are_floors():
    for req in RUN_TIME:
        assert {part.operator for part in req.specifier} <= {">=", "<"} and ">=" in str(req.specifier), str(req)


def test_the_environment_takes_every_extra():
    assert set(EXTRAS) == {"lab", "hub", "test", "browser", "site"}
    assert dev.EXTRAS == f".[{','.join(EXTRAS)}]" and dev.READER == ".[lab,hub]"


def test_conda_installs_the_same():
    env = yaml.safe_load(read("environment.yml"))
    plain = [line for line in env["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in env["dependencies"] if isinstance(line, dict)]
    assert {re.split(r"[=<> ]", line)[0] for line in plain} == {"python", "pip"}   # no second list of packages
    (python,) = [line for line in plain if line.startswith("python")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[-1] + ".0")
    assert pip == ["-c constraints.txt", f"-e {dev.EXTRAS}"]


def test_python_versions():
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert allowed.contains("3.11.0") and allowed.contains("3.13.0") and not allowed.contains("3.10.9")
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    assert {name: job["strategy"]["matrix"]["python"] for name, job in jobs.items()} == {
        "tests": ["3.11", "3.13"], "colab": ["3.11", "3.13"]}


def test_the_workflow_runs_monthly_and_calls_what_is_here():
    workflow = yaml.safe_load(read(".github/workflows/tests.yml"))
    (entry,) = workflow[True]["schedule"]          # YAML 1.1 reads the key `on` as True
    assert re.fullmatch(r"\d+ \d+ \d+ \* \*", entry["cron"])
    steps = {name: " && ".join(step.get("run", "") for step in job["steps"]) for name, job in workflow["jobs"].items()}
    assert ".ci/run" in steps["tests"]
    assert steps["colab"].endswith("python dev.py colab")
    assert [job for job, text in steps.items() if "PIP_EXTRA_INDEX_URL" not in text] == []   # else 4 GB of CUDA


def test_ci_run_installs_a_browser_and_calls_dev():
    text = read(".ci/run")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
    assert "set -euo pipefail" in text and text.rstrip().endswith("python3 dev.py test --full")
    assert text.index("apt-get update") < text.index("apt-get install")


def test_pre_commit_has_the_ruff_of_the_constraints():
    config = yaml.safe_load(read(".pre-commit-config.yaml"))
    (repo,) = [repo for repo in config["repos"] if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"=={repo['rev'].removeprefix('v')}" == str(pins("constraints.txt")["ruff"])


def test_what_git_must_not_see():
    ignored = read(".gitignore").splitlines()
    made = {name + end for name in (".venv", ".venv-colab") for end in ("/", ".unfinished")}
    assert made | {"my_notebooks/", "__pycache__/", ".ipynb_checkpoints/", "runs/"} <= set(ignored)


def test_licence():
    assert PROJECT["license"] == "MIT" and PROJECT["license-files"] == ["LICENSE"]
    assert read("LICENSE").startswith("MIT License") and "the lora_edu authors" in read("LICENSE")
