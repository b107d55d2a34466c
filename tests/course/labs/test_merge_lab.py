"""The merge lab: every number against arithmetic done by hand in numpy, every control moves, and the model stays as
it is.
"""
import ast
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lora_edu.course.labs import merge_lab as lab
from lora_edu.course.page import widgets
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.merge import merge_lora, remove_lora, set_strength
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.training.loop import evaluate

pytestmark = pytest.mark.slow

NAME = "model.layers.0.self_attn.q_proj"       # 64 x 64: larger than the corner
SMALL = "model.layers.0.self_attn.k_proj"      # 32 x 64: fewer rows than the corner
IDS = torch.arange(48).view(2, 24) % 30
TASK, TALES = (IDS, IDS.roll(-1, 1)), (IDS.flip(1), IDS.flip(1).roll(-1, 1))


def adapted():
    """A tiny Llama with LoRA that says something; the update is about half of its matrix, as the shipped adapter's
    is.
    """
    torch.manual_seed(0)
    model = Llama(LlamaConfig(30, 64, 72, 1, 2, 1, 32)).eval()
    for parameter in model.parameters():
        # a new model says nearly nothing, whatever its weights
        parameter.data *= 5 if parameter.ndim == 2 else 1
    apply_lora(model, ["q_proj", "k_proj", "down_proj"], rank=3, alpha=6)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.2)
        layer.weight.data = layer.weight.data.bfloat16().float()       # as fable's, which are stored in 16 bits
    return model


def in_bfloat16(x):
    """float32 rounded to 8 binary digits, to the nearest, ties to even: by hand on the bits."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


ROUND = {"float32": lambda x: np.asarray(x, np.float32), "bfloat16": in_bfloat16,
         "float16": lambda x: np.asarray(x, np.float32).astype(np.float16).astype(np.float32)}


def by_hand(model, name, dtype, strength):
    """(W₀, ΔW, merged) of one layer, as float64 arrays; the sum is made in float32 and rounded once."""
    layer = model.get_submodule(name)
    W, A, B = (ROUND[dtype](t.detach()) if t is layer.weight else t.detach().numpy()
               for t in (layer.weight, layer.lora_A, layer.lora_B))
    delta = (strength * layer.alpha / layer.rank * (B.astype(float) @ A.astype(float))).astype(np.float32)
    return tuple(np.asarray(t, float) for t in (W, delta, ROUND[dtype](W + delta)))


def error_by_hand(*case):
    W, delta, merged = by_hand(*case)
    return np.linalg.norm(merged - W - delta) / np.linalg.norm(delta)


def losses_by_hand(model, dtype, strength):
    """A plain model with the merged weights written in, in float32."""
    plain = copy.deepcopy(model)
    remove_lora(plain, merge=False)
    for name, _ in lora_layers(model):
        plain.get_submodule(name).weight.data = torch.tensor(by_hand(model, name, dtype, strength)[2],
                                                             dtype=torch.float32)
    return [evaluate(plain, [batch]) for batch in (TASK, TALES)]


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture(scope="module")
def built(model):
    figures, png = [], widgets.png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widgets, "png", lambda fig: figures.append(fig) or png(fig))
        box = lab.merge_lab(model, NAME, TASK, TALES)
    box.figure = figures[0]        # a redraw changes this one
    return box


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures, which are most of what a redraw costs; the artists hold the same data."""
    monkeypatch.setattr(widgets, "png", lambda fig: b"")


@pytest.fixture
def box(built, undrawn):
    """The one lab, put back to where it started."""
    put(built, "bfloat16", 1.0, "1")
    return built


def controls(box):
    return {control.description: control for control in box.children[0].children}


def put(box, dtype, strength, scaled):
    for control, value in zip(controls(box).values(), (dtype, strength, scaled), strict=True):
        control.value = value


def said(box):
    return re.sub("<[^>]*>", "", box.children[2].value).replace("&#x27;", "'")


