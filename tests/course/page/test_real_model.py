"""Which real model there is: the hub's, the package index's copy, or fable; and where trained things are kept."""
from pathlib import Path

import pytest

from lora_edu import load_pretrained
from lora_edu.course.page import machine, real_model
from lora_edu.course.page.real_model import NAME, real_copy


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is asked for, with a hub that gives nothing; every name loads fable."""
    names, there = [], set()

    def load(name, dtype):
        names.append(str(name))
        if name == NAME and NAME not in there:
            raise RuntimeError("the hub does not answer")
        return load_pretrained("fable", dtype)
    monkeypatch.setattr(real_model, "load_pretrained", load)
    monkeypatch.delenv("LORA_EDU_REAL", raising=False)
    monkeypatch.delenv("LORA_EDU_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return names, there


def test_without_anything_it_is_fable_and_says_so(asked):
    found = real_model.real_model()
    assert (found.name, found.base) == ("fable", "fable") and asked[0] == [NAME, "fable"]
    assert "no hub is reached" in found.source and "show that they run, no more" in found.source


def test_the_copy_of_the_package_index_is_taken_and_says_that_it_went_through_four_bits(asked):
    real_copy().mkdir(parents=True)
    found = real_model.real_model()
    assert asked[0] == [NAME, str(real_copy())] and "after four bits" in found.source
    assert (found.name, found.base) == ("SmolLM2-135M-Instruct", str(real_copy()))


def test_the_hub_comes_first(asked):
    real_copy().mkdir(parents=True)
    asked[1].add(NAME)
    found = real_model.real_model()
    assert asked[0] == [NAME] and found.source == f"the published weights, {NAME} on the hub" and found.base == NAME


@pytest.mark.parametrize("asks, name", [("fable", "fable"), ("some/folder/SmolLM2-135M-Instruct",
                                                             "SmolLM2-135M-Instruct"), ("owner/other", "other")])
def test_the_variable_names_another(asked, monkeypatch, asks, name):
    monkeypatch.setenv("LORA_EDU_REAL", asks)
    found = real_model.real_model()
    assert asked[0] == [asks] and (found.base, found.name) == (asks, name) and "LORA_EDU_REAL" in found.source


def test_an_error_of_the_named_one_is_not_hidden(asked, monkeypatch):
    monkeypatch.setenv("LORA_EDU_REAL", NAME)
    with pytest.raises(RuntimeError, match="does not answer"):
        real_model.real_model()


def test_what_was_trained_is_kept_on_drive_where_that_is_mounted(monkeypatch):
    assert machine.keep_in("mine") == Path("my_adapters/mine")
    monkeypatch.setattr(machine.Path, "is_dir", lambda path: str(path) == "/content/drive/MyDrive")
    assert machine.keep_in("mine") == Path("/content/drive/MyDrive/lora_edu/my_adapters/mine")
