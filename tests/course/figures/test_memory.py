"""The figures of the memory bill: every number against the bill, every card is judged."""
import pytest
import torch

from lora_edu.course.figures import memory as plots
from lora_edu.lora.inject import apply_lora
from lora_edu.measure.memory import bill
from lora_edu.measure.memory_measured import measure
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.sizes import Sizes
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
