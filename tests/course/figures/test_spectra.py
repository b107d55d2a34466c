"""The figures about spectra: each shows the data it was given, in words that have units."""
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lora_edu.course.figures import spectra as sp
from lora_edu.course.page import show

SIGMA = torch.tensor([4.0, 2.0, 1.0, 0.5])
RANKS = [0, 1, 2, 4]
ENERGY = ([0, 0.5, 0.75, 1], [0, 0.4, 0.7, 1], [0, 0.6, 0.8, 1])
LOSS, TASK = [0, 0.75, 1.01, 1.0], [None, None, 0.25, 0.875]
NULLS = {"random targets": [0, 0.8, 0.9, 1], "more tales": [0, 0.25, 0.5, 1],
         "Gaussian": torch.tensor([0, 0.125, 0.25, 1])}
TABLE = {(layer, matrix): 10.0 * layer + i for layer in (0, 1, 11) for i, matrix in enumerate(("q_proj", "up_proj"))}
WHOLE = torch.arange(-12.0, 12).reshape(4, 6)
NOISE = (np.linspace(0, 1, 5), np.array([0, 1.0, 2.0, 1.0, 0]))

FIGURES = {
    "spectra": lambda: sp.plot_spectra({"one": SIGMA, "two": [3, 2, 1]}, "Two spectra", edge=1.5),
    "many spectra": lambda: sp.plot_spectra({f"matrix {i}": [4 + i * i, 2, 1][:3 - i % 2] for i in range(9)},
                                            "Nine spectra"),
    "what is kept": lambda: sp.plot_what_is_kept(RANKS, ENERGY, LOSS, TASK, NULLS, "Little of ΔW, most of what it "
                                                                                   "learned"),
    "density": lambda: sp.plot_density([0.5, 1, 1, 2, 3, 9], (4, 9), 0.5, "Three beyond", NOISE),
    "layers": lambda: sp.plot_layers(TABLE, "Which layers", "effective rank (directions)"),
    "parts": lambda: sp.plot_parts(WHOLE, WHOLE / 2, "Half of it"),
}
every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


def named(fig):
    """The lines of the first axes by their labels."""
    return {line.get_label(): line for line in fig.axes[0].lines}


def legend_of(fig):
    return [text.get_text() for legend in [*fig.legends, fig.axes[0].get_legend()] if legend
            for text in legend.get_texts()]


@every_figure
def test_a_figure_has_a_title_and_labelled_axes(draw):
    fig = draw()
    assert isinstance(fig, Figure) and 5 < len(show.title_of(fig)) < 60
    assert fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel()


@every_figure
def test_the_png_is_small_and_the_same_each_time(draw):
    first = show.png(draw())
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and len(first) < 100_000 and first == show.png(draw())