def state(box):
    return bytes(box.children[1].value), box.children[2].value


@pytest.mark.parametrize("control, values", [("dtype", ["float16", "float32"]), ("strength", [0.5, -1.0, 2.0]),
                                             ("scaled down", ["1/100", "1/3"])])
def test_every_move_changes_the_picture_and_the_text(built, control, values):
    box = built
    put(box, "bfloat16", 1.0, "1")
    controls(box)["strength"].value = 0.9
    controls(box)["strength"].value = 1.0      # a move, so that it is drawn for certain
    seen = [state(box)]
    for value in values:
        controls(box)[control].value = value
        seen.append(state(box))
    pictures, texts = zip(*seen)
    assert len(set(pictures)) == len(set(texts)) == len(values) + 1 and all(p[:4] == b"\x89PNG" for p in pictures)
    assert not any("cannot be drawn" in text for text in texts)
    controls(box)[control].value = values[0]
    assert state(box) == seen[1], "going back must give the same picture and text"


def test_the_controls_offer_what_they_should(model, undrawn):
    dtype, strength, scaled = (found := controls(lab.merge_lab(model, SMALL, TASK, TALES))).values()
    assert list(found) == ["dtype", "strength", "scaled down"]
    assert list(dtype.options) == ["float32", "bfloat16", "float16"]
    assert (dtype.value, scaled.value) == ("bfloat16", "1")
    assert (strength.value, strength.min, strength.max, strength.step) == (1.0, -1.0, 2.0, 0.1)
    assert list(scaled.options) == ["1", "1/3", "1/10", "1/30", "1/100"]


CASES = [("bfloat16", 1.0, "1"), ("bfloat16", 1.5, "1/100"), ("float16", -0.3, "1/30"), ("float32", 2.0, "1/10"),
         ("bfloat16", -1.0, "1/3")]
SHARE = {"1": 1.0, "1/3": 1 / 3, "1/10": 0.1, "1/30": 1 / 30, "1/100": 0.01}


@pytest.mark.parametrize("dtype, strength, scaled", CASES)
def test_what_was_rounded_away_and_the_error_are_those_of_numpy(box, model, dtype, strength, scaled):
    put(box, dtype, strength, scaled)
    effective = strength * SHARE[scaled]
    W, delta, merged = by_hand(model, NAME, dtype, effective)
    lost = (merged == W) & (delta != 0)
    there = f"in the corner shown {lost[:48, :48].sum():,} of 2,304, "
    assert f"stayed: {lost.sum():,} of 4,096 entries ({lost.mean():.2%}); {there}" in said(box)
    corner, middle = box.figure.axes[0].images[0].get_array(), box.figure.axes[1]
    assert np.array_equal(np.ma.getmaskarray(corner) | np.isnan(np.ma.getdata(corner)), lost[:48, :48])
    errors = np.abs(merged - W - delta) / np.abs(delta)
    rest = ~lost[:48, :48]
    assert np.allclose(np.ma.getdata(corner)[rest], errors[:48, :48][rest], rtol=2e-3, atol=1e-4)
    assert float(re.search(r"the others off by (\S+) of theirs",
                           said(box))[1]) == pytest.approx(np.median(errors[:48, :48][rest]), rel=0.1)
    size, error = np.linalg.norm(delta) / np.linalg.norm(W), np.linalg.norm(merged - W - delta) / np.linalg.norm(delta)
    marker = middle.lines[-1]
    assert marker.get_xdata()[0] == pytest.approx(size, rel=1e-3)
    assert marker.get_ydata()[0] == pytest.approx(error, rel=0.02)
    assert f"‖ΔW‖/‖W₀‖ = {size:.2g} in {NAME}" in said(box)
    assert float(re.search(r"arrived is off by (\S+) of its size", said(box))[1]) == pytest.approx(error, rel=0.1)


