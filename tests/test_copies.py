"""The reader's copies: theirs is never written over, what they did not change follows the course."""
import json
from pathlib import Path

import pytest

from tools import copies


def book(path, *sources, outputs=()):
    cells = [{"cell_type": "code", "source": [source], "outputs": list(outputs)} for source in sources]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")


def text(path):
    return "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.fixture
def course(tmp_path):
    for folder in ("notebooks", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("contents", encoding="utf-8")
    (tmp_path / "docs" / "dial.png").write_bytes(b"png")
    book(tmp_path / "notebooks" / "00_a.ipynb", "one")
    book(tmp_path / "notebooks" / "01_b.ipynb", "two")
    assert copies.renew(tmp_path) == []
    return tmp_path


@pytest.fixture
def mine(course):
    return course / copies.FOLDER / "notebooks"


def test_the_copies_are_there_with_what_their_links_lead_to(course, mine):
    assert [path.name for path in sorted(mine.iterdir())] == ["00_a.ipynb", "01_b.ipynb"]
    assert (mine / "../README.md").read_text() == "contents" and (mine / "../docs/dial.png").read_bytes() == b"png"


def test_a_copy_that_was_run_and_not_changed_follows_the_course(course, mine):
    book(mine / "00_a.ipynb", "one", outputs=[{"text": "run"}])
    assert copies.renew(course) == [] and "run" in (mine / "00_a.ipynb").read_text()     # nothing new: left alone
    book(course / "notebooks" / "00_a.ipynb", "one, better")
    assert copies.renew(course) == [] and text(mine / "00_a.ipynb") == "one, better"


def test_a_changed_copy_is_kept_and_named_when_the_course_moves_on(course, mine):
    book(mine / "00_a.ipynb", "mine")
    assert copies.renew(course) == [] and text(mine / "00_a.ipynb") == "mine"
    book(course / "notebooks" / "00_a.ipynb", "one, better")
    for _ in range(2):
        (said,) = copies.renew(course)
        assert said.startswith("your 00_a.ipynb is kept; the course has a newer one: --fresh")
    assert text(mine / "00_a.ipynb") == "mine"


def test_fresh_makes_all_again_and_keeps_what_was_changed_beside_it(course, mine):
    for number in (1, 2):
        book(mine / "00_a.ipynb", f"mine {number}")
        assert copies.renew(course, fresh=True) == [f"your 00_a.ipynb is kept as 00_a.yours-{number}.ipynb."]
    assert text(mine / "00_a.ipynb") == "one" and text(mine / "01_b.ipynb") == "two"
    assert [text(mine / f"00_a.yours-{number}.ipynb") for number in (1, 2)] == ["mine 1", "mine 2"]
    assert copies.renew(course) == []


@pytest.mark.parametrize("broken", [b"", b"{", b'{"cells": 3}', b'[1]', b"\xff\xfe"])
def test_a_broken_copy_or_note_harms_nobody(broken, course, mine):
    (mine / "00_a.ipynb").write_bytes(broken)
    assert copies.renew(course) == [] and (mine / "00_a.ipynb").read_bytes() == broken      # an edit under way
    (mine.parent / copies.NOTE).write_bytes(broken)
    copies.renew(course)
    assert (mine / "00_a.ipynb").read_bytes() == broken and text(mine / "01_b.ipynb") == "two"


def test_a_lost_copy_comes_back(course, mine):
    (mine / "01_b.ipynb").unlink()
    copies.renew(course)
    assert text(mine / "01_b.ipynb") == "two"


def test_below_a_question_stands_no_stored_answer(course, mine):
    said = [{"output_type": "stream", "name": "stdout", "text": ["0.19"]}]
    book(course / "notebooks" / "02_c.ipynb", "import x", "bet = guess(None, 'how much?')", "measure()", "show(it)",
         "bet.reveal(0.19)", "claim('so it is', True)", "other = guess(None, 'which?')", outputs=said)
    copies.renew(course)
    cells = json.loads((mine / "02_c.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [bool(cell["outputs"]) for cell in cells] == [True, True, False, False, False, True, True]
    assert copies.renew(course) == [], "it is nobody's change"


def test_every_question_of_the_course_is_answered_in_its_notebook_and_not_in_its_copy():
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        before, after = (json.loads(each)["cells"] for each in (text, copies.without_answers(text)))
        emptied = sum(bool(cell.get("outputs")) for cell in before) - sum(bool(cell.get("outputs")) for cell in after)
        assert emptied >= text.count("guess(None") and [c["source"] for c in before] == [c["source"] for c in after]
