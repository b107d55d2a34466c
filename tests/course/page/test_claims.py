"""Claims: each verdict both ways, the ledger, and the article's rows against the notebooks that answer them."""
import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_edu.course.page import claims
from lora_edu.course.page.claims import ClaimError, article_ledger, article_rows, claim, ledger

ROOT = Path(__file__).parents[3]
NOTEBOOKS = ROOT / "notebooks"
ARTICLE = ROOT.parent / "shared" / "article-claims.md"


@pytest.fixture(autouse=True)
def fresh_ledger(monkeypatch):
    monkeypatch.setattr(claims, "_rows", {})


@pytest.mark.parametrize("holds", [True, False, None])
@pytest.mark.parametrize("expected", ["holds", "differs here", "undecided"])
def test_only_the_expected_verdict_passes(holds, expected, capsys):
    verdict = {True: "holds", False: "differs here", None: "undecided"}[holds]
    if verdict == expected:
        claim("Water is wet.", holds, expected, why="it is")
        assert capsys.readouterr().out.strip() in {
            "✓ holds: Water is wet. (it is)", "≠ differs here: Water is wet. (it is)", "? undecided: Water is wet. (it "
                                                                                       "is)"}
    else:
        with pytest.raises(ClaimError, match=f"says '{expected}', the measurement says '{verdict}': Water is wet"):
            claim("Water is wet.", holds, expected)
        assert capsys.readouterr().out == ""
    assert ledger().rows == [("Water is wet.", "this course", verdict)]


def test_a_claim_error_is_an_assertion_error():
    assert issubclass(ClaimError, AssertionError)


@pytest.mark.parametrize("yes, no", [(np.float64(1) < 2, np.float64(3) < 2), (np.array([True]), np.array([False])),
                                     (torch.tensor(1.0) < 2, torch.tensor([3.0]) < 2)])
def test_comparisons_of_arrays_and_tensors_are_truth_values(yes, no):
    claim("One is less than two.", yes)
    claim("Three is less than two.", no, expected="differs here")


@pytest.mark.parametrize("holds",
                         [0.93, 1, "yes", torch.tensor([True, True]), np.array([True, False]), torch.tensor(1.0), []])
def test_what_is_not_a_truth_value_is_refused(holds):
    with pytest.raises(ValueError, match=f"holds is a {type(holds).__name__} .*give True, False or None"):
        claim("x", holds)
    assert ledger().rows == []


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="expected='true' is not a verdict: choose one of 'holds'"):
        claim("x", True, expected="true")


def test_an_unknown_article_row_is_refused_and_near_names_are_listed():
    with pytest.raises(ValueError, match="article='count-265' is not a row.*count-256"):
        claim("x", True, article="count-265")


def test_running_a_cell_again_replaces_its_row_and_keeps_the_order():
    claim("first", True, source="Hu et al. 2021")
    claim("second", True, article="count-256")
    with pytest.raises(ClaimError):
        claim("first", False, source="Hu et al. 2021")
    claim("third", True)
    assert ledger().rows == [("second", "the article, count-256", "holds"),
                             ("first", "Hu et al. 2021", "differs here"), ("third", "this course", "holds")]


def test_the_ledger_displays_as_text_and_as_escaped_html():
    claim("a < b", True)
    assert repr(ledger()) == ("claim  source       verdict\na < b  this course  holds")
    assert "a &lt; b</td>" in ledger()._repr_html_() and ledger()._repr_html_().count("<tr>") == 2


def test_every_article_row_is_complete_and_the_table_shows_all_of_them():
    rows = article_rows()
    assert len({row["id"] for row in rows}) == len(rows) == len(article_ledger().rows)
    for row in rows:
        assert set(row) == {"id", "claim", "notebook", "verdict", "how"} and all(row.values()), row
        assert row["verdict"] in claims.MARKS or row["verdict"] == f"pending: {row['notebook']}", row
    assert rows[0]["claim"] in repr(article_ledger())


def expand(name: str) -> list[str]:
    """The ids of one row of the list of sentences: "vram-7b, -13b full" is vram-7b-full and vram-13b-full."""
    words = name.split(" ")
    stems, ending = [word.strip(",") for word in words if word.startswith(("vram", "-"))], words[-1]
    if len(words) == 1:
        return [name]
    return [(stem if stem.startswith("vram") else "vram" + stem) + "-" + ending for stem in stems]


@pytest.mark.skipif(not ARTICLE.exists(), reason="the list of sentences, ../shared/article-claims.md, is not here")
def test_every_sentence_of_the_article_has_a_row():
    names = re.findall(r"^\| ([a-z][^|]*?) \|", ARTICLE.read_text(encoding="utf-8"), re.MULTILINE)
    wanted = {each for name in names if name != "id" for each in expand(name)}
    assert len(wanted) == 23 and wanted <= {row["id"] for row in article_rows()}


def answers(notebook: Path) -> dict[str, str]:
    """What a notebook claims about the article: {article id: expected verdict}, read from its stored source."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "article=" not in source:
            continue
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if "article" in given:
                expected = given.get("expected") or (call.args[2] if len(call.args) > 2 else None)
                found[ast.literal_eval(given["article"])] = ast.literal_eval(expected) if expected else "holds"
    return found


def test_answers_reads_keywords_positions_and_the_default(tmp_path):
    cells = ['claim("a", x < 1, article="one")',
             'claim("b", y, "differs here", article="two")\nclaim("c", None, expected="undecided", article="three")']
    path = tmp_path / "nb.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]} for source in cells]}))
    assert answers(path) == {"one": "holds", "two": "differs here", "three": "undecided"}


@pytest.mark.parametrize("row", article_rows(), ids=lambda row: row["id"])
def test_the_notebook_named_answers_the_row_with_the_stored_verdict(row):
    """Oracle: the notebook's own claim, which raises there when the measurement disagrees."""
    notebook = NOTEBOOKS / f"{row['notebook']}.ipynb"
    if row["verdict"].startswith("pending"):
        assert not notebook.exists(), (
            f"{notebook.name} is written: it must claim article={row['id']!r}, and the row needs its verdict"
        )
    else:
        assert notebook.exists(), f"{notebook.name} is not written, so the row cannot have a verdict yet"
        assert answers(notebook).get(row["id"]) == row["verdict"]


def test_no_notebook_claims_a_row_against_the_stored_verdict():
    stored = {row["id"]: row["verdict"] for row in article_rows()}
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        for name, verdict in answers(notebook).items():
            assert stored.get(name) == verdict, (
                f"{notebook.name} says {verdict!r} about {name!r}, article.json {stored.get(name)!r}"
            )
