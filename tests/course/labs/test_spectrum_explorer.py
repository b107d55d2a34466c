"""The spectrum explorer: every control changes picture and text, and the numbers are those that numpy finds."""
import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_edu.course.labs import spectrum_explorer as explorer
from lora_edu.course.labs.spectrum_explorer import spectrum_explorer
from lora_edu.course.page import widgets

RANKS = [0, 1, 2, 4, 8]
LAYERS, SHAPES = (0, 2), {"q_proj": (8, 8), "up_proj": (12, 8)}
WHATS = ("restaurants", "random targets", "more tales")
LOSSES = {"restaurants": [4.4, 3.0, 2.0, 0.4, 0.4], "random targets": [4.4, 4.5, 4.6, 4.7, 4.9],
          "more tales": [4.4, 4.3, 4.5, 4.5, 4.6]}
MEASURED_ON = {what: "restaurants" for what in WHATS}


def delta(what: str, layer: int, matrix: str) -> np.ndarray:
    """An update that differs for each place, its spectrum uneven."""
    rng = np.random.default_rng(10 * WHATS.index(what) + layer + (matrix == "q_proj") * 5)
    out, into = SHAPES[matrix]
    return rng.normal(size=(out, into)) * np.linspace(1, 0.05, into)


def name_of(layer: int, matrix: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if matrix == 'q_proj' else 'mlp'}.{matrix}"


def thin_svd(matrix) -> tuple:
    return torch.linalg.svd(torch.as_tensor(matrix, dtype=torch.float32), full_matrices=False)


@pytest.fixture(scope="module")
def factors():
    return {what: {name_of(layer, matrix): thin_svd(delta(what, layer, matrix)) for layer in LAYERS
                   for matrix in SHAPES} for what in WHATS}


@pytest.fixture(scope="module")
def built(factors):
    return spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON, rank=2)


@pytest.fixture
def box(built):
    """The one explorer, put back to where it started."""
    for control, value in zip(controls(built).values(), ("restaurants", "q_proj", 0, 2)):
        control.value = value
    return built


def controls(box) -> dict:
    return {control.description: control for control in box.children[0].children}


def said(box) -> str:
    return re.sub("<[^>]*>", "", box.children[2].value)


def state(box):
    return bytes(box.children[1].value), box.children[2].value


@pytest.mark.parametrize("control, values",
                         [("update", ["more tales", "random targets"]), ("layer", [2]), ("matrix", ["up_proj"]),
                                             ("rank kept", [0, 1, 8, 4])])
def test_every_move_changes_the_picture_and_the_text(box, control, values):
    seen = [state(box)]
    for value in values:
        controls(box)[control].value = value
        seen.append(state(box))
    pictures, texts = zip(*seen)
    assert len(set(pictures)) == len(set(texts)) == len(values) + 1 and all(p[:4] == b"\x89PNG" for p in pictures)
    controls(box)[control].value = values[0]
    assert state(box) == seen[1], "going back must give the same picture and text"


def test_the_controls_offer_what_there_is_and_start_where_they_should(factors):
    found = controls(spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON, rank=2))
    assert list(found) == ["update", "matrix", "layer", "rank kept"]
    assert [list(control.options) for control in found.values()] == [list(WHATS), ["q_proj", "up_proj"], [0, 2], RANKS]
    assert [control.value for control in found.values()] == ["restaurants", "q_proj", 0, 2]


def test_a_start_between_two_ranks_takes_the_nearer_one(factors):
    assert controls(spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON, rank=7))["rank kept"].value == 8


@pytest.mark.parametrize("what, layer, matrix, rank", [("restaurants", 0, "q_proj", 2), ("more tales", 2, "up_proj", 4),
                                                       ("random targets", 2, "q_proj", 0),
                                                       ("restaurants", 0, "up_proj", 8)])
