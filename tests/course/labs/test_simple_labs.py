"""Widgets: moving a control changes the picture and the text; an error in a callback is seen."""
import ast
import re
import time
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
from torch import nn

from lora_edu.course.labs.alpha_dial import alpha_dial
from lora_edu.course.labs.rank_picture import rank_picture
from lora_edu.course.labs.target_picker import target_picker
from lora_edu.course.page import widgets
from lora_edu.course.page.show import new_figure
from lora_edu.course.page.widgets import picture_with_controls
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.targets import PROJECTIONS

ALPHAS = np.linspace(0, 1, 21)
TASK, TALES = 4.4 - 4 * ALPHAS, 3.6 + 1.5 * ALPHAS
TEXTS = [f"text {i}" for i in range(21)]
PICTURE = np.add.outer(np.arange(20.0), np.arange(30.0)) + np.eye(20, 30)


def parts(box):
    """The controls by description, the image and the text of a widget."""
    row, image, text = box.children
    return {control.description: control for control in row.children}, image, text


def said(box) -> str:
    return re.sub("<[^>]*>", "", box.children[2].value)


def state(box):
    return bytes(box.children[1].value), box.children[2].value


class Layer(nn.Module):
    """One layer of a Llama-like model, grouped-query: d 8, two of four heads for keys and values, MLP 12."""

    def __init__(self):
        super().__init__()
        for name, out, into in (("q", 8, 8), ("k", 4, 8), ("v", 4, 8), ("o", 8, 8), ("gate", 12, 8), ("up", 12, 8),
                                ("down", 8, 12)):
            setattr(self, f"{name}_proj", nn.Linear(into, out, bias=False))


@pytest.fixture
def model():
    return nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "lm_head": nn.Linear(8, 50, bias=False)})


MOVES = {
    "alpha dial": (lambda model: alpha_dial(ALPHAS, TASK, TALES, TEXTS), "strength", [0.5, 0.0, 0.35]),
    "rank picture": (lambda model: rank_picture(PICTURE), "rank r", [1, 3, 2]),
    "target picker, rank": (lambda model: target_picker(model, rank=3), "rank r", [1, 4, 2]),
    "target picker, a tick": (target_picker, "up_proj", [True]),
}


@pytest.mark.parametrize("make, control, values", MOVES.values(), ids=MOVES)
def test_every_move_changes_the_picture_and_the_text(make, control, values, model):
    box = make(model)
    seen = [state(box)]
    for value in values:
        parts(box)[0][control].value = value
        seen.append(state(box))
    pictures, texts = zip(*seen)
    assert len(set(pictures)) == len(set(texts)) == len(values) + 1 and all(p[:4] == b"\x89PNG" for p in pictures)
    parts(box)[0][control].value = values[0]
    assert state(box) == seen[1], "going back must give the same picture and text"


def test_the_dial_reads_the_losses_and_the_text_of_its_setting():
    box = alpha_dial(ALPHAS, TASK, TALES, TEXTS, alpha=0.2)
    assert said(box) == "strength 0.20: new task 3.60, tales 3.90 nats per token\ntext 4"
    parts(box)[0]["strength"].value = 0.6
    assert said(box) == "strength 0.60: new task 2.00, tales 4.50 nats per token\ntext 12"


def test_the_dial_starts_at_the_end_and_has_the_range_and_step_given():
    dial = parts(alpha_dial([0, 0.5, 1, 1.5], [4, 3, 2, 1], [3, 4, 5, 6], TEXTS[:4]))[0]["strength"]
    assert (dial.value, dial.min, dial.max, dial.step) == (1.5, 0, 1.5, 0.5)


def test_texts_may_be_written_when_they_are_asked_for():
    asked = []

    def write(alpha):
        asked.append(alpha)
        return f"once upon <{alpha}>"
    box = alpha_dial(ALPHAS, TASK, TALES, write)
    parts(box)[0]["strength"].value = 0.5
    assert asked == [1.0, 0.5] and "once upon &lt;0.5&gt;" in box.children[2].value


@pytest.mark.parametrize("alphas, task, texts", [
    ([0, 1], [1, 2, 3], TEXTS[:2]), ([0, 1], [1, 2], TEXTS[:3]), ([0], [1], TEXTS[:1]),
    ([1, 0], [1, 2], TEXTS[:2]), ([0, 1, 3], [1, 2, 3], TEXTS[:3])])
def test_a_dial_whose_parts_do_not_fit_is_refused(alphas, task, texts):
    with pytest.raises(ValueError, match="give at least two evenly spaced rising alphas"):
        alpha_dial(alphas, task, [1.0] * len(alphas), texts)


