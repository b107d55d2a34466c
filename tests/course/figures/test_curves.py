"""Figures: each shows the data it was given, in words that have units, and nothing that differs between machines."""
import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lora_edu.course.figures import curves, matrices
from lora_edu.course.page import show

ROOT = Path(__file__).parents[3]
STEPS = list(range(0, 50, 5))
CURVES = {name: [(step, 4 / (1 + i + step)) for step in STEPS] for i, name in enumerate(["LoRA", "full", "rank 1"])}
BANDS = {"LoRA": (STEPS, np.ones(10), np.zeros(10), 2 * np.ones(10)),
         "full": (STEPS, 2 * np.ones(10), np.ones(10), 3 * np.ones(10))}
PATHS = {"LoRA": [(3.8, 3.0), (6.4, 0.25)], "full": [(3.7, 2.5), (4.7, 0.24)]}
BARS = {"all linear": (0.25, 0.24, 0.27), "QV": (0.55, 0.50, 0.60)}
LOW_RANK = torch.arange(1.0, 7)[:, None] * torch.arange(1.0, 9)
ALPHAS = np.linspace(0, 1, 21)
BLOCK = {"q_proj": (256, 256), "down_proj": (256, 688)}

FIGURES = {
    "loss curves": lambda: curves.plot_loss_curves(CURVES, title="LoRA learns"),
    "bands": lambda: curves.plot_bands(BANDS, title="Seeds agree"),
    "learn/forget plane": lambda: curves.learn_forget_plane(PATHS, base=(3.6, 4.4), floor=1.1,
                                                            title="LoRA forgot more"),
    "bars": lambda: curves.plot_bars(BARS, title="Placement decides", xlabel="task", floor=0.9),
    "singular values": lambda: matrices.plot_singular_values({"one": LOW_RANK, "two": torch.eye(5)},
                                                             title="Rank 1 is one value"),
    "picture ranks": lambda: matrices.plot_picture_ranks(LOW_RANK, ranks=(1, 2)),
    "block": lambda: matrices.plot_block(BLOCK, title="Thin beside wide", rank=4),
    "two losses": lambda: curves.plot_two_losses(ALPHAS, 4 - 3 * ALPHAS, 3 + ALPHAS, title="Opposite", alpha=0.5),
}
every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


@every_figure
def test_a_figure_has_a_title_and_labelled_axes_with_units(draw):
    fig = draw()
    assert isinstance(fig, Figure) and 0 < len(show.title_of(fig)) < 60
    for ax in fig.axes[:1]:
        if ax.axison:
            assert ax.get_xlabel()
            assert (ax.get_ylabel() or [label.get_text() for label in ax.get_yticklabels()] == list(BARS))


def test_a_bar_has_a_whisker_where_it_has_an_interval():
    bars = {"counted": 3, "one run": (2, 2, 2), "seeds": (4, 3, 6)}
    ax = curves.plot_bars(bars, title="Two of them are sure").axes[0]
    (whiskers,) = [found for found in ax.collections if hasattr(found, "get_segments")]
    drawn = [segment for segment in whiskers.get_segments() if np.isfinite(segment).all() and len(segment)]
    assert [segment.tolist() for segment in drawn] == [[[3, 2], [6, 2]]]
    assert [bar.get_width() for bar in ax.patches] == [3, 2, 4]


@every_figure
def test_the_png_is_small_and_the_same_each_time(draw):
    first = show.png(draw())
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and len(first) < 100_000
    assert first == show.png(draw()) and b"Software" not in first