def test_small_updates_are_lost_in_bfloat16_and_only_there(box):
    """What the lab is for: at a hundredth of a trained update much is rounded away in bfloat16, little in float16,
    nothing in float32.
    """
    shares = []
    for dtype in ("bfloat16", "float16", "float32"):
        put(box, dtype, 1.0, "1/100")
        shares.append(float(re.search(r"entries \((\S+)%\)", said(box))[1]))
    assert shares[0] > 20 and 0 < shares[1] < shares[0] / 4 and shares[2] < 0.05


@pytest.mark.parametrize("dtype, strength, scaled", CASES)
def test_the_losses_are_those_of_a_plain_model_with_the_merged_weights(box, model, dtype, strength, scaled):
    put(box, dtype, strength, scaled)
    effective = strength * SHARE[scaled]
    dots = box.figure.axes[2].lines[-1]
    assert dots.get_xdata() == pytest.approx([effective] * 2)
    assert dots.get_ydata() == pytest.approx(losses_by_hand(model, dtype, effective), abs=2e-5)
    upright = next(line for line in box.figure.axes[2].lines if list(line.get_ydata()) == [0, 1])
    assert upright.get_xdata() == pytest.approx([effective] * 2)
    apart = copy.deepcopy(model)
    for at, word in ((0.0, "without the adapter"), (effective, "with it kept apart")):
        set_strength(apart, at)
        found = [float(x) for x in re.findall(rf"(\d\.\d{{4}})(?: nats per token)? {word}", said(box))]
        assert found == pytest.approx([evaluate(apart, [batch]) for batch in (TASK, TALES)], abs=1.5e-4)
    assert [float(x) for x in re.findall(r"(\d\.\d{4}) merged", said(box))] == pytest.approx(list(dots.get_ydata()),
                                                                                             abs=6e-5)


def test_the_lines_of_the_losses_are_those_of_the_adapter_apart(box, model):
    apart, lines = copy.deepcopy(model), {line.get_label(): line for line in box.figure.axes[2].lines}
    for what, batch in (("the new task", TASK), ("the tales", TALES)):
        x, y = lines[what].get_data()
        assert x[0] == -1 and x[-1] == 2 and np.allclose(np.diff(x), 0.1)
        for i in (0, 10, 13, 30):
            set_strength(apart, x[i])
            assert y[i] == pytest.approx(evaluate(apart, [batch]), abs=1e-5)


def test_each_line_of_errors_is_of_its_own_dtype(box, model):
    lines = {line.get_label(): line for line in box.figure.axes[1].lines}
    W, full, _ = by_hand(model, NAME, "float32", 1.0)
    own = np.linalg.norm(full) / np.linalg.norm(W)
    for dtype in ROUND:
        sizes, errors = lines[dtype].get_data()
        for i in (0, 9, 19):
            want = error_by_hand(model, NAME, dtype, float(sizes[i]) / own)
            assert errors[i] == pytest.approx(want, rel=0.05), dtype
    assert box.figure.axes[1].get_xscale() == box.figure.axes[1].get_yscale() == "log"


def test_at_strength_0_nothing_can_be_lost(box, model):
    put(box, "bfloat16", 0.0, "1/10")
    assert "‖ΔW‖/‖W₀‖ = 0 in" in said(box) and "stayed: 0 of" in said(box)
    assert np.isnan(box.figure.axes[1].lines[-1].get_ydata()).all()
    assert not np.any(box.figure.axes[0].images[0].get_array()) and said(box).count("(+0.0000 by the merge)") == 2


def test_a_smaller_update_says_that_we_made_it_smaller(box, model):
    W, delta, _ = by_hand(model, NAME, "float32", 1.0)
    size = np.linalg.norm(delta) / np.linalg.norm(W)
    own = f"as trained it is {size:.2g}, a smaller one is this adapter scaled down by us"
    put(box, "float16", 1.5, "1/30")
    assert said(box).startswith("float16, strength 1.5 scaled down to 1/30, 0.05 in effect: ") and own in said(box)
    put(box, "float16", 1.5, "1")
    assert said(box).startswith("float16, strength 1.5: ") and own in said(box)


