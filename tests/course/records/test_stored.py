"""Stored experiments are found by name; a tie is a tie only if every seed says so."""
import pytest

from lora_edu.course.records.stored import load_record, tie


@pytest.mark.parametrize("differences, verdict", [
    ([0.01, -0.02, 0.0], True), ([0.03, 0.05], False), ([-0.03, -0.05], False), ([0.01, 0.03], None),
    ([-0.03, 0.03], None), ([0.02], True),
])
def test_tie(differences, verdict):
    assert tie(differences, margin=0.02) is verdict


def test_a_record_that_is_not_there_names_those_that_are():
    assert load_record("bistro_adapter")["made"]["command"] == "python -m lora_edu.record bistro_adapter"
    with pytest.raises(FileNotFoundError, match="no record 'nonsense'.*bistro_adapter"):
        load_record("nonsense")
