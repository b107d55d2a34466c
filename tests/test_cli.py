"""The command lora-edu says what it is, and refuses what it does not know."""
import tomllib
from pathlib import Path

import pytest

from lora_edu import cli

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_version_is_the_one_in_pyproject(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lora-edu {PROJECT['version']}\n"


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_the_command_and_the_way_to_the_notebooks(arguments, capsys):
    if arguments:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
    else:
        assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: lora-edu") and "python dev.py lab" in " ".join(out.split())


def test_an_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["frobnicate"])
    assert end.value.code == 2
    assert "frobnicate" in capsys.readouterr().err


def test_pyproject_points_to_it():
    assert PROJECT["scripts"] == {"lora-edu": "lora_edu.cli:main"}