@pytest.mark.parametrize("name", ["spectra", "what is kept"])
def test_lines_differ_by_colour_marker_and_dash(name):
    lines = [line for line in FIGURES[name]().axes[0].lines if len(line.get_xdata()) > 2]
    looks = [(line.get_color(), line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines]
    assert all(len(set(kind)) == len(looks) >= 2 for kind in zip(*looks))


def test_seven_nulls_look_different():
    assert len(set(sp.NULL_COLORS)) == len(set(map(str, sp.NULL_DASHES))) == 7
    assert not set(sp.NULL_COLORS) & set(show.COLORS[:3]), "they must not be taken for the real update's three"


def test_spectra_hold_the_values_and_the_edge():
    fig = FIGURES["spectra"]()
    lines = named(fig)
    assert lines["one"].get_xydata().tolist() == [[1, 4], [2, 2], [3, 1], [4, 0.5]]
    assert list(lines["two"].get_ydata()) == [3, 2, 1]
    assert list(lines["edge of white noise"].get_ydata()) == [1.5, 1.5] and fig.axes[0].get_yscale() == "log"
    assert legend_of(fig) == ["one", "two", "edge of white noise"]
    plain = sp.plot_spectra({"one": SIGMA}, "One", log=False)
    assert plain.axes[0].get_yscale() == "linear" and list(named(plain)) == ["one"]


def test_a_log_axis_ends_four_powers_of_ten_below_the_largest():
    assert sp.plot_spectra({"one": [100, 1, 1e-9, 0]}, "t").axes[0].get_ylim()[0] == pytest.approx(0.01)
    assert 0 < sp.plot_spectra({"one": SIGMA}, "t").axes[0].get_ylim()[0] < 0.5 < 4


def test_many_spectra_are_grey_with_a_median_for_each_length():
    """Oracle: NumPy's median over the matrices of one length; none of them jumps where a shorter one ends."""
    curves = {str(i): [4.0 * (i + 1), 2.0, 1.0][:2 + i % 2] for i in range(9)}
    fig = sp.plot_spectra(curves, "t")
    *each, two, three = fig.axes[0].lines
    assert len(each) == 9 and {line.get_color() for line in each} == {"#999999"}
    for line, length, color in ((two, 2, show.BLUE), (three, 3, show.COLORS[1])):
        want = np.median([curve for curve in curves.values() if len(curve) == length], axis=0)
        assert list(line.get_ydata()) == list(want) and line.get_color() == color and line.get_linewidth() > 2
    assert legend_of(fig) == ["each of 9 matrices", "median of the 5 with 2 values", "median of the 4 with 3 values"]
    assert legend_of(sp.plot_spectra({str(i): SIGMA for i in range(8)}, "t"))[1] == "their median"
    assert len(sp.plot_spectra({str(i): SIGMA for i in range(7)}, "t").axes[0].lines) == 7


def test_what_is_kept_is_drawn_in_per_cent_over_the_ranks():
    fig = FIGURES["what is kept"]()
    lines, ax = named(fig), fig.axes[0]
    assert all(list(line.get_xdata()) == RANKS for line in lines.values()) and len(lines) == 6
    assert lines["energy of ΔW"].get_ydata().tolist() == [0, 50, 75, 100]
    assert lines["improvement in loss"].get_ydata().tolist() == [0, 75, 101, 100]
    assert np.array_equal(lines["slots right"].get_ydata(), [np.nan, np.nan, 25, 87.5], equal_nan=True)
    assert lines["Gaussian"].get_ydata().tolist() == [0, 12.5, 25, 100]
    assert lines["random targets"].get_ydata().tolist() == [0, 80, 90, 100]
    assert min(lines[name].get_linewidth() for name in list(lines)[:3]) > 2 * max(lines[name].get_linewidth()
                                                                                  for name in NULLS)
    assert "or slots right" in ax.get_ylabel() and ax.get_ylim()[0] < 0 and ax.get_ylim()[1] > 101


def test_the_band_of_the_energy_covers_low_to_high():
    band = FIGURES["what is kept"]().axes[0].collections[0].get_paths()[0].vertices
    assert sorted(band[band[:, 0] == 1][:, 1].tolist())[0] == 40 and max(band[band[:, 0] == 1][:, 1]) == 60


def test_ranks_stand_evenly_from_0_on():
    ax = sp.plot_what_is_kept([0, 1, 2, 4, 8, 16], np.linspace(0, 1, 6), np.ones(6), None, {}, "t").axes[0]
    places = ax.transData.transform([(rank, 0) for rank in (0, 1, 2, 4, 8, 16)])[:, 0]
    assert np.allclose(np.diff(places), places[1] - places[0]) and places[1] > places[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "4", "8", "16"]


def test_the_legend_groups_the_real_update_and_the_others():
    fig = FIGURES["what is kept"]()
    assert legend_of(fig) == ["the real update", "energy of ΔW", "improvement in loss", "slots right", "\nenergy of "
                              "other updates", *NULLS]
    bold = [text.get_text().strip() for text in fig.legends[0].get_texts() if text.get_fontweight() == "bold"]
    assert bold == ["the real update", "energy of other updates"]


def test_without_slots_and_nulls_the_figure_does_not_name_them():
    fig = sp.plot_what_is_kept(RANKS, ENERGY, LOSS, None, {}, "t")
    assert legend_of(fig) == ["the real update", "energy of ΔW", "improvement in loss"]
    assert "slots" not in fig.axes[0].get_ylabel()


def test_the_histogram_has_area_1_and_the_edge_stands_where_noise_ends():
    """Oracle: std (sqrt(4) + sqrt(9)) = 2.5, and of the six values 3 and 9 lie beyond."""
    fig = FIGURES["density"]()
    lines = named(fig)
    assert sum(bar.get_width() * bar.get_height() for bar in fig.axes[0].patches) == pytest.approx(1)
    assert list(lines["edge of white noise"].get_xdata()) == [2.5, 2.5]
    assert lines["white noise (Marchenko-Pastur)"].get_xydata().tolist() == np.c_[NOISE].tolist()
    assert list(lines["2 beyond the edge"].get_xdata()) == [3, 9] and "6 singular values, 4 × 9" in legend_of(fig)
    assert not any("beyond" in name for name in named(sp.plot_density([1, 2], (4, 9), 0.5, "t", NOISE)))


def test_each_cell_of_the_layers_has_its_number_where_it_belongs():
    ax = FIGURES["layers"]().axes[0]
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((0, 0), "0"), ((1, 0), "1"), ((0, 1), "10"), ((1, 1), "11"), ((0, 2), "110"), ((1, 2), "111")}
    assert ax.images[0].get_array().tolist() == [[0, 1], [10, 11], [110, 111]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "11"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["q_proj", "up_proj"]
    assert FIGURES["layers"]().axes[1].get_ylabel() == "effective rank (directions)"


def test_the_numbers_can_be_read_on_their_colours():
    """Oracle: the contrast ratio of WCAG 2, which asks for 4.5."""
    def luminance(color):
        return np.dot([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)],
                      (0.2126, 0.7152, 0.0722))
    ax = sp.plot_layers({(i, "q"): float(i) for i in range(40)}, "t", "x").axes[0]
    for text in ax.texts:
        one, other = luminance(ax.images[0].to_rgba(float(text.get_text()))[:3]), luminance(text.get_color())
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5


