"""The voice: what is written at a strength is what the model writes at that strength, and merging keeps it."""
import re

import pytest
import torch

from lora_edu import evaluate, load_adapter, load_pretrained, set_strength
from lora_edu.course.labs import voice as lab
from lora_edu.course.labs.voice import LOUDEST, ROOM, Line, colour, voice
from lora_edu.models.pretrained import BISTRO_ADAPTER
from lora_edu.training import bistro

PROMPT = "Once upon a time there was a king who"


@pytest.fixture
def adapted():
    model, tokenizer = load_pretrained()
    load_adapter(model, BISTRO_ADAPTER)
    return model, tokenizer


def parts(box):
    (slider, _), page, (on, again, merge), own, note = (
        child.children if hasattr(child, "children") else child for child in box.children)
    return slider, page, on, again, merge, own, note


def words(page):
    """The page's text and the strengths it was written at."""
    text = re.sub(r"<[^>]+>", "", page.value)
    return text, re.findall(r'title="(?:strength )?([\w.]+)"', page.value)


def test_each_piece_is_what_the_model_says_at_that_strength(adapted):
    model, tokenizer = adapted
    line = Line(model, tokenizer, PROMPT)
    for strength in (0.0, 1.0):
        set_strength(model, strength)
        ids = model.generate(line.ids, 14, temperature=0.6, top_k=20, seed=1 + line.ids.shape[1], stop_token=0)
        line.write(strength)
        assert torch.equal(line.ids, ids) and line.pieces[-1][1] == strength
    assert "".join(text for text, _ in line.pieces) == tokenizer.decode(line.ids[0].tolist())


def test_a_line_ends_at_the_end_token_and_at_its_room(adapted, monkeypatch):
    model, tokenizer = adapted
    line = Line(model, tokenizer, PROMPT)
    while not line.ended:                       # a waiter comes to the point
        line.write(1.0)
    written = list(line.pieces)
    line.write(1.0)
    assert line.pieces == written and line.html().endswith("∎</div>") and line.ids.shape[1] < ROOM
    monkeypatch.setattr(lab, "ROOM", 20)
    set_strength(model, 0.0)
    long = Line(model, tokenizer, PROMPT)
    long.write(0.0, tokens=1000)
    assert long.ended and long.ids.shape[1] == 20


def test_the_slider_writes_on_and_words_keep_their_strength(adapted):
    model, tokenizer = adapted
    box = voice(model, tokenizer, PROMPT, size="241 kB")
    slider, page, on, again, _, own, _ = parts(box)
    first, strengths = words(page)
    assert first.startswith(PROMPT) and strengths == ["prompt", "0.0"]
    slider.value = 0.6
    on.click()
    text, strengths = words(page)
    assert text.startswith(first.rstrip(" …")) and strengths == ["prompt", "0.0", "0.6", "0.6"]
    again.click()
    assert words(page)[1] == ["prompt", "0.6"]
    own.value = "<b>The fox</b>"
    assert words(page)[0].startswith("&lt;b&gt;The fox&lt;/b&gt;") and slider.max == LOUDEST
    own.value = "once " * 300
    assert re.search(r"A prompt of 30\d tokens: shorten it to under 260", words(page)[0])
    own.value = "  "
    assert words(page)[0].startswith(PROMPT)


def test_merged_the_slider_goes_and_the_voice_stays(adapted):
    model, tokenizer = adapted
    heldout = bistro.heldout(tokenizer, 2)
    slider, page, on, again, merge, _, note = parts(voice(model, tokenizer, PROMPT, start=1.0))
    before, loss = words(page)[0], evaluate(model, heldout)
    merge.value = True
    assert slider.disabled and "nothing left to turn" in note.value and merge.description == "unmerge"
    assert evaluate(model, heldout) == pytest.approx(loss, abs=1e-4)
    again.click()
    assert words(page)[0] == before
    merge.value = False
    assert not slider.disabled and "to the bit" in note.value
    slider.value = 0.0
    assert words(page)[1][-1] == "0.0"


@pytest.mark.parametrize("strength, found", [(0.0, "#0072b2"), (1.0, "#b34a00"), (1.2, "#b34a00"), (0.5, "#5a5e59")])
def test_colours_go_from_one_to_the_other_and_are_dark_on_white(strength, found):
    assert colour(strength) == found
    linear = [(c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055)**2.4)
              for c in (int(found[i:i + 2], 16) / 255 for i in (1, 3, 5))]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    assert 1.05 / (luminance + 0.05) > 4.5          # WCAG AA
