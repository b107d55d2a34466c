"""The public API: what it is, that every name of it is documented, and that every example in a docstring runs."""
import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from torch import nn

import lora_edu
import lora_edu.course

MODULES = sorted(module.name for module in pkgutil.walk_packages(lora_edu.__path__, "lora_edu."))
NAMES = {name: getattr(lora_edu, name) for name in lora_edu.__all__}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    torch.manual_seed(0)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed


def example_of(thing) -> str:
    return inspect.getdoc(thing) or ""


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_with_an_example(name):
    thing = NAMES[name]
    assert ">>> " in example_of(thing), "one doctest"
    if not inspect.isclass(thing):
        assert re.search(r"[Rr]aises", example_of(thing)), "what it raises"
        assert "return" in thing.__annotations__, "what it returns"


def test_the_lists_are_sorted_and_hold_what_is_there():
    for module in (lora_edu, lora_edu.course):
        assert module.__all__ == sorted(module.__all__) and len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
    assert not set(lora_edu.__all__) & set(lora_edu.course.__all__), "one home for a name"


@pytest.mark.parametrize("use",
                         [lambda m: m(torch.zeros(1, 3)), lambda m: m.parameters(), lambda m: m.train(),
                          lambda m: m.generate(1),
                                 lambda m: m.to("cpu"), lambda m: m.state_dict()])
def test_the_report_says_that_it_is_not_the_model(use):
    """PEFT's reflex: `model = apply_lora(model)`."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    report = lora_edu.apply_lora(model, ["0"], rank=1)
    with pytest.raises((TypeError, AttributeError), match="not the model, which was changed in place and is still the "
                                                          "one"):
        use(report)
    assert not hasattr(report, "parameters") and hasattr(model[0], "lora_A")


def test_a_report_is_still_an_ordinary_object():
    import copy
    import pickle
    report = lora_edu.apply_lora(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ["0"], rank=1)
    assert copy.deepcopy(report) == report == pickle.loads(pickle.dumps(report))
    with pytest.raises(AttributeError, match="a LoRAReport has no 'colour'"):
        report.colour
