"""The mixer's data and words; what the page makes of them is in tests/browser/test_labs.py."""
import pytest

from lora_edu.course.labs.adapter_mixer import adapter_mixer, key
from lora_edu.course.records.stored import load_record


def test_every_setting_of_the_record_is_in_the_page():
    mixer, record = adapter_mixer(), load_record("adapter_mixer")
    assert mixer.data["names"] == ["bistro", "herald", "apothecary"] and len(mixer.data["points"]) == 125
    for run in record["runs"]:
        point = mixer.data["points"][key(run["weights"])]
        assert point["text"] == run["text"] and point["losses"] == [run[name] for name in mixer.data["losses"]]
    assert mixer.state == {"bistro": 1.0, "herald": 0.0, "apothecary": 0.0}


def test_the_stored_cell_says_the_nearest_setting_in_words_and_a_picture():
    shown, _ = adapter_mixer(weights=(0.3, 0.2, 0.9))._repr_mimebundle_()
    assert shown["text/plain"].startswith("bistro 0.25, herald 0.25, apothecary 1; losses in nats per token: bistro ")
    assert "Once upon a time there was a king who" in shown["text/plain"]
    assert '<img alt="Losses of the mixture, and of fable alone"' in shown["text/html"]


def test_one_weight_for_each():
    with pytest.raises(ValueError, match="give one for each of bistro, herald, apothecary"):
        adapter_mixer(weights=(1, 0))
