"""Say a sentence, check it, and keep the verdict.

``claim(...)`` prints one line that never holds a measured digit, so a stored notebook output stays the same on
another machine. A verdict other than the expected one raises where LORA_EDU_CLAIMS=raise (the tests set it), so that a
claim which stops being true stops the notebook; for a reader it is a line that says what was measured, and goes on.
``ledger()`` shows the claims of this notebook, ``article_ledger()`` the sentences of the article the course answers.
"""
import json
import os
import sys
from difflib import get_close_matches
from importlib.resources import files

from lora_edu.course.page.measured import compared
from lora_edu.tables import Table, printable

VERDICTS = {True: "holds", False: "differs here", None: "undecided"}
MARKS = {"holds": "✓", "differs here": "≠", "undecided": "?"}
_rows: dict[str, tuple[str, str, str]] = {}   # sentence -> its row; a cell run twice replaces its own row


class ClaimError(AssertionError):
    """A claim came out differently from what the notebook says."""


def claim(sentence: str, holds: bool | None, expected: str = "holds", why: str | None = None,
          source: str | None = None, article: str | None = None) -> None:
    """Check a sentence, print its verdict and put it into the ledger.

    Args:
        sentence: what is claimed, in words; no measured digits (the cell above prints those where it may).
        holds: what came out: True, False, or None when the measurement cannot decide.
        expected: "holds", "differs here" (a published result that does not come out on this model) or "undecided".
        why: a fixed explanation, printed after the verdict.
        source: where the sentence comes from, for example "Hu et al. 2021, section 4.2".
        article: id of the row of ``article.json`` that this claim answers.

    Raises:
        ClaimError: if the verdict is not the expected one and LORA_EDU_CLAIMS is "raise".
        ValueError: if ``expected`` or ``article`` is unknown, or ``holds`` is not a truth value.
    """
    if expected not in MARKS:
        raise ValueError(f"expected={expected!r} is not a verdict: choose one of {', '.join(map(repr, MARKS))}.")
    if article is not None:
        _require_article_row(article)
    verdict = VERDICTS[_truth(holds)]
    _rows[sentence] = (sentence, source or (f"the article, {article}" if article else "this course"), verdict)
    if verdict != expected:
        if os.environ.get("LORA_EDU_CLAIMS") == "raise":
            raise ClaimError(f"the notebook says {expected!r}, the measurement says {verdict!r}: {sentence}")
        print(printable(_otherwise(sentence, verdict, expected, compared(sys._getframe(1)))))
        return
    print(printable(f"{MARKS[verdict]} {verdict}: {sentence}" + (f" ({why})" if why else "")))


def _otherwise(sentence: str, verdict: str, expected: str, found: list[str]) -> str:
    """What a reader is told whose run says something else than the course's."""
    return "\n".join([f"✗ here {verdict!r}, in the course {expected!r}: {sentence}",
                      *(f"    measured: {each}" for each in found),
                      "    Your run differs: a training stopped early, another seed, number or device, cells in "
                      "another order. From a fresh start it comes out."])


def _truth(holds) -> bool | None:
    """A truth value as a bool or None; comparisons of numpy numbers and of one-element tensors count as one."""
    count = holds.numel() if hasattr(holds, "numel") else getattr(holds, "size", 0)   # tensors, then numpy
    value = holds.item() if count == 1 else holds
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"holds is a {type(holds).__name__} ({str(holds)[:40]}), not one truth value: give True, False or "
                     "None (undecided), for example holds=loss < 3.5.")


def _require_article_row(name: str) -> None:
    ids = [row["id"] for row in article_rows()]
    if name not in ids:
        near = get_close_matches(name, ids, n=3)
        raise ValueError(f"article={name!r} is not a row of article.json; " + (f"near: {', '.join(near)}." if near
                         else f"its ids are {', '.join(ids)}."))


def article_rows() -> list[dict[str, str]]:
    """The rows of ``article.json``: id, claim, notebook, verdict, how (formula or measurement)."""
    return json.loads(files("lora_edu.course.page").joinpath("article.json").read_text(encoding="utf-8"))


def ledger() -> Table:
    """The claims made so far in this notebook, in the order they were first made; what the article says comes first."""
    return Table(("claim", "source", "verdict"),
                 sorted(_rows.values(), key=lambda row: not row[1].startswith("the article, ")))


def article_ledger() -> Table:
    """What the article says, and what the course finds: one row a sentence, unwritten notebooks as "pending"."""
    keys = ("claim", "notebook", "verdict", "how")
    return Table(("the article says", *keys[1:]), [tuple(row[key] for key in keys) for row in article_rows()])
