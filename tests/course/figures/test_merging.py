"""The figures about time and about the methods: they show what they were given, and no name covers another."""
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lora_edu.course.figures import merging as mp
from lora_edu.course.page import show

ROWS = ["LoRA", "LoRA merged", "merged and unloaded", "adapters (two a block)", "adapters (one a block)", "prefix"]
TIMES = {shape: {name: (1 + 0.1 * i + j, 0.97 + 0.1 * i + j, 1.05 + 0.1 * i + j) for i, name in enumerate(ROWS)}
         for j, shape in enumerate(("1×16", "1×128", "8×128", "32×256"))}
METHODS = ("full", "LoRA", "adapters (two a block)", "adapters (one a block)", "prefix", "prompt", "BitFit",
           "every number", "LoRA on q, v")
ENDS = {name: [(tales + 0.3 * i, task * 1.3**i) for tales, task in ((4.0, 0.2), (4.1, 0.22), (4.2, 0.3))]
        for i, name in enumerate(METHODS)}
CROWDED = {name: [(4.5 + 0.05 * i, 0.25 + 0.01 * (i % 3))] for i, name in enumerate(METHODS[:7])}
AT_THE_EDGE = {name: [(5.9 + 0.02 * i, 0.3)] for i, name in enumerate(METHODS[:4])}
BASE = (3.3, 4.3)
KEPT = {"bfloat16": [(0.001, 0.5), (0.01, 0.98)], "float16": [(0.001, 0.99), (0.01, 1.0)]}

FIGURES = {"latency": lambda: mp.plot_latency(TIMES, "Who pays at batch 1"),
           "plane": lambda: mp.plot_methods_plane(ENDS, BASE, "Where each method ends", floor=2.1),
           "gain": lambda: mp.plot_gain_kept(KEPT, {"ours": 0.5, "theirs": 0.1}, "A small update is lost")}
every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


def noisy(shape="8×128", name="prefix"):
    return TIMES | {shape: TIMES[shape] | {name: None}}


def names_of(ax):
    return {text.get_text(): text for text in ax.texts if text.get_text()}


@every_figure
def test_a_figure_has_its_title_and_says_its_unit(draw):
    fig = draw()
    assert 5 < len(show.title_of(fig)) < 60
    said = (fig.get_supxlabel() if len(fig.axes) > 1 else fig.axes[0].get_xlabel() + fig.axes[0].get_ylabel())
    assert "no unit" in said or said.count("nats per token") == 2


def test_the_gain_kept_has_its_lines_and_its_marks():
    ax = FIGURES["gain"]().axes[0]
    drawn = [list(zip(line.get_xdata(), line.get_ydata())) for line in ax.lines[:2]]
    assert drawn == list(KEPT.values()) and ax.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == [0.5, 0.1] and list(names_of(ax)) == ["ours", "theirs"]


def test_the_line_of_a_plane_says_what_it_is():
    ax = mp.plot_methods_plane(ENDS, BASE, "Where each method ends", floor=0.135, floor_is="entropy")
    assert "entropy" in names_of(ax.axes[0]) and "ignores its input" not in names_of(ax.axes[0])


@every_figure
def test_the_png_is_the_same_each_time(draw):
    assert show.png(draw()) == show.png(draw())


def test_each_panel_holds_its_shape_and_each_row_its_variant():
    panels = FIGURES["latency"]().axes
    assert [re.search(r"\d+×\d+", ax.get_title())[0] for ax in panels[:-1]] == list(TIMES)
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ROWS
    for ax, found in zip(panels, TIMES.values()):
        bars, dots = [[line for line in ax.lines if line.get_color() == show.BLUE and line.get_marker() == m]
                      for m in ("None", "o")]
        for y, (name, (ratio, low, high)) in enumerate(found.items()):
            assert list(bars[y].get_xdata()) == [low, high] and list(bars[y].get_ydata()) == [y, y], name
            assert list(dots[y].get_xdata()) == [ratio] and list(dots[y].get_ydata()) == [y]
        assert ax.get_ylim() == (5.5, -0.5), "the first variant is on top"


def test_the_axes_are_log_hold_everything_and_have_plain_ticks():
    for ax in FIGURES["latency"]().axes:
        low, high = ax.get_xlim()
        assert ax.get_xscale() == "log" and low < 0.97 and high > 4.55
        ticks = [text.get_text() for text in ax.get_xticklabels()]
        assert ticks == ["1", "1.2", "1.5", "2", "3", "5"] or ticks == ["1", "1.2", "1.5", "2", "3"]
        assert any(list(line.get_xdata()) == [1, 1] for line in ax.lines), "the base is a line at 1"


def test_what_is_too_noisy_is_drawn_as_that_and_has_no_point():
    ax = mp.plot_latency(noisy(), "t").axes[2]
    (span,) = ax.patches
    assert names_of(ax)["too noisy"].xy[1] == 5 and span.get_y() < 5 < span.get_y() + span.get_height()
    assert not any(5 in line.get_ydata() for line in ax.lines if line.get_color() == show.BLUE)
    assert not any(other.patches for other in mp.plot_latency(noisy(), "t").axes[:2])