def test_a_missing_cell_stays_empty():
    ax = sp.plot_layers({(0, "q"): 1.0, (1, "q"): 2.0, (1, "k"): 3.0}, "t", "x").axes[0]
    assert sorted(text.get_text() for text in ax.texts) == ["1", "2", "3"]
    assert np.isnan(ax.images[0].get_array().filled(np.nan)).sum() == 1


def test_both_parts_have_one_symmetric_scale():
    fig = FIGURES["parts"]()
    one, two = (ax.images[0] for ax in fig.axes[:2])
    assert one.get_clim() == two.get_clim() and one.get_clim()[0] == -one.get_clim()[1]
    assert one.get_clim()[1] == pytest.approx(np.quantile(WHOLE.abs().numpy(), 0.995))
    assert one.get_array().tolist() == WHOLE.tolist() and two.get_array().tolist() == (WHOLE / 2).tolist()
    assert len(fig.axes) == 3 and fig.axes[2].get_ylabel() == show.LABELS["entry"]
    assert [ax.get_title() for ax in fig.axes[:2]] == ["the whole update", "its low-rank part"]


@pytest.mark.parametrize("matrix, scale", [(np.zeros((2, 2)), 1.0), (np.r_[np.zeros(999), 5.0][None], 5.0)])
def test_a_scale_is_never_0(matrix, scale):
    assert sp.color_scale(matrix) == scale


@pytest.mark.parametrize("draw, says", [
    (lambda: sp.plot_spectra({}, "t"), "got no spectrum"),
    (lambda: sp.plot_spectra({"a": torch.eye(2)}, "t"), "the spectrum 'a' has shape (2, 2)"),
    (lambda: sp.plot_spectra({"a": []}, "t"), "the spectrum 'a' has shape (0,)"),
    (lambda: sp.plot_spectra({"a": [1, np.nan]}, "t"), "with nan or inf in it"),
    (lambda: sp.plot_what_is_kept([1, 2, 4], [0, 0, 1], [0, 0, 1], None, {}, "t"), "[1, 2, 4]: give at least two, "
                                                                                   "rising from 0"),
    (lambda: sp.plot_what_is_kept([0, 2, 2], [0, 0, 1], [0, 0, 1], None, {}, "t"), "rising from 0"),
    (lambda: sp.plot_what_is_kept(RANKS, [0, 1], LOSS, None, {}, "t"), "'energy of ΔW' does not fit: give 4 shares"),
    (lambda: sp.plot_what_is_kept(RANKS, (*ENERGY[:2], [0, 1]), LOSS, None, {}, "t"), "'energy of ΔW' does not fit: "
                                                                                      "give 4 shares"),
    (lambda: sp.plot_what_is_kept(RANKS, ENERGY[:2], LOSS, None, {}, "t"),
     "'energy of ΔW' does not fit: give 4 shares"),
    (lambda: sp.plot_what_is_kept(RANKS, ENERGY, LOSS[:2], None, {}, "t"), "'improvement in loss' does not fit"),
    (lambda: sp.plot_what_is_kept(RANKS, ENERGY, LOSS, None, {"tales": [0, 30, 60, 100]}, "t"), "'tales' holds 100: "
                                                                                                "give shares"),
    (lambda: sp.plot_density([[1.0]], (4, 9), 0.5, "t", NOISE), "has shape (1, 1)"),
    (lambda: sp.plot_layers({}, "t", "x"), "plot_layers got 0 numbers: give finite ones"),
    (lambda: sp.plot_layers({(0, "q"): np.nan}, "t", "x"), "with nan or inf among them"),
    (lambda: sp.plot_parts(WHOLE, WHOLE.T, "t"), "(4, 6) and (6, 4): they must have one shape"),
    (lambda: sp.plot_parts(WHOLE[0], WHOLE[0], "t"), "got shape (6,)")])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(draw, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        draw()
