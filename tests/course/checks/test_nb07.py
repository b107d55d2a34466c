"""Notebook 07's checkers: the four files are what they are called, and plans are judged by what they do."""
import json
from pathlib import Path

import pytest

from lora_edu import apply_lora, load_pretrained
from lora_edu.course.checks import nb07
from lora_edu.lora.factors import lora_layers

NOTEBOOK = Path(__file__).resolve().parents[3] / "notebooks" / "07_save_share_and_swap.ipynb"

CAUSES = {"right": (56, lambda loss: loss < 0.2), "wrong prefix": (0, lambda loss: loss > 4),
          "wrong layers": (56, lambda loss: loss > 4), "never trained": (56, lambda loss: loss > 4)}


def loader_of_the_notebook():
    """The cell that the reader sees."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    scope = {"lora_layers": lora_layers}
    exec(next("".join(cell["source"]) for cell in cells if "def load_what_fits" in "".join(cell["source"])), scope)
    return scope["load_what_fits"]


def test_the_four_files_do_what_their_causes_say():
    load_what_fits = loader_of_the_notebook()
    for name, tensors in nb07.mystery_files().items():
        placed, is_so = CAUSES[nb07.FILES[name]]
        model, _ = load_pretrained()
        apply_lora(model, rank=6, alpha=12)
        assert load_what_fits(model, tensors) == placed
        loss, size = nb07.loss_and_size(model)
        assert is_so(loss) and (size > 0) == (nb07.FILES[name] in ("right", "wrong layers"))


@pytest.mark.parametrize("answers, passed, words", [
    ({"A": "merge", "B": "stack", "C": "swap"}, True, "all within"),
    ({"a": "Merge ", " B": "STACK", "C": "'swap'"}, True, "all within"),
    ({"A": "stack", "B": "stack", "C": "swap"}, False, "A: 'stack' makes 56 products"),
    ({"A": "swap", "B": "stack", "C": "swap"}, False, "A: 'swap' makes 27.6 MB"),
    ({"A": "merge", "B": "merge", "C": "swap"}, False, "B: 'merge' makes 10 passes"),
    ({"A": "merge", "B": "swap", "C": "swap"}, False, "B: 'swap' makes 10 passes"),
    ({"A": "merge", "B": "stack", "C": "merge"}, False, "C: 'merge' makes 148 MB"),
    ({"A": "merge", "B": "stack", "C": "stack"}, False, "C: 'stack' makes 56 products"),
    ({"A": "merge", "B": "stack"}, False, "C: no plan yet"),
    ({"A": "pray", "B": "stack", "C": "swap"}, False, "'pray' is not one of the plans"),
    ("merge", False, "give a dict"), ([1], False, "give a dict"), ({}, None, "not attempted"),
    (None, None, "not attempted"), ({"A": None, "B": None, "C": None}, None, "not attempted")])
def test_a_plan_is_judged_by_what_it_does(answers, passed, words, capsys):
    assert nb07.check_plans(answers).passed is passed
    assert words in capsys.readouterr().out