def test_the_numbers_are_those_of_numpy(box, what, layer, matrix, rank):
    """Oracle: numpy's best rank-r part of each matrix, and the norms of what it leaves."""
    def lost(matrix):
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        return ((matrix - (U[:, :rank] * S[:rank]) @ Vh[:rank]) ** 2).sum()
    for control, value in zip(controls(box).values(), (what, matrix, layer, rank)):
        control.value = value
    this, every = delta(what, layer, matrix), [delta(what, i, m) for i in LAYERS for m in SHAPES]
    out, into = this.shape
    count = rank * (out + into)
    assert (f"{what}, layer {layer}, {matrix}: {out} × {into}, rank {rank} of 8: {count} numbers in two factors, "
            f"{out * into} in the matrix ({count / (out * into):.1%}); ") in said(box)
    one = 1 - lost(this) / (this**2).sum()
    together = 1 - sum(map(lost, every)) / sum((each**2).sum() for each in every)
    assert f"\nenergy kept: {one:.1%} of this matrix, {together:.1%} of all 4 together\n" in said(box)


def test_the_values_above_the_edge_are_counted():
    """Oracle: one direction far above noise, which numpy puts at 1 of 200 singular values above std (sqrt(m) +
    sqrt(n)).
    """
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 220))
    spiked = noise + 60 * np.outer(rng.normal(size=200), rng.normal(size=220)) / 200**0.5 / 220**0.5
    assert (np.linalg.svd(spiked, compute_uv=False) > 200**0.5 + 220**0.5 + 1).sum() == 1
    box = spectrum_explorer({"one": {"layers.0.q": thin_svd(spiked)}}, [0, 256], {"one": [2, 1]}, {"one": "tales"})
    assert "; singular values above the edge of white noise: 1\n" in said(box)


@pytest.mark.parametrize("what, rank, says", [
    ("restaurants", 0, "cut to rank 0: 4.40 nats per token (base 4.40, whole update 0.40), the base itself"),
    ("restaurants", 2, "cut to rank 2: 2.00 nats per token (base 4.40, whole update 0.40), 60% of the improvement"),
    ("restaurants", 8, "0.40 nats per token (base 4.40, whole update 0.40), 100% of the improvement"),
    ("random targets", 4,
     "cut to rank 4: 4.70 nats per token (base 4.40, whole update 4.90), 0.30 worse than the base"),
    ("more tales", 1,
     "(base 4.40, whole update 4.60), 0.10 better than the base, though the whole update is no better"),
    ("more tales", 8, "whole update 4.60), 0.20 worse than the base")])
def test_the_loss_is_said_with_what_it_means(box, what, rank, says):
    controls(box)["update"].value, controls(box)["rank kept"].value = what, rank
    assert said(box).splitlines()[2].startswith("loss on restaurants, every matrix ") and said(box).endswith(says)