def test_the_compressed_picture_counts_its_numbers_and_its_error():
    """Oracle: the best rank-r approximation misses exactly the singular values that were cut."""
    box = rank_picture(PICTURE, rank=2)
    sigma = np.linalg.svd(PICTURE, compute_uv=False)
    error = (sigma[2:] ** 2).sum() ** 0.5 / (sigma ** 2).sum() ** 0.5
    assert said(box).startswith(f"rank 2: 2 × (20 + 30) = 100 numbers in place of 600 (17%); error {error:.1%} of")
    slider = parts(box)[0]["rank r"]
    slider.value = 20
    assert slider.max == 20 and "error 0.0%" in said(box)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were turned into pictures, in order."""
    figures = []
    monkeypatch.setattr(widgets, "png", lambda fig: figures.append(fig) or b"")
    return figures


def test_the_picture_on_the_right_is_the_best_of_its_rank(drawn):
    """Oracle: what is missing is as large as the singular values that were cut."""
    parts(rank_picture(PICTURE, rank=5))[0]["rank r"].value = 2
    assert len(drawn) == 2 and drawn[0] is drawn[1], "the figure is built once"
    whole, part = (ax.images[0].get_array() for ax in drawn[1].axes)
    sigma = np.linalg.svd(PICTURE, compute_uv=False)
    assert np.allclose(whole, PICTURE) and np.linalg.matrix_rank(part) == 2
    assert np.linalg.norm(whole - part) == pytest.approx((sigma[2:] ** 2).sum() ** 0.5)
    assert drawn[1].axes[1].get_title() == "rank 2\n100 numbers"


def test_the_markers_of_the_dial_stand_at_its_setting(drawn):
    parts(alpha_dial(ALPHAS, TASK, TALES, TEXTS))[0]["strength"].value = 0.6
    line, markers = drawn[1].axes[0].lines[-2:]
    assert np.allclose(line.get_xdata(), 0.6) and np.allclose(markers.get_xdata(), 0.6)
    assert np.allclose(markers.get_ydata(), [2.0, 4.5])


def test_the_bars_of_the_picker_are_as_long_as_the_counts(drawn, model):
    parts(target_picker(model, rank=3))[0]["rank r"].value = 2
    assert [bar.get_width() for bar in drawn[1].axes[0].patches] == [2 * 2 * side
                                                                     for side in (16, 12, 12, 16, 20, 20, 20)]


def test_the_picker_counts_as_a_hand_does(model):
    """Oracle: two layers; at rank r a matrix (out, in) costs r (out + in)."""
    box = target_picker(model, rank=3)
    frozen = 2 * (2 * 64 + 2 * 32 + 3 * 96) + 400
    assert said(box) == (f"rank 3 on q_proj, v_proj: {2 * 3 * (16 + 12)} trainable numbers, {168 / (frozen + 168):.2%} "
                         f"of {frozen + 168:,}; the adapter is 672 bytes in float32")
    controls = parts(box)[0]
    for name in PROJECTIONS:
        controls[name].value = True
    assert f": {2 * 3 * (16 + 12 + 12 + 16 + 3 * 20)} trainable" in said(box)
    for name in PROJECTIONS:
        controls[name].value = False
    assert said(box).startswith("rank 3 on nothing: 0 trainable numbers, 0.00% of")
    assert controls["rank r"].max == 4, "the largest rank is the smallest side"


def test_the_pickers_count_is_the_library_s(model):
    """Oracle: wrap the model for real and count the parameters that train."""
    box = target_picker(model, rank=2, chosen=("k_proj", "down_proj"))
    apply_lora(model, target_modules=["k_proj", "down_proj"], rank=2, alpha=4)
    assert f": {sum(p.numel() for p in model.parameters() if p.requires_grad)} trainable" in said(box)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="target_picker found no nn.Linear named q_proj, .* in this Sequential: give"):
        target_picker(nn.Sequential(nn.Linear(2, 2)))


def test_an_error_in_the_callback_is_shown_and_the_next_move_works():
    fig, ax = new_figure(title="x")

    def update(level):
        if level == 2:
            raise RuntimeError("no <level> two")
        ax.set_ylim(0, level)
        return f"level {level}"
    box = picture_with_controls(fig, update, level=ipywidgets.IntSlider(value=1, min=1, max=3, description="level"))
    before = bytes(box.children[1].value)
    slider = parts(box)[0]["level"]
    slider.value = 2
    assert said(box) == ("This setting cannot be drawn: RuntimeError: no &lt;level&gt; two (The picture is of the "
                         "setting before.)")
    assert bytes(box.children[1].value) == before
    slider.value = 3
    assert said(box) == "level 3" and bytes(box.children[1].value) != before


def test_the_text_is_announced_to_a_screen_reader():
    assert 'role="status"' in alpha_dial(ALPHAS, TASK, TALES, TEXTS).children[2].value


@pytest.mark.parametrize("make",
                         [lambda model, more: alpha_dial(ALPHAS, TASK + more, TALES, lambda a: f"text {a + more}"),
                                  lambda model, more: rank_picture(PICTURE + more), lambda model,
                          more: target_picker(model)])
def test_the_text_form_that_is_stored_holds_nothing_measured(make, model):
    stored = [box._repr_mimebundle_()["text/plain"] for box in (make(model, 0), make(model, 0.1234))]
    assert stored[0] == stored[1] and "Slider" in stored[0]


def test_a_redraw_is_quick(model):
    """0.1 s is what a drag can bear. The processor's time, and the best of 20: a busy machine must not decide."""
    for make, control in ((lambda: alpha_dial(ALPHAS, TASK, TALES, TEXTS), "strength"),
                          (lambda: rank_picture(PICTURE), "rank r"),
                          (lambda: target_picker(model), "rank r")):
        box, times = make(), []
        slider = parts(box)[0][control]
        for i in range(20):
            before, start = box.children[2].value, time.process_time()
            slider.value = slider.min + slider.step * ((i + 1) % 4)
            times.append(time.process_time() - start)
            assert box.children[2].value != before
        assert min(times) < 0.1


def test_only_widgets_that_both_versions_share_are_used():
    """The names and keywords that differ in 7.7 fail silently there; this list is what was compared."""
    allowed = {"Checkbox": {"value", "description", "indent", "layout"},
               "FloatSlider": {"value", "min", "max", "step", "description"},
               "IntSlider": {"value", "min", "max", "description"}, "Image": {"format", "layout"}, "HTML": set(),
               "HBox": {"layout"}, "VBox": set(), "Layout": {"max_width", "width", "flex_flow"}}
    tree = ast.parse(Path(widgets.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("ipywidgets."):
            name = ast.unparse(node.func).split(".")[1]
            assert {keyword.arg for keyword in node.keywords} <= allowed[name], ast.unparse(node)
