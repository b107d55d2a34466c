"""The figures about rank and rate: they show what they were given, on log axes with plain ticks."""
import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lora_edu.course.figures import rates as gp
from lora_edu.course.page import show

RANKS = [1, 2, 4, 8, 16, 32]
CURVES = {"planted 2": (RANKS, [5, 1, 1, 1, 1, 1], [4, 0.5, 1, 1, 1, 1], [6, 2, 1, 1, 1, 1]),
          "planted 6": (RANKS, [9, 7, 4, 1, 1, 1], [8, 6, 3, 1, 1, 1], [9, 8, 5, 1, 1, 1])}
RATES = {1: [(0.008, 2.5), (0.002, 3.0), (0.004, 2.0), (0.016, None)],
         8: [(0.002, 1.5), (0.004, 1.0), (0.008, math.nan), (0.016, 4.0)]}
SIZES = {"alpha = 2r": [(1, 0.02), (4, 0.04), (16, 0.08)], "alpha fixed": [(1, 0.16), (4, 0.08), (16, 0.04)]}

FIGURES = {
    "ranks": lambda: gp.plot_rank_curves(CURVES, "Each bends at its planted rank", planted=(2, 6)),
    "rates": lambda: gp.plot_rates(RATES, "The best rate moves"),
    "sizes": lambda: gp.plot_update_sizes(SIZES, "One grows, one shrinks"),
}
every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


def named(fig):
    return {line.get_label(): line for line in fig.axes[0].lines}


def ticks(axis):
    """Texts of the ticks that are within the axis, as they are drawn."""
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    return [t.get_text() for t, at in zip(axis.get_ticklabels(), axis.get_ticklocs()) if low <= at <= high]


@every_figure
def test_a_figure_has_its_title_labels_and_a_legend(draw):
    fig = draw()
    assert 5 < len(show.title_of(fig)) < 60 and fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel()
    assert fig.axes[0].get_legend()


@every_figure
def test_the_png_is_the_same_each_time(draw):
    assert show.png(draw()) == show.png(draw())


def test_rank_curves_hold_their_values_bands_and_planted_ranks():
    fig = FIGURES["ranks"]()
    ax, lines = fig.axes[0], named(FIGURES["ranks"]())
    assert list(lines["planted 2"].get_xdata()) == RANKS
    assert list(lines["planted 6"].get_ydata()) == CURVES["planted 6"][1]
    assert len(ax.collections) == 2 and ax.get_xscale() == "log"
    assert np.isclose(ax.collections[0].get_paths()[0].vertices[:, 1].max(), 6)
    upright = [line for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in upright] == [2, 6]
    assert [line.get_color() for line in upright] == [lines[name].get_color()
                                                      for name in CURVES], "in the colour of its curve"
    assert [t.get_text() for t in ax.texts] == ["k = 2", "k = 6"] and [t.xy[0] for t in ax.texts] == [2, 6]
    assert ticks(ax.xaxis) == ["1", "2", "4", "8", "16", "32"] and ax.get_xlabel() == "rank r"


def test_without_planted_ranks_there_are_only_the_curves():
    assert len(gp.plot_rank_curves(CURVES, "Two curves").axes[0].lines) == 2


def test_rates_are_in_order_without_what_diverged_and_the_best_is_ringed():
    ax = FIGURES["rates"]().axes[0]
    drawn = {line.get_label(): line for line in ax.lines if len(line.get_xdata()) > 1}
    assert drawn["rank 1"].get_xydata().tolist() == [[0.002, 3.0], [0.004, 2.0], [0.008, 2.5]]
    assert drawn["rank 8"].get_xydata().tolist() == [[0.002, 1.5], [0.004, 1.0], [0.016, 4.0]]
    rings = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [ring.get_xydata().tolist()[0] for ring in rings] == [[0.004, 2.0], [0.004, 1.0]]
    assert all(ring.get_markerfacecolor() == "none" for ring in rings)
    assert ticks(ax.xaxis) == ["0.002", "0.004", "0.008", "0.016"] and ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["rank 1", "rank 8", "best rate of its rank"]


def test_ranks_differ_by_marker_and_grow_lighter():
    fig = gp.plot_rates({r: [(0.1, r), (0.2, r)] for r in (32, 1, 4, 16)}, "t")
    lines = [line for line in fig.axes[0].lines if len(line.get_xdata()) > 1]
    assert [line.get_label() for line in lines] == ["rank 1", "rank 4", "rank 16", "rank 32"]
    grey = [np.dot(to_rgb(line.get_color()), (0.2126, 0.7152, 0.0722)) for line in lines]
    assert grey == sorted(grey) and min(np.diff(grey)) > 0.08 and grey[-1] < 0.8
    assert len({line.get_marker() for line in lines}) == 4


def test_a_rank_whose_every_training_diverged_is_refused():
    with pytest.raises(ValueError, match="rank 64 has no finite loss at any of its 2"):
        gp.plot_rates({1: [(0.1, 2.0)], 64: [(0.1, None), (0.2, math.inf)]}, "t")


def test_sizes_are_on_two_log_axes_with_plain_ticks():
    ax = FIGURES["sizes"]().axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert named(ax.figure)["alpha = 2r"].get_xydata().tolist() == [[1, 0.02], [4, 0.04], [16, 0.08]]
    assert ticks(ax.xaxis) == ["1", "4", "16"] and ticks(ax.yaxis) == ["0.02", "0.05", "0.1"]
    assert "size of the update" in ax.get_ylabel()


def test_many_values_get_fewer_ticks():
    ax = gp.plot_rates({1: [(0.001 * 2**i, 1.0) for i in range(12)]}, "t").axes[0]
    assert ticks(ax.xaxis) == ["0.001", "0.004", "0.016", "0.064", "0.256", "1.024"]