@every_figure
def test_lines_of_one_figure_differ_by_marker_and_dash_too(draw):
    for ax in draw().axes:
        lines = [line for line in ax.lines if line.get_label()[0] != "_" and len(line.get_xdata()) > 2]
        looks = [(line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines]
        assert len({marker for marker, _ in looks}) == len({dash for _, dash in looks}) == len(looks)


@pytest.mark.parametrize("many", [show.COLORS, show.MARKERS, show.DASHES])
def test_seven_lines_look_different(many):
    assert len(set(many)) == 7


def test_lines_hold_the_points_given():
    for line, points in zip(FIGURES["loss curves"]().axes[0].lines, CURVES.values()):
        assert list(zip(line.get_xdata(), line.get_ydata())) == points


def test_a_band_covers_low_to_high():
    bands = FIGURES["bands"]().axes[0].collections
    assert [band.get_paths()[0].get_extents().intervaly.tolist() for band in bands] == [[0, 2], [1, 3]]


def test_the_grammars_entropy_is_drawn_where_it_is_given():
    for fig in (curves.plot_bands(BANDS, "Seeds agree", floor=0.135),
                curves.plot_points({"a": [(1, 2, "x"), (2, 3, "y")]}, "t", "tales", "task", floor=0.135)):
        floors = [line.get_ydata() for line in fig.axes[0].lines if line.get_label() == curves.GRAMMAR]
        assert [list(heights) for heights in floors] == [[0.135, 0.135]]
    assert not any(line.get_label() == curves.GRAMMAR for line in FIGURES["bands"]().axes[0].lines)


def test_a_block_is_drawn_to_one_scale():
    whole = [box for box in FIGURES["block"]().axes[0].patches]
    sizes = [(box.get_height(), box.get_width()) for box in whole]
    assert sizes == [(256, 256), (256, 4), (4, 256), (256, 688), (256, 4), (4, 688)]
    corners = [(box.get_x(), box.get_x() + box.get_width()) for box in whole]
    assert max(corners[:3])[1] < corners[3][0], "the second does not lie on the first"


def test_a_path_starts_at_the_base_and_ends_at_its_last_point():
    lines = FIGURES["learn/forget plane"]().axes[0].lines
    paths = [np.c_[line.get_xdata(), line.get_ydata()].tolist() for line in lines if line.get_label() in PATHS]
    assert paths == [[[3.6, 4.4], *map(list, PATHS["LoRA"])], [[3.6, 4.4], *map(list, PATHS["full"])]]
    assert [list(line.get_ydata()) for line in lines if line.get_label() == "ignores its input"] == [[1.1, 1.1]]


def test_bars_have_their_length_their_interval_and_their_number():
    ax = FIGURES["bars"]().axes[0]
    assert [bar.get_width() for bar in ax.patches[:2]] == [0.25, 0.55]
    assert [text.get_text() for text in ax.texts] == ["0.25", "0.55"]
    intervals = [segment[:, 0].tolist() for segment in ax.collections[0].get_segments()]
    assert np.allclose(intervals, [[0.24, 0.27], [0.50, 0.60]])
    assert "dotted: ignores its input" in ax.get_xlabel()


def test_singular_values_of_a_known_matrix():
    """Oracle: a rank-1 product has the one singular value |u| |v|; the identity has ones."""
    one, two = FIGURES["singular values"]().axes[0].lines
    assert one.get_ydata()[0] == pytest.approx((91 * 204) ** 0.5) and one.get_ydata()[1:].max() < 1e-10
    assert np.allclose(two.get_ydata(), 1) and list(two.get_xdata()) == [1, 2, 3, 4, 5]


def test_one_matrix_needs_no_legend():
    assert matrices.plot_singular_values(LOW_RANK).axes[0].get_legend() is None


def test_the_rank_1_version_of_a_rank_1_picture_is_the_picture():
    whole, first, second = FIGURES["picture ranks"]().axes
    assert np.allclose(first.images[0].get_array(), LOW_RANK) and np.allclose(whole.images[0].get_array(), LOW_RANK)
    assert [ax.get_title() for ax in (whole, first, second)] == ["the picture\n48 numbers", "rank 1\n14 numbers",
                                                                 "rank 2\n28 numbers"]


def test_the_marker_stands_on_both_lines():
    markers = FIGURES["two losses"]().axes[0].lines[-1]
    assert list(markers.get_xdata()) == [0.5, 0.5] and list(markers.get_ydata()) == [2.5, 3.5]


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.tensor([[1.0, torch.nan]]), np.array([[np.inf]])])
@pytest.mark.parametrize("draw", [matrices.plot_singular_values, matrices.plot_picture_ranks])
def test_what_is_not_a_finite_matrix_is_refused(draw, matrix):
    with pytest.raises(ValueError, match=re.escape(f"got shape {tuple(matrix.shape)}")):
        draw(matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_tensors_of_any_type_can_be_drawn(dtype):
    fig = matrices.plot_singular_values(LOW_RANK.to(dtype).requires_grad_(dtype.is_floating_point))
    assert len(fig.axes[0].lines[0].get_ydata()) == 6


def pixels(data):
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


def test_show_sends_the_png_with_a_text_that_holds_no_address(monkeypatch):
    sent = []
    monkeypatch.setattr("IPython.display.display", lambda data, **more: sent.append((data, more)))
    fig = FIGURES["bars"]()
    assert show.show(fig) is None
    (data, more), = sent
    assert set(data) == {"text/html", "text/plain"} and data["text/plain"] == "<figure: Placement decides>"
    alt, width, png = re.fullmatch(r'<img alt="(.*)" width="(\d+)" src="data:image/png;base64,(.*)">',
                                   data["text/html"]).groups()
    assert alt == "Placement decides" and int(width) == round(100 * fig.get_figwidth()) and more == {"raw": True}
    shown, drawn = base64.b64decode(png), show.png(FIGURES["bars"]())
    assert len(shown) < 0.6 * len(drawn)                        # 256 colours, and no other picture
    assert np.abs(pixels(shown) - pixels(drawn)).mean() < 1


def test_show_says_what_the_picture_shows_to_who_does_not_see_it(monkeypatch):
    sent = []
    monkeypatch.setattr("IPython.display.display", lambda data, **more: sent.append(data["text/html"]))
    show.show(FIGURES["bars"](), alt='two bars, "a" < b')
    assert '<img alt="two bars, &quot;a&quot; &lt; b" ' in sent[0]


def test_a_title_that_is_cut_is_found_and_fails_where_claims_do(monkeypatch):
    long = "a title that is far too long for a figure of this size, which is six inches wide, and no more than that"
    for titles, cut in (({"title": "short"}, []), ({"title": long}, [long])):
        fig, _ = show.new_figure(**titles)
        show.png(fig)
        assert show.texts_cut(fig) == cut
    fig, _ = show.new_figure(title="short")
    fig.suptitle(long)
    legend, ax = show.new_figure(title="short")
    ax.plot([0, 1], label="below the figure")
    ax.legend(bbox_to_anchor=(0.5, -0.6), loc="upper center")
    legend.set_layout_engine("none")
    show.png(legend)
    assert show.texts_cut(legend) == ["below the figure"]
    monkeypatch.setenv("LORA_EDU_CLAIMS", "raise")
    with pytest.raises(ValueError, match="reaches beyond its figure: shorten it"):
        show.picture_html(fig)
    monkeypatch.delenv("LORA_EDU_CLAIMS")
    assert show.picture_html(fig).startswith("<img "), "a reader sees it all the same"


def test_no_module_and_no_notebook_imports_pyplot():
    files = [path for folder in ("lora_edu", "notebooks") for path in (ROOT / folder).rglob("*")]
    sources = {path.name: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".ipynb")}
    assert sources
    assert [name for name, text in sources.items()
            if re.search(r"import\b.*\bpyplot|pyplot\s+(import|as)|pylab", text)] == []


def test_the_sample_picture_is_square_grey_and_a_picture():
    picture = matrices.sample_picture(64)
    assert picture.shape == (64, 64) and 0 <= picture.min() < 0.2 and 0.8 < picture.max() <= 1
    sigma = np.linalg.svd(picture, compute_uv=False)
    assert (sigma[:8] ** 2).sum() > 0.9 * (sigma ** 2).sum()


def test_points_are_drawn_where_they_are_with_their_texts():
    fig = curves.plot_points({"LoRA": [(0.1, 4.0, "1e-3"), (0.2, 5.0, "2e-3")], "full": [(0.3, 4.5, "1e-4")]}, "t",
                             "change", "tales")
    lines = fig.axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[0.1, 4.0], [0.2, 5.0]], [[0.3, 4.5]]]
    assert [text.get_text() for text in fig.axes[0].texts] == ["1e-3", "2e-3", "1e-4"]
