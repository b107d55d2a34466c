"""The course in two files, and the README's lines for Colab, word by word.

What stands in for Colab: a `google.colab` whose Drive is a folder here, Colab's variable, a working folder that is not
the notebook's, and an environment without the library. (`python dev.py colab` runs all notebooks from the bundle, with
Colab's package versions.)
"""
import re
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from tests.notebooks.test_source_install import WHERE, bare, execute  # noqa: F401
from tools import bundle, links

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COLAB = '''
class drive:
    @staticmethod
    def mount(place):
        from pathlib import Path
        print("mounted", place)
        Path(place).symlink_to("{drive}") if not Path(place).exists() else None
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What `python dev.py bundle` writes."""
    out = tmp_path_factory.mktemp("dist")
    (out / "lora_edu-0.0.1-py3-none-any.whl").touch()       # of an earlier version
    assert bundle.main(str(out)) == 0
    return out


def test_the_bundle_is_two_small_files(files):
    names = sorted(path.name for path in files.iterdir())
    assert names == ["lora_edu-0.1.0-py3-none-any.whl", bundle.NOTEBOOKS]
    assert sum(path.stat().st_size for path in files.iterdir()) < 12e6
    assert any(name.endswith("fable/model.safetensors") for name in zipfile.ZipFile(files / names[0]).namelist())


def test_the_links_of_the_notebooks_work_in_the_zip(files, tmp_path):
    with zipfile.ZipFile(files / bundle.NOTEBOOKS) as zipped:
        zipped.extractall(tmp_path)
    books = sorted(path.name for path in (tmp_path / "notebooks").iterdir())
    assert books == sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for path in (tmp_path / "notebooks").iterdir():
        header = nbformat.read(path, as_version=4).cells[0].source.split("\n")[2]
        targets = [target for target in re.findall(r"\]\(([^)]+)\)", header) if "://" not in target]
        assert targets and [target for target in targets if not (path.parent / target).exists()] == []


@pytest.fixture
def colab(bare, files, tmp_path, monkeypatch):  # noqa: F811
    """Colab with both files in Drive's lora_edu; returns (run(notebook) -> last output, the place of /content)."""
    content, drive, site = tmp_path / "content", tmp_path / "Drive", tmp_path / "site"
    (drive / "MyDrive" / "lora_edu").mkdir(parents=True)
    content.mkdir()
    (site / "google").mkdir(parents=True)
    (site / "google" / "colab.py").write_text(COLAB.format(drive=drive), encoding="utf-8")
    for file in files.iterdir():
        (drive / "MyDrive" / "lora_edu" / file.name).write_bytes(file.read_bytes())
    others = next(bare.parents[1].glob("lib/*/site-packages")) if (bare.parents[1] / "lib").exists() else None
    (others / "colab.pth").write_text(f"{site}\n", encoding="utf-8")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external-20261101")

    def run(notebook):
        for cell in notebook.cells:
            cell.source = cell.source.replace("/content", str(content))
        return execute(notebook, bare, content, None, monkeypatch)
    return run, drive


def test_the_readmes_lines_word_by_word(colab):
    run, drive = colab
    block = re.search(r"```python\n(   import shutil.*?)   ```", README, re.DOTALL)[1]
    run(new_notebook(cells=[new_code_cell(re.sub(r"^   ", "", block, flags=re.MULTILINE))]))
    course = drive / "MyDrive" / "lora_edu" / "notebooks"
    assert "lora_edu/notebooks" in README and "python3 dev.py bundle" in README and len(list(course.iterdir())) >= 7
    notebook = nbformat.read(next(course.glob("01_*.ipynb")), as_version=4)
    notebook.cells.append(new_code_cell(WHERE))
    (text,) = run(notebook)
    where, prefix = map(Path, text.split("\n")[:2])
    assert where.is_relative_to(prefix) and "site-packages" in where.parts
    no_address = links.repository(ROOT).startswith(f"{links.NOT_SET}/")         # else Drive is not asked for
    assert ("mounted" in str(notebook.cells[1].outputs)) == no_address


def test_a_wheel_beside_the_notebook_needs_no_drive(colab, files, tmp_path):
    run, _ = colab
    wheel = next(files.glob("*.whl"))
    (tmp_path / "content" / wheel.name).write_bytes(wheel.read_bytes())
    notebook = new_notebook(cells=[new_code_cell(links.setup_source("OWNER/lora_edu")), new_code_cell(WHERE)])
    (text,) = run(notebook)
    assert "site-packages" in text and "mounted" not in str(notebook.cells[0].outputs)


def test_with_an_address_a_wheel_comes_before_it(colab, files, tmp_path):
    run, _ = colab
    wheel = next(files.glob("*.whl"))
    (tmp_path / "content" / wheel.name).write_bytes(wheel.read_bytes())
    (text,) = run(new_notebook(cells=[new_code_cell(links.setup_source("no-such-owner/x")), new_code_cell(WHERE)]))
    assert "site-packages" in text


def test_an_empty_drive_is_said(colab):
    run, drive = colab
    for file in (drive / "MyDrive" / "lora_edu").glob("*.whl"):
        file.unlink()
    with pytest.raises(CellExecutionError, match="no wheel of it beside the notebook: the README's 'In Colab'"):
        run(new_notebook(cells=[new_code_cell(links.setup_source("OWNER/lora_edu"))]))
    assert "## In Colab\n" in README


def test_a_fork_gets_its_address_at_its_first_push():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "address.yml").read_text(encoding="utf-8"))
    steps = " && ".join(step.get("run", "") for step in workflow["jobs"]["address"]["steps"])
    assert 'python dev.py links --repo "$GITHUB_REPOSITORY"' in steps and "git push" in steps
    assert workflow["permissions"] == {"contents": "write"} and workflow[True]["push"]["branches"] == [links.BRANCH]
