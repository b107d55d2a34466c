"""For a reader a claim that comes out otherwise is a line with its numbers; the tests' switch makes it an error."""
import linecache

import pytest
import torch

from lora_edu.course.page import claims
from lora_edu.course.page.claims import ClaimError, claim


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(claims, "_rows", {})


def cell(source, **names):
    """Run a cell as a notebook does: its source is in linecache."""
    name = "<cell of the test>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), {"claim": claim, "torch": torch, **names})


def test_the_tests_switch_raises_and_a_readers_run_goes_on(monkeypatch, capsys):
    with pytest.raises(ClaimError):
        cell('claim("It is small", 5 < 2)')
    for value in (None, "", "soft"):
        monkeypatch.delenv("LORA_EDU_CLAIMS") if value is None else monkeypatch.setenv("LORA_EDU_CLAIMS", value)
        cell('claim("It is small", 5 < 2)')
        assert capsys.readouterr().out.startswith("✗ here 'differs here', in the course 'holds': It is small\n")
        monkeypatch.setenv("LORA_EDU_CLAIMS", "raise")


@pytest.mark.parametrize("source, said", [
    ('claim("x", after < 0.2 * before)', "after = 1.9, 0.2 * before = 0.83"),
    ('claim("x",\n      holds=losses[-1] > losses[0] + 0.3,\n      why="y")', "losses[-1] = 2, losses[0] + 0.3 = 3.3"),
    ('claim("x", tensor < 1 and after < 1)', "tensor = 2.5, 1\n    measured: after = 1.9, 1"),
    ('claim("x", 1 < after < 1.5)', "1, after = 1.9, 1.5"),
    ('claim("x", max(losses) < abs(-1))', "max(losses) = 3, abs(-1) = 1"),
    ('one = 1\nclaim("other", True)\nclaim("x", one > 2)', "one = 1, 2")])
def test_both_sides_of_what_was_compared(source, said, monkeypatch, capsys):
    monkeypatch.delenv("LORA_EDU_CLAIMS")
    cell(source, after=1.9, before=4.15, losses=[3.0, 2.0], tensor=torch.tensor(2.5))
    assert f"    measured: {said}\n    Your run differs" in capsys.readouterr().out


@pytest.mark.parametrize("source", [
    'claim("x", costly() < 1)', 'claim("x", all(a < b for a, b in [(2, 1)]))', 'claim("x", "a" == "b")',
    'claim("x", False)', 'claim(holds=[1] == [2], sentence="x")', 'f = claim\nf("x", 1 > 2)'])
def test_what_has_no_number_or_costs_is_left_out(source, monkeypatch, capsys):
    monkeypatch.delenv("LORA_EDU_CLAIMS")
    calls = []
    cell(source, costly=lambda: calls.append(1) or 5)
    assert "measured:" not in capsys.readouterr().out and len(calls) <= 1


def test_the_ledger_keeps_the_verdict_of_this_run(monkeypatch):
    monkeypatch.delenv("LORA_EDU_CLAIMS")
    claim("x", False)
    assert claims.ledger().rows == [("x", "this course", "differs here")]