def test_a_matrix_smaller_than_the_corner_is_shown_whole(model, monkeypatch):
    figures = []
    monkeypatch.setattr(widgets, "png", lambda fig: figures.append(fig) or b"")
    box = lab.merge_lab(model, SMALL, TASK, TALES)
    image = figures[-1].axes[0].images[0]
    assert image.get_array().shape == (32, 48) and list(image.get_extent()) == [-0.5, 47.5, 31.5, -0.5]
    assert "of 1,536," in said(box)


@pytest.mark.parametrize("merged", [False, True])
def test_the_model_stays_as_it_is_bit_for_bit(merged, undrawn):
    """In training mode, with its dial at 0.4, merged or not: weights, factors, scalings, mode and gradients' flags."""
    model = adapted().train()
    set_strength(model, 0.4)
    if merged:
        merge_lora(model)

    def everything():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return ({name: (t.data_ptr(), t.requires_grad, t.detach().clone()) for name, t in tensors.items()},
                [(layer.scaling, layer.merged) for _, layer in lora_layers(model)],
                [module.training for module in model.modules()])
    before = everything()
    box = lab.merge_lab(model, NAME, TASK, TALES)
    put(box, "float16", -0.7, "1/10")
    after = everything()
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    for name, (place, trains, values) in before[0].items():
        assert (place, trains) == after[0][name][:2] and torch.equal(values, after[0][name][2]), name
    assert "as trained it is" in said(box) and "strength -0.7 scaled down to 1/10, -0.07 in effect" in said(box)


def test_the_dial_of_the_model_does_not_move_the_lab(model, undrawn):
    turned = copy.deepcopy(model)
    set_strength(turned, 0.3)
    boxes = [lab.merge_lab(each, SMALL, TASK, TALES) for each in (model, turned)]
    assert said(boxes[0]) == said(boxes[1])


def test_a_setting_is_measured_once(box, monkeypatch):
    def walk():
        for setting in (("float16", 0.7, "1/3"), ("bfloat16", 1.0, "1"), ("float16", 0.2, "1/3")):
            put(box, *setting)
    walk()
    calls = []
    monkeypatch.setattr(lab, "evaluate", lambda *args: calls.append(args) or 1.0)
    walk()
    assert calls == []


@pytest.mark.parametrize("spoil, name, says", [
    (lambda model: remove_lora(model, merge=False), NAME, "the model has no LoRA layer"),
    (lambda model: None, "v_proj", f"'v_proj' is no LoRA layer of this model: choose one of {NAME}, {SMALL}, "),
    (lambda model: nn.init.zeros_(model.get_submodule(NAME).lora_B), NAME, "is zero, so a merge has nothing to lose: "
                                                                           "load an adapter"),
    (lambda model: nn.init.constant_(model.get_submodule(NAME).lora_A, torch.nan), NAME, "not finite")])
def test_what_cannot_be_shown_is_refused_in_a_sentence(spoil, name, says):
    model = adapted()
    spoil(model)
    with pytest.raises(ValueError, match=re.escape(says)):
        lab.merge_lab(model, name, TASK, TALES)


def test_the_text_form_that_is_stored_holds_nothing_measured(model, box):
    stored = [each._repr_mimebundle_()["text/plain"] for each in (lab.merge_lab(model, NAME, TALES, TASK), box)]
    assert stored[0] == stored[1] and "ToggleButtons" in stored[0]


def test_only_widgets_that_both_versions_share_are_used():
    """Names and keywords of ipywidgets 7.7 and 8 alike: a wrong one fails silently in 7.7."""
    tree = ast.parse(Path(lab.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func).startswith("ipywidgets.")]
    assert {call.func.attr for call in calls} == {"ToggleButtons", "FloatSlider", "SelectionSlider"}
    shared = {"options", "value", "description", "style", "min", "max", "step"}
    assert {keyword.arg for call in calls for keyword in call.keywords} <= shared
