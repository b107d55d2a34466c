"""The rank-r picture, the target picker and the calculator: what goes to the page, and what is said without one."""
import base64

import numpy as np
import pytest
from torch import nn

from lora_edu.course.labs.lab import HERE, MOVE, Lab, module
from lora_edu.course.labs.memory_calculator import BEGIN, bill_of, memory_calculator
from lora_edu.course.labs.rank_picture import rank_picture
from lora_edu.course.labs.target_picker import target_picker
from lora_edu.lora.inject import apply_lora
from lora_edu.measure.memory import bill

PICTURE = np.add.outer(np.arange(20.0), np.arange(30.0)) + np.eye(20, 30)


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


def words(lab) -> str:
    shown, _ = lab._repr_mimebundle_()
    assert shown["text/plain"].endswith(MOVE) and MOVE in shown["text/html"]
    return shown["text/plain"].removesuffix("\n" + MOVE)


def test_a_lab_stores_words_and_a_picture_that_need_no_kernel():
    lab = Lab("target_picker", {}, {}, "one < two")
    shown, _ = lab._repr_mimebundle_()
    assert shown["text/html"] == "<p>one &lt; two<br>Run this cell to move it.</p>"
    assert shown["application/vnd.jupyter.widget-view+json"]["model_id"] == lab.model_id
    assert "0x" not in shown["text/plain"], "anywidget's own text form holds an address"
    picture = rank_picture(PICTURE)._repr_mimebundle_()[0]["text/html"]
    assert picture.startswith('<img alt="Few numbers make a recognisable picture" width=') and "base64,iVBOR" in picture


def test_a_module_is_whole_and_needs_nothing_but_model_and_element():
    for name in ("adapter_mixer", "alpha_dial", "memory_calculator", "merge_lab", "rank_alpha_map", "rank_picture",
                 "spectrum_explorer", "target_picker", "trainer"):
        source = module(name)
        assert "import " not in source.replace("important", "") and "render({ model, el })" in source, name
        assert source.count("export default") == 1 and "eval(" not in source and "http" not in source.replace(
            "http://www.w3.org/2000/svg", ""), name
        assert len((HERE / f"{name}.js").read_text(encoding="utf-8").splitlines()) < 200, name


def test_the_compressed_picture_counts_its_numbers_and_its_error():
    """Oracle: the best rank-r approximation misses exactly the singular values that were cut."""
    sigma = np.linalg.svd(PICTURE, compute_uv=False)
    for rank in (2, 20):
        error = (sigma[rank:] ** 2).sum() ** 0.5 / (sigma ** 2).sum() ** 0.5
        assert words(rank_picture(PICTURE, rank)) == (
            f"rank {rank}: {rank} × (20 + 30) = {50 * rank:,} numbers in place of 600 ({50 * rank / 600:.0%}); error "
            f"{error:.1%} of the picture's size (Frobenius norm)")


def test_the_factors_of_the_picture_come_back_from_their_sixteen_bits():
    data = rank_picture(PICTURE).data
    left, right = (np.frombuffer(base64.b64decode(part["base64"]), "<i2").reshape(20, -1) * part["scale"]
                   for part in (data["left"], data["right"]))
    assert np.allclose(left.T @ right, PICTURE, atol=0.02) and data["ranks"] == [*range(1, 17), 20]


@pytest.mark.parametrize("rank", [0, 21])
def test_a_rank_that_the_picture_does_not_have_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank={rank} does not fit a 20 x 30 picture: choose 1 <= rank <= 20"):
        rank_picture(PICTURE, rank)


def test_the_picker_counts_as_a_hand_does(model):
    """Oracle: two layers; at rank r a matrix (out, in) costs r (out + in)."""
    picker, frozen = target_picker(model, rank=3), 2 * (2 * 64 + 2 * 32 + 3 * 96) + 400
    assert words(picker) == (f"rank 3 on q_proj, v_proj: {2 * 3 * (16 + 12)} trainable numbers, "
                             f"{168 / (frozen + 168):.2%} of {frozen + 168:,}; the adapter is 672 bytes in float32")
    assert picker.data["ranks"] == [1, 2, 3, 4], "the largest rank is the smallest side"
    assert picker.data["groups"] == {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
                                     "MLP": ["gate_proj", "up_proj", "down_proj"]}
    assert words(target_picker(model, rank=2, chosen=())).startswith("rank 2 on nothing: 0 trainable numbers, 0.00% of")


def test_the_pickers_count_is_the_library_s(model):
    """Oracle: wrap the model for real and count the parameters that train."""
    said = words(target_picker(model, rank=2, chosen=("k_proj", "down_proj")))
    apply_lora(model, target_modules=["k_proj", "down_proj"], rank=2, alpha=4)
    assert f": {sum(p.numel() for p in model.parameters() if p.requires_grad)} trainable" in said


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="target_picker found no nn.Linear named q_proj, .* in this Sequential: give"):
        target_picker(nn.Sequential(nn.Linear(2, 2)))


def test_the_calculator_says_the_bill_and_the_cards_with_room():
    said = bill("llama-7b", length=2048)
    first, parts, room = words(memory_calculator("llama-7b")).splitlines()
    assert first == said.summary() and f"= {said.total:,.0f} bytes" in parts and room.startswith("fits on: ")
    assert words(memory_calculator("gpt3-175b")).splitlines()[2].startswith("fits on none of these cards: ")
    assert bill_of(BEGIN | {"model": "gpt2", "targets": "attention", "length": 128}).total == bill(
        "gpt2", targets=("attn.c_attn", "attn.c_proj"), length=128).total
    with pytest.raises(ValueError, match="model='llama': choose one of fable, "):
        memory_calculator("llama")