def test_the_paper_s_ratios_stand_hollow_in_the_rows_of_the_adapters():
    """Oracle: table 1 of the paper in milliseconds."""
    table = {"32×512": (1449.4, 1482.0, 1492.2), "16×256": (338.0, 354.8, 366.3), "1×128": (19.8, 23.9, 25.8)}
    ax = FIGURES["latency"]().axes[-1]
    lines = {line.get_label(): line for line in ax.lines if line.get_label() in table}
    assert lines.keys() == table.keys() and len({line.get_marker() for line in lines.values()}) == 3
    for shape, (base, one, two) in table.items():
        points = dict(zip([ROWS[y] for y in lines[shape].get_ydata()], lines[shape].get_xdata()))
        want = {"adapters (one a block)": one / base, "adapters (two a block)": two / base}
        assert points == pytest.approx(want, abs=6e-4)
        assert lines[shape].get_markerfacecolor() == "none"
    assert "Hu et al." in ax.get_title()


def test_without_adapters_the_paper_s_panel_is_empty():
    few = {"1×16": {"LoRA": (1.5, 1.4, 1.6)}}
    assert not any(len(line.get_xdata()) for line in mp.plot_latency(few, "t").axes[-1].lines
                   if line.get_label() in mp.PAPER)


def test_shapes_with_other_variants_are_refused():
    other = TIMES | {"1×128": {"LoRA": (1.0, 0.9, 1.1)}}
    with pytest.raises(ValueError, match="1×128 has the variants LoRA: give LoRA, LoRA merged, .* and None where a "
                                         "time is too noisy"):
        mp.plot_latency(other, "t")


def test_each_method_is_its_mean_with_a_cross_of_its_extremes():
    ax = FIGURES["plane"]().axes[0]
    dots = {line.get_label(): line for line in ax.lines if line.get_label() in ENDS}
    crosses = [line for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata()) == 2
               and line.get_linestyle() == "-"]
    for i, (name, seeds) in enumerate(ENDS.items()):
        mean = np.mean(seeds, axis=0)
        assert np.allclose([dots[name].get_xdata()[0], dots[name].get_ydata()[0]], mean), name
        flat, upright = crosses[2 * i:2 * i + 2]
        assert np.allclose(flat.get_xdata(), [seeds[0][0], seeds[2][0]]) and np.allclose(flat.get_ydata(), mean[1])
        assert np.allclose(upright.get_ydata(), [seeds[0][1], seeds[2][1]])
        assert np.allclose(upright.get_xdata(), mean[0])
    assert any(line.get_marker() == "*" and line.get_xydata().tolist() == [list(BASE)] for line in ax.lines)


def test_no_two_methods_look_alike():
    lines = [line for line in FIGURES["plane"]().axes[0].lines if line.get_label() in ENDS]
    looks = {(line.get_marker(), to_rgb(line.get_markerfacecolor())) for line in lines}
    assert len(looks) == len(lines) == 9


@pytest.mark.parametrize("ends", [ENDS, CROWDED, AT_THE_EDGE], ids=["apart", "crowded", "at the edge"])
def test_every_name_stands_by_itself(ends):
    """No name covers another, a point, or the edge; each is nearer to its own point than to any other, or a line
    leads to it.
    """
    fig = mp.plot_methods_plane(ends, BASE, "t", floor=2.1)
    fig.draw_without_rendering()
    (ax,), names = fig.axes, names_of(fig.axes[0])
    assert names.keys() == ends.keys() | {"before training", "ignores its input"}
    boxes = {name: text.get_window_extent() for name, text in names.items()}
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for what, other in boxes.items() if what != name), name
        assert ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
    places = {name: ax.transData.transform(np.mean(seeds, axis=0)) for name, seeds in ends.items()}
    for name, box in boxes.items():
        assert not any(box.contains(*place) for place in places.values()), name
    led = {tuple(text.xy) for text in ax.texts if getattr(text, "arrow_patch", None)}
    for name, place in places.items():
        def away(box):
            return np.hypot(max(box.x0 - place[0], 0, place[0] - box.x1), max(box.y0 - place[1], 0, place[1] - box.y1))
        nearest = min(places, key=lambda other: away(boxes[other]))
        assert nearest == name or tuple(np.mean(ends[name], axis=0)) in led, name


def test_the_floor_is_optional_and_the_task_axis_is_log_with_plain_ticks():
    ax = mp.plot_methods_plane(ENDS, BASE, "t").axes[0]
    assert ax.get_yscale() == "log" and "ignores its input" not in names_of(ax)
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    shown = [t.get_text() for t, at in zip(ax.get_yticklabels(), ax.get_yticks()) if low <= at <= high]
    assert {"0.2", "0.5", "1", "2"} <= set(shown) and not any("10^" in text for text in shown)
    floored = FIGURES["plane"]().axes[0]
    assert any(list(line.get_ydata()) == [2.1, 2.1] for line in floored.lines)