def test_the_data_that_was_measured_on_is_named(factors):
    box = spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON | {"more tales": "unseen tales"})
    controls(box)["update"].value = "more tales"
    assert "\nloss on unseen tales, " in said(box)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were turned into pictures, in order."""
    figures = []
    monkeypatch.setattr(widgets, "png", lambda fig: figures.append(fig) or b"")
    return figures


@pytest.mark.parametrize("matrix, rank", [("q_proj", 2), ("up_proj", 4), ("up_proj", 0), ("q_proj", 8)])
def test_the_picture_shows_the_spectrum_the_matrix_and_its_part(drawn, factors, matrix, rank):
    box = spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON)
    controls(box)["matrix"].value, controls(box)["rank kept"].value = matrix, rank
    assert len({id(fig) for fig in drawn}) == 1, "the figure is built once"
    left, whole, part, _ = drawn[-1].axes
    this = delta("restaurants", 0, matrix)
    U, S, Vh = np.linalg.svd(this, full_matrices=False)
    lines = {line.get_label(): line for line in left.lines}
    assert np.allclose(np.r_[lines["kept"].get_ydata(), lines["dropped"].get_ydata()], S, atol=1e-5)
    assert list(lines["kept"].get_xdata()) == list(range(1, rank + 1))
    assert list(lines["dropped"].get_xdata()) == list(range(rank + 1, 9))
    assert np.allclose(whole.images[0].get_array(), this, atol=1e-5)
    assert np.allclose(part.images[0].get_array(), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-5)
    assert whole.get_title() == "ΔW" and part.get_title() == f"its rank-{rank} part"
    assert whole.get_xlim() == (-0.5, 7.5) and whole.get_ylim() == part.get_ylim() == (len(this) - 0.5, -0.5)


def test_both_maps_and_the_bar_have_one_symmetric_scale(drawn, factors):
    box = spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON)
    for layer in LAYERS:
        controls(box)["layer"].value = layer
        _, whole, part, bar = drawn[-1].axes
        scale = np.quantile(np.abs(delta("restaurants", layer, "q_proj")), 0.995)
        assert whole.images[0].get_clim() == part.images[0].get_clim() == pytest.approx((-scale, scale), rel=1e-4)
        assert [text.get_text() for text in bar.get_yticklabels()] == [f"{-scale:.2g}", "0", f"{scale:.2g}"]


def test_the_noise_has_the_median_of_the_update_and_ends_at_the_edge(drawn, factors):
    """Oracle: numpy's svd; for pure noise of standard deviation 3 the edge is at 3 (sqrt(m) + sqrt(n)), give or take
    a tenth.
    """
    noise = 3 * np.random.default_rng(0).normal(size=(200, 300))
    spectrum_explorer({"noise": {"layers.0.q": thin_svd(noise)}}, [0, 256], {"noise": [2, 1]}, {"noise": "tales"})
    lines = {line.get_label(): line for line in drawn[-1].axes[0].lines}
    drawn_noise, sigma = np.asarray(lines["white noise, same median"].get_ydata()), np.linalg.svd(noise,
                                                                                                  compute_uv=False)
    assert np.median(drawn_noise) == pytest.approx(np.median(sigma), rel=1e-4)
    assert np.allclose(drawn_noise, sigma, rtol=0.1)
    assert lines["its edge"].get_ydata()[0] == pytest.approx(3 * (200**0.5 + 300**0.5), rel=0.1)


def test_the_noise_is_decomposed_once_for_each_shape(factors, drawn, monkeypatch):
    explorer._noise_values.cache_clear()
    asked = []
    spectrum = explorer.spectrum
    monkeypatch.setattr(explorer, "spectrum", lambda matrix: asked.append(tuple(matrix.shape)) or spectrum(matrix))
    box = spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON)
    for layer in (2, 0, 2):
        for matrix in SHAPES:
            controls(box)["matrix"].value, controls(box)["layer"].value = matrix, layer
    assert asked == [(8, 8), (12, 8)]


def test_only_the_corner_of_a_large_matrix_is_shown_and_its_title_says_so(drawn):
    this = np.random.default_rng(1).normal(size=(130, 140))
    spectrum_explorer({"one": {"layers.0.q": thin_svd(this)}}, [0, 1, 130], {"one": [2, 1, 1]}, {"one": "tales"},
                      rank=1)
    _, whole, part, _ = drawn[-1].axes
    U, S, Vh = np.linalg.svd(this)
    assert np.allclose(whole.images[0].get_array(), this[:128, :128], atol=1e-4)
    assert whole.get_title() == "ΔW, top-left 128 × 128"
    assert np.allclose(part.images[0].get_array(), (S[0] * np.outer(U[:, 0], Vh[0]))[:128, :128], atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_an_update_of_zeros_can_be_shown(drawn):
    box = spectrum_explorer({"none": {"layers.0.q": thin_svd(np.zeros((4, 4)))}}, [0, 4], {"none": [2, 2]},
                            {"none": "tales"})
    assert "cannot be drawn" not in said(box) and "energy kept: 100.0%" in said(box)
    assert 0 < drawn[-1].axes[0].get_ylim()[0] < 0.01


def without(factors, what, name):
    return factors | {what: {key: value for key, value in factors[what].items() if key != name}}


def renamed(factors, old, new):
    return {what: {new if name == old else name: value for name, value in parts.items()}
            for what, parts in factors.items()}


Q0 = name_of(0, "q_proj")


@pytest.mark.parametrize("change, says", [
    (lambda f: ({}, RANKS, LOSSES, MEASURED_ON), "needs at least one update"),
    (lambda f: ({"restaurants": {}}, RANKS, LOSSES, MEASURED_ON), "with at least one matrix"),
    (lambda f: (without(f, "more tales", Q0), RANKS, LOSSES, MEASURED_ON), f"'{Q0}' is in only one of 'restaurants' "
                                                                           "and 'more tales'"),
    (lambda f: (renamed(f, Q0, "lm_head"), RANKS, LOSSES, MEASURED_ON), "'lm_head' does not say its layer"),
    (lambda f: (renamed(f, Q0, "model.layers.2.cross.q_proj"), RANKS, LOSSES, MEASURED_ON),
     "are both q_proj of layer 2: leave one"),
    (lambda f: (renamed(f, Q0, "model.layers.0.self_attn.k_proj"), RANKS, LOSSES, MEASURED_ON), "there is no q_proj in "
                                                                                                "layer 0"),
    (lambda f: (f | {"more tales": f["more tales"] | {Q0: thin_svd(np.eye(4))}}, RANKS, LOSSES, MEASURED_ON),
     f"'{Q0}' of 'more tales' has factors (4, 4), (4,), (4, 4): they should be (8, 8), (8,), (8, 8)"),
    (lambda f: ({"a": {"layers.0.q": torch.linalg.svd(torch.ones(5, 3))}}, [0, 3], {"a": [2, 1]}, {"a": "a"}),
     "should be (5, 3), (3,), (3, 3)"),
    (lambda f: (f, [1, 2, 8], LOSSES, MEASURED_ON), "[1, 2, 8]: give at least two, rising from 0"),
    (lambda f: (f, [0, 4, 2, 8, 9], LOSSES, MEASURED_ON), "rising from 0"),
    (lambda f: (f, [0, 1, 2, 4], LOSSES, MEASURED_ON), "the ranks end at 4, and 'model.layers.0.self_attn.q_proj' has "
                                                       "8 singular values"),
    (lambda f: (f, RANKS, {"restaurants": LOSSES["restaurants"]}, MEASURED_ON), "losses has no entry for 'random "
                                                                                "targets'"),
    (lambda f: (f, RANKS, LOSSES, {"restaurants": "x"}), "measured_on has no entry for 'random targets'"),
    (lambda f: (f, RANKS, LOSSES | {"more tales": [1, 2]}, MEASURED_ON), "losses['more tales'] has 2 numbers: give 5 "
                                                                         "finite ones"),
    (lambda f: (f, RANKS, LOSSES | {"more tales": [1, 2, 3, 4, np.nan]}, MEASURED_ON), "give 5 finite ones")])
def test_what_does_not_fit_is_refused_in_a_sentence(factors, change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        spectrum_explorer(*change(factors))


def test_the_text_form_that_is_stored_holds_nothing_measured(factors, box):
    other = {what: [loss + 1 for loss in values] for what, values in LOSSES.items()}
    stored = [each._repr_mimebundle_()["text/plain"]
              for each in (spectrum_explorer(factors, RANKS, other, MEASURED_ON, rank=2), box)]
    assert stored[0] == stored[1] and "ToggleButtons" in stored[0]


def test_only_widgets_that_both_versions_share_are_used():
    """Names and keywords of ipywidgets 7.7 and 8 alike: a wrong one fails silently in 7.7.

    And no Dropdown, which an arrow key leaves.
    """
    tree = ast.parse(Path(explorer.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func).startswith("ipywidgets.")]
    assert {ast.unparse(call.func) for call in calls} == {"ipywidgets.ToggleButtons", "ipywidgets.SelectionSlider"}
    assert {keyword.arg for call in calls for keyword in call.keywords} <= {"options", "value", "description", "style"}
