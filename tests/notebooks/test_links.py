"""Every notebook carries the same address, the links to its neighbours, and the same setup cell."""
import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from tools import links

ROOT = Path(__file__).resolve().parents[2]


def test_the_notebooks_and_the_readme_are_what_links_would_write():
    assert [path.name for path, _ in links.pending(ROOT)] == [], "run: python dev.py links"


def notebook(path, title, header_tags=("header",), setup_tags=("setup", "nbval-ignore-output")):
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {"tags": list(header_tags)},
              "source": [f"# {title}\n", "\n", "**Question.** How few — really?\n", "**Time** 5 minutes"]},
             {"cell_type": "code", "id": "b", "metadata": {"tags": list(setup_tags)}, "source": [], "outputs": [],
              "execution_count": 1},
             {"cell_type": "code", "id": "c", "metadata": {}, "source": ["print(1)"], "execution_count": 2,
              "outputs": [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]}]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")


@pytest.fixture
def course(tmp_path):
    """Notebooks 00, 01 and 04, and no address yet."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/OWNER/lora_edu"\n',
                                             encoding="utf-8")
    (tmp_path / "README.md").write_text(f"[00]({links.COLAB}OWNER/lora_edu/blob/main/notebooks/00_start.ipynb)\n"
                                        "git clone https://github.com/OWNER/lora_edu\ncd lora_edu\npython3 dev.py\n",
                                        encoding="utf-8")
    for name, title in (("00_start", "00 · Start here"), ("01_linear", "01 · A linear layer"),
                        ("04_rank", "04 · Rank")):
        notebook(tmp_path / "notebooks" / f"{name}.ipynb", title)
    return tmp_path


def test_the_readme_opens_with_the_page_once_there_is_an_address(course):
    readme = course / "README.md"
    readme.write_text("# Title\n\n" + readme.read_text(encoding="utf-8"), encoding="utf-8")
    links.main(course)
    assert readme.read_text(encoding="utf-8").startswith("# Title\n\n[00]")
    for repo, address in (("Ada/loras", "https://ada.github.io/loras/"), ("bob/l", "https://bob.github.io/l/")):
        links.main(course, repo)
        text = readme.read_text(encoding="utf-8")
        assert text.splitlines()[2].endswith(address) and text.count("github.io") == 1 and "\n\n[00]" in text
    links.main(course, "OWNER/lora_edu")
    assert "github.io" not in readme.read_text(encoding="utf-8")


def sources(course, name):
    book = json.loads((course / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"]]


def colab(repo, name):
    return f"[Open in Colab](https://colab.research.google.com/github/{repo}/blob/main/notebooks/{name}.ipynb)"


def test_header_line_names_the_nearest_notebooks_that_exist(course):
    links.main(course, "ada/loras")
    start, middle, last = (sources(course, name)[0].split("\n")[2] for name in ("00_start", "01_linear", "04_rank"))
    assert (
        start == f"[Contents](../README.md) · [01 A linear layer](01_linear.ipynb) · {colab('ada/loras', '00_start')}"
    )
    assert middle == ("[00 Start here](00_start.ipynb) · [Contents](../README.md) · [04 Rank](04_rank.ipynb) · "
                      f"{colab('ada/loras', '01_linear')}")
    assert last == f"[01 A linear layer](01_linear.ipynb) · [Contents](../README.md) · {colab('ada/loras', '04_rank')}"


def test_only_the_links_line_and_the_setup_cell_change(course):
    links.main(course, "ada/loras")
    header, _, code = sources(course, "01_linear")
    assert header.split("\n")[0] == "# 01 · A linear layer"
    assert header.split("\n")[3:] == ["", "**Question.** How few — really?", "**Time** 5 minutes"]
    assert code == "print(1)"
    book = nbformat.read(course / "notebooks" / "01_linear.ipynb", as_version=4)
    assert book.cells[2].outputs[0].text == "1\n" and book.cells[1].execution_count == 1   # stored outputs stay


def test_written_as_nbformat_writes_it(course):
    """So that a notebook that is run afterwards shows no other difference."""
    links.main(course)
    path = course / "notebooks" / "01_linear.ipynb"
    book = nbformat.read(path, as_version=4)
    assert path.read_text(encoding="utf-8") == nbformat.writes(book) + "\n"


def test_a_second_time_changes_nothing_and_a_new_notebook_changes_its_neighbours(course, capsys):
    links.main(course, "ada/loras")
    assert list(links.pending(course)) == []
    notebook(course / "notebooks" / "02_model.ipynb", "02 · In a model")
    assert {path.stem for path, _ in links.pending(course)} == {"01_linear", "02_model", "04_rank"}
    links.main(course)
    assert list(links.pending(course)) == []
    assert sources(course, "04_rank")[0].count("[Contents]") == 1   # replaced, not added


def test_one_address_everywhere(course, capsys):
    links.main(course)
    assert "none is set" in capsys.readouterr().out
    links.main(course, "ada/loras")
    texts = [path.read_text(encoding="utf-8")
             for path in [course / "README.md", course / "pyproject.toml", *course.glob("notebooks/*")]]
    assert not [text for text in texts if "OWNER" in text]
    assert not [text for text in texts if "ada/loras" not in text]
    assert "git clone https://github.com/ada/loras\ncd loras\npython3 dev.py\n" in texts[0]


def test_a_notebook_edited_by_hand_is_found(course):
    links.main(course, "ada/loras")
    path = course / "notebooks" / "04_rank.ipynb"
    text = path.read_text(encoding="utf-8")
    for old, new in (("ada/loras@main", "bob/loras@main"), ("01_linear.ipynb", "00_start.ipynb")):
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        assert [found.stem for found, _ in links.pending(course)] == ["04_rank"]


@pytest.mark.parametrize("repo", ["OWNER/lora_edu", "ada/loras"])
def test_setup_cell_is_short_and_parses(repo):
    text = links.setup_source(repo)
    assert len(text.splitlines()) <= 16 and max(map(len, text.splitlines())) <= 100
    ast.parse(re.sub(r"%pip .*", "...", text))
    assert 'get("LORA_EDU_SOURCE")' in text
    assert ("drive.mount" in text) == ("is not installed" in text) == repo.startswith("OWNER")
    assert (f"git+https://github.com/{repo}@main" in text) == (not repo.startswith("OWNER"))


@pytest.mark.parametrize("repo",
                         ["lora_edu", "https://github.com/ada/loras", "ada/loras/tree/main", "a da/loras", '"/x'])
def test_a_wrong_repository_is_refused_and_nothing_written(course, repo):
    before = (course / "pyproject.toml").read_text()
    with pytest.raises(ValueError, match="OWNER/NAME"):
        links.main(course, repo)
    assert (course / "pyproject.toml").read_text() == before


@pytest.mark.parametrize("changes, message", [
    ({"header_tags": ()}, "0 cells tagged 'header'"),
    ({"setup_tags": ("nbval-ignore-output",)}, "0 cells tagged 'setup'"),
    ({"setup_tags": ("setup",)}, "nbval-ignore-output"), ({"title": "02 · Wrong number"}, "# 01 · Title"),
    ({"title": "01 A dot is missing"}, "# 01 · Title")])
def test_a_notebook_that_does_not_fit_is_named_and_nothing_written(course, changes, message):
    notebook(course / "notebooks" / "01_linear.ipynb", **{"title": "01 · A linear layer", **changes})
    before = (course / "notebooks" / "00_start.ipynb").read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        links.main(course)
    assert "01_linear.ipynb" in str(error.value)
    assert (course / "notebooks" / "00_start.ipynb").read_bytes() == before


def test_the_real_pyproject_takes_an_address(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    links.set_repository(tmp_path, "ada/loras")
    assert links.repository(tmp_path) == "ada/loras"
    old, new = ((folder / "pyproject.toml").read_text(encoding="utf-8").splitlines() for folder in (ROOT, tmp_path))
    assert sum(a != b for a, b in zip(old, new, strict=True)) <= 1
