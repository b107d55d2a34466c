"""The figures and the calculator of the memory bill: every number against the bill, every control moves, every card
is judged.
"""
import re

import pytest
import torch

from lora_edu.course.figures import memory as plots
from lora_edu.course.labs.memory_calculator import LENGTHS, RANKS, TARGETS, WHERE, memory_calculator
from lora_edu.lora.inject import apply_lora
from lora_edu.measure.memory import bill
from lora_edu.measure.memory_measured import measure
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.sizes import PRESETS, Sizes
from lora_edu.training.loop import loss_on


def widths(ax):
    return {box.get_label(): [bar.get_width() for bar in box] for box in ax.containers}


def test_bars_are_the_parts_and_end_to_end():
    bills = {"full": bill("gpt2", "full", length=512), "LoRA": bill("gpt2", length=512)}
    fig = plots.plot_bills(bills, "two bills")
    (ax,) = fig.axes
    assert ax.get_title() == "two bills" and [label.get_text() for label in ax.get_yticklabels()] == list(bills)
    for part, found in widths(ax).items():
        assert found == pytest.approx([each.parts[part] / 1e9 for each in bills.values()]), part
    ends = [max(box[i].get_x() + box[i].get_width() for box in ax.containers) for i in range(2)]
    assert ends == pytest.approx([each.total / 1e9 for each in bills.values()])
    assert ax.get_xlim()[1] > max(ends)


def test_cards_stand_where_they_are_and_names_do_not_cover_each_other():
    for largest, names in ((20e9, ["T4\n16"]), (100e9, ["A100, H100\n80", "A100\n40", "L4\n24", "T4\n16"]),
                           (3000e9, ["A100, H100\n80"])):
        fig = plots.new_figure()[0]
        plots.frame(fig.axes[0], largest)
        assert [text.get_text() for text in fig.axes[0].texts] == names
        lines = [line.get_xdata()[0] for line in fig.axes[0].lines]
        assert lines == [size for size in reversed(plots.CARDS.values()) if size * 1e9 < largest * 1.08]


@pytest.mark.parametrize("total, cards",
                         [(16e9, ["T4", "L4", "A100", "A100, H100"]), (16e9 + 1, ["L4", "A100", "A100, H100"]),
                                          (79e9, ["A100, H100"]), (81e9, [])])
def test_what_fits_on(total, cards):
    assert plots.fits_on(total) == cards


def test_prediction_beside_measurement():
    model = Llama(LlamaConfig(30, 16, 24, 2, 2, 2, 32))
    apply_lora(model, rank=2, alpha=4)
    ids = torch.zeros(1, 5, dtype=torch.long)
    pair = (bill(Sizes("llama", 30, 16, 24, 2, 2, 2, 32, 8), rank=2, recipe="fp32", length=5),
            measure(model, lambda: loss_on(model, (ids, ids))))
    for pairs in ({"LoRA": pair}, {"LoRA": pair, "again": pair}):
        fig = plots.plot_beside(pairs, "beside")
        assert len(fig.axes) == len(pairs)
        for ax in fig.axes:
            predicted, measured = ([bar.get_width() for bar in box] for box in ax.containers)
            assert predicted == pytest.approx([pair[0].parts[part] / 1e6 for part in pair[1].parts])
            assert measured == pytest.approx([size / 1e6 for size in pair[1].parts.values()])


def controls(box):
    row, image, text = box.children
    return {each.description: each for each in row.children}, image, text


def total(text):
    return int(re.search(r"= ([\d,]+) bytes", text.value)[1].replace(",", ""))


def test_the_calculator_says_the_bill_of_every_control():
    found, image, text = controls(memory_calculator("llama-7b"))
    want = dict(method="lora", rank=8, targets="all-linear", recipe="bf16-mixed", optimizer="adam", batch=1,
                length=2048)

    def agrees(model="llama-7b"):
        return total(text) == round(bill(model, **want).total)
    assert agrees() and "fits on: A100 (40 GB), A100, H100 (80 GB)" in text.value
    moves = [("rank r", 64, "rank", 64), ("targets", "queries and values", "targets", ("q_proj", "v_proj")),
             ("recipe", "nf4", "recipe", "nf4"),
             ("optimizer", "sgd", "optimizer", "sgd"), ("batch", 5, "batch", 5), ("length", 512, "length", 512),
             ("checkpointing", True, "checkpointing", True), ("recipe", "16-bit", "recipe", "16-bit"),
             ("method", "full", "method", "full")]
    for control, value, name, means in moves:
        before = image.value, text.value
        found[control].value = value
        want[name] = means
        assert agrees() and image.value != before[0] and text.value != before[1], control


def test_a_text_longer_than_the_context_is_cut_to_it_and_said():
    found, _, text = controls(memory_calculator("llama-7b"))
    found["length"].value = 8192
    assert "(length 2048, the whole context)" in text.value and total(text) == round(bill("llama-7b").total)


def test_four_bits_in_full_is_a_sentence_and_not_a_traceback():
    found, _, text = controls(memory_calculator("llama-7b"))
    found["recipe"].value = "nf4"
    found["method"].value = "full"
    assert "four bits" in text.value


def test_what_fits_nowhere_is_counted_in_cards():
    found, _, text = controls(memory_calculator("gpt3-175b"))
    found["method"].value = "full"
    assert f"fits on none of these cards: {bill('gpt3-175b', 'full').total / 80e9:.1f} times" in text.value


@pytest.mark.slow
@pytest.mark.parametrize("model", PRESETS)
def test_every_model_has_every_target_and_rank(model):
    for targets in TARGETS[PRESETS[model].kind].values():
        bill(model, targets=targets, length=min(LENGTHS[-1], PRESETS[model].context))
    found, _, text = controls(memory_calculator(model))
    for value in [*WHERE][::-1]:
        found["targets"].value = value
        assert "numbers train" in text.value
    found["rank r"].value = RANKS[-1]          # either a bill, or a sentence that says what fits
    assert "numbers train" in text.value or "rank=256 does not fit" in text.value
