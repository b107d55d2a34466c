"""Merging whole models: what is left is the plain model with other numbers, and the report says what rounding took."""
import copy
import weakref

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu import (
    LoRALinear,
    apply_lora,
    lora_off,
    lora_parameters,
    merge_lora,
    remove_lora,
    set_strength,
    unmerge_lora,
)
from lora_edu.lora.adapter_file import save_adapter
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.merge import MergeReport, Rounding
from lora_edu.measure.operators import matrix_products, operators
from lora_edu.models.llama import Llama
from tests.lora.tiny import IDS, MODELS, logits, our_llama, shake

LOW = {f"{kind} in bfloat16": lambda kind=kind: MODELS[kind]().bfloat16() for kind in ("ours", "transformers' Llama")}


def adapted(kind="ours", targets="all-linear", **how):
    """A model in eval mode whose adapter says something."""
    model = (MODELS | LOW)[kind]().eval()
    apply_lora(model, targets, rank=3, alpha=5, **how)
    shake(model)
    return model


def by_hand(model):
    """The merged weights, name -> float64: W₀ + alpha / rank times a sum of outer products."""
    for name, layer in lora_layers(model):
        delta = layer.alpha / layer.rank * sum(torch.outer(b, a)
                                               for b, a in zip(layer.lora_B.double().T, layer.lora_A.double()))
        yield name, layer.weight.double() + (delta.T if isinstance(layer.base_layer, Conv1D) else delta)


def everything(model):
    """All that a refused call might spoil: modules, modes, parameters by identity and bits, merged buffers, gradient
    flags.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return ([(name, id(module), module.training) for name, module in model.named_modules()],
            [(name, id(t), t.requires_grad, t.dtype, t.detach().double().numpy().tobytes()) for name, t in tensors])


# what is left after remove_lora(merge=True)

@pytest.mark.parametrize("kind", [*MODELS, *LOW])
def test_unloaded_is_the_plain_model_with_other_numbers(kind):
    plain = (MODELS | LOW)[kind]().eval()
    model = (MODELS | LOW)[kind]().eval()
    modules, storage = list(model.modules()), {name: p.data_ptr() for name, p in model.named_parameters()}
    apply_lora(model, rank=3, alpha=5)
    shake(model)
    want = dict(by_hand(model))
    remove_lora(model, merge=True)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert all(after is before
               for after, before in zip(model.modules(), modules, strict=True)), "the very modules it had"
    assert [(n, t.shape, t.dtype) for n, t in model.state_dict().items()] == [(n, t.shape, t.dtype)
                                                                              for n, t in plain.state_dict().items()]
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage, "written in place"
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    for module in model.modules():
        left = {key: hooks for key, hooks in vars(module).items() if "hooks" in key and hooks}
        assert not left and "forward" not in vars(module)
    for (name, ours), base in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name.removesuffix(".weight") in want:
            step = torch.finfo(ours.dtype).eps * want[name.removesuffix(".weight")].abs()
            assert ((ours.double() - want[name.removesuffix(".weight")]).abs() <= step + 1e-7).all(), name
        else:
            assert torch.equal(ours, base), name


@pytest.mark.parametrize("kind", [*MODELS, *LOW])
def test_outputs_are_bit_for_bit_those_of_a_model_loaded_with_the_merged_weights(kind, tmp_path):
    model = adapted(kind)
    apart = logits(model)
    remove_lora(model, merge=True)
    if kind.startswith("ours"):
        dtype = model.lm_head.weight.dtype
        model.save_folder(tmp_path, dtype)
        loaded = Llama.from_folder(tmp_path, dtype)
    else:
        loaded = (MODELS | LOW)[kind]().eval()
        loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(loaded))
    low = kind in LOW
    torch.testing.assert_close(logits(model), apart, rtol=0.05 if low else 1e-4, atol=0.05 if low else 1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_cause_of_no_latency_is_the_same_list_of_operators(kind):
    """Apart, every layer adds two thin products; merged and unloaded there is nothing that the base does not do."""
    base = operators(MODELS[kind]().eval(), IDS)
    model = adapted(kind)
    layers, apart = len(list(lora_layers(model))), operators(model, IDS)
    assert len(apart) > len(base) and matrix_products(apart) == matrix_products(base) + 2 * layers
    merge_lora(model)
    assert matrix_products(operators(model, IDS)) == matrix_products(base)
    if kind != "GPT-2":                               # Conv1D asks for its product in another way than F.linear
        assert operators(model, IDS) == base
    remove_lora(model, merge=True)
    assert operators(model, IDS) == base


@pytest.mark.parametrize("kind", ["transformers' Llama", "GPT-2"])
def test_peft_merges_the_same_factors_to_the_same_weights(kind, tmp_path):
    """Oracle: PEFT's merge_and_unload."""
    model = adapted(kind)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS[kind]().eval(), tmp_path).merge_and_unload()
    remove_lora(model, merge=True)
    assert list(model.state_dict()) == list(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


# what a merge leaves alone

@pytest.mark.parametrize("kind", [*MODELS, *LOW])
def test_merged_and_unmerged_everything_is_what_it_was(kind):
    model = adapted(kind)
    model.requires_grad_(True)                         # flags and modes that no one would guess
    model.get_submodule(next(name for name, _ in lora_layers(model))).lora_A.requires_grad_(False)
    next(m for m in model.modules() if isinstance(m, nn.Embedding)).train()
    before, state = everything(model), {name: t.clone() for name, t in model.state_dict().items()}
    apart = logits(model)
    merge_lora(model)
    merged = logits(model)
    assert not torch.equal(merged, apart) and model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    unmerge_lora(model)
    assert everything(model) == before and torch.equal(logits(model), apart)


def test_remove_keeps_flags_and_modes_and_asks_nothing_of_merge_false():
    model = adapted(dropout=0.1)
    layer = model.model["layers"][0].self_attn.q_proj
    layer.base_layer.weight.requires_grad_(True)
    model.train()
    remove_lora(model, merge=False)                    # dropout, in training mode: nothing is merged, nothing is wrong
    assert all(m.training for m in model.modules()) and layer.base_layer.weight.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == 1


def test_a_merged_model_is_merged_still_after_deepcopy_and_moves_with_to():
    model = adapted()
    merge_lora(model)
    merged, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), merged)
    unmerge_lora(twin)
    assert torch.equal(logits(model), merged) and not torch.equal(logits(twin), merged), "the copy is its own"
    double = copy.deepcopy(model).double()
    assert {t.dtype for t in [*double.parameters(), *double.buffers()]} == {torch.float64}
    torch.testing.assert_close(logits(double).float(), merged, rtol=1e-4, atol=1e-6)

    unloaded = copy.deepcopy(model)
    remove_lora(unloaded, merge=True)
    low = copy.deepcopy(unloaded).bfloat16()
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low.parameters(), unloaded.parameters(), strict=True))
    assert torch.equal(logits(low), logits(model.bfloat16())), "merged, then rounded; or merged, unloaded, then rounded"


def test_remove_takes_a_merged_model_and_writes_the_same_bits():
    merged = adapted()
    apart = copy.deepcopy(merged)
    merge_lora(merged)
    reports = remove_lora(merged, merge=True), remove_lora(apart, merge=True)
    assert reports[0] == reports[1]
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), apart.parameters(), strict=True))


def test_each_sum_is_made_once_or_checked_and_then_made_one_at_a_time(monkeypatch):
    model, alive, most, fold = adapted(), weakref.WeakSet(), [], LoRALinear.fold

    def spy(layer):
        most.append(len(alive))
        weight, delta = fold(layer)
        alive.add(weight)
        return weight, delta

    monkeypatch.setattr(LoRALinear, "fold", spy)
    merge_lora(model)
    assert most == list(range(14)), "seven matrices in each of two layers, all kept"
    unmerge_lora(model)
    most.clear()
    remove_lora(model, merge=True)
    assert len(most) == 28 and max(most) <= 1, "checked and thrown away, then written: never a second copy of the model"


# what is refused

def last(model):
    return list(lora_layers(model))[-1][1]


def spoil(model, value):
    lora_parameters(model)[-1].data[0, 0] = value      # the last: what is written before all is checked shows


REFUSED = {
    "merge, dropout in training mode": (lambda m: last(m).train(), merge_lora, RuntimeError,
                                        r"training mode with dropout=0\.1.*model\.eval\(\)"),
    "remove, dropout in training mode": (lambda m: last(m).train(), lambda m: remove_lora(m, merge=True), RuntimeError,
                                         r"model\.eval\(\)"),
    "one layer, dropout in training mode": (lambda m: last(m).train(), lambda m: last(m).merge(), RuntimeError,
                                            r"model\.eval\(\)"),
    "merge, a NaN": (lambda m: spoil(m, float("nan")), merge_lora, ValueError, r"layers\.1\.mlp\.down_proj: .*not "
                     r"finite.*learning rate"),
    "remove, a NaN": (lambda m: spoil(m, float("nan")), lambda m: remove_lora(m, merge=True), ValueError, r"down_proj: "
                      r".*not finite"),
    "one layer, infinite": (lambda m: spoil(m, float("inf")), lambda m: last(m).merge(), ValueError, "16 x 24 weight "
                                                                                                     "is not finite"),
    "merge twice": (merge_lora, merge_lora, RuntimeError, r"merged already.*and 6 more.*unmerge_lora\(model\)"),
    "merge, one is merged": (lambda m: last(m).merge(), merge_lora, RuntimeError, "merged already: .*down_proj"),
    "unmerge what is apart": (lambda m: None, unmerge_lora, RuntimeError, r"not merged.*merge_lora\(model\)"),
    "unmerge, one is apart": (lambda m: (merge_lora(m), last(m).unmerge()), unmerge_lora, RuntimeError, "not merged: "
                                                                                                        ".*down_proj"),
    "remove a merged one, dropout in training mode": (lambda m: (merge_lora(m), m.train()),
                                                      lambda m: remove_lora(m, merge=True),
                                                      RuntimeError, r"model\.eval\(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence_and_nothing_is_changed(case):
    prepare, call, error, message = REFUSED[case]
    model = adapted(dropout=0.1)
    prepare(model)
    before = everything(model)
    with pytest.raises(error, match=message) as caught:
        call(model)
    assert everything(model) == before and "\n" not in str(caught.value)


def test_a_sum_beyond_float16_is_refused_and_says_which_dtypes_fit():
    model = our_llama().half().eval()
    apply_lora(model, rank=2)
    spoil(model, 1e6)
    lora_parameters(model)[-2].data.fill_(1.0)
    before = everything(model)
    for call in (merge_lora, lambda m: remove_lora(m, merge=True)):
        with pytest.raises(ValueError, match=r"down_proj: .*not finite in float16 \(largest: 6.55e\+04\).*bfloat16 or "
                           r"float32"):
            call(model)
        assert everything(model) == before


def test_dropout_in_eval_mode_and_training_mode_without_dropout_merge():
    for model in (adapted(dropout=0.1).eval(), adapted(dropout=0.0).train()):
        apart = copy.deepcopy(model)
        merge_lora(model)
        torch.testing.assert_close(logits(model), logits(apart), rtol=1e-4, atol=1e-5)
        remove_lora(model, merge=True)
        torch.testing.assert_close(logits(model), logits(apart), rtol=1e-4, atol=1e-5)


# how the sum is made

def one_layer(base=torch.bfloat16, factors=torch.float32):
    torch.manual_seed(0)
    layer = LoRALinear.wrap(nn.Linear(64, 48).to(base), 4, 6.0).eval()
    nn.init.normal_(layer.lora_B, std=0.01)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(factors), layer.lora_B.data.to(factors)
    return layer


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])     # model.bfloat16() takes the factors along
def test_a_sum_in_bfloat16_is_made_in_float32_and_rounded_once(factors):
    """Not what 16-bit arithmetic gives: the product, the update and the sum each rounded."""
    layer = one_layer(factors=factors)
    A, B = layer.lora_A.detach().float(), layer.lora_B.detach().float()
    exact = layer.weight.double() + 1.5 * B.double() @ A.double()
    folded = layer.folded_weight()
    assert folded.dtype == torch.bfloat16 and torch.equal(folded, (layer.weight.float() + 1.5 * (B @ A)).bfloat16())
    nearest = exact.float().bfloat16()
    assert (folded != nearest).float().mean() < 0.002, "only where float32 itself stands on the fence"
    rounded_twice = layer.weight + (1.5 * (B.bfloat16() @ A.bfloat16())).bfloat16()
    assert (rounded_twice != nearest).float().mean() > 0.02


def test_the_widest_dtype_decides_and_autocast_does_not():
    layer = one_layer(torch.float64)
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    torch.testing.assert_close(layer.folded_weight(), layer.weight + 1.5 * B @ A, rtol=0, atol=1e-15)
    layer = one_layer(torch.float32)
    want = layer.folded_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.folded_weight(), want)


# what the report says

def test_the_report_of_a_bfloat16_model_counts_what_numpy_counts():
    model = adapted("ours in bfloat16", ["q_proj", "down_proj"])
    for parameter in lora_parameters(model):
        parameter.data *= 0.03                         # small enough that some of it is lost
    before = {name: layer.weight.double().numpy() for name, layer in lora_layers(model)}
    update = {name: (layer.alpha / layer.rank * layer.lora_B.detach().double() @ layer.lora_A.detach().double()).numpy()
              for name, layer in lora_layers(model)}
    report = merge_lora(model)
    after = {name: layer.merged_weight.double().numpy() for name, layer in lora_layers(model)}
    lost = {name: int((after[name] == before[name]).sum()) for name in before}
    assert isinstance(report, MergeReport) and list(report.parts) == list(before) and report.dtype == "bfloat16"
    assert {name: part.lost for name, part in report.parts.items()} == lost and 0.2 < report.total.rounded_away < 0.95
    everywhere = [np.concatenate([values[name].ravel() for name in before]) for values in (before, update, after)]
    W, D, M = everywhere
    assert report.total.entries == report.total.asked == len(W)
    assert report.total.rounded_away == sum(lost.values()) / len(W)
    assert report.total.size == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W), rel=1e-5)
    assert report.total.error == pytest.approx(np.linalg.norm(M - W - D) / np.linalg.norm(D), rel=1e-5)
    assert report.extra_bytes == sum(b.nbytes for n, b in model.named_buffers()
                                     if n.endswith("merged_weight")) == 2 * len(W)
    unmerge_lora(model)
    unloaded = remove_lora(model, merge=True)
    assert unloaded.parts == report.parts and unloaded.extra_bytes == 0


def test_the_report_of_a_float32_model_says_that_next_to_nothing_was_lost():
    report = merge_lora(adapted("GPT-2"))
    assert report.total.rounded_away < 1e-3 and 0 < report.total.error < 1e-6 and report.dtype == "float32"


def test_an_update_of_zero_divides_by_nothing():
    model = our_llama()
    apply_lora(model, rank=2)
    total = merge_lora(model).total
    assert (total.asked, total.lost, total.size, total.rounded_away, total.error) == (0, 0, 0, 0, 0)
    silent = Rounding.of(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    assert silent.size == float("inf") and silent.error == 0


def test_only_entries_with_an_update_can_lose_it():
    """By hand: bfloat16 numbers from 1 to 2 are 1/128 apart; half a step goes to the even neighbour, which is 1."""
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    delta = torch.tensor([[0.0, 1 / 256, 1.01 / 256, 1 / 128]])
    part = Rounding.of(weight, delta, (weight.float() + delta).bfloat16())
    assert (part.entries, part.asked, part.lost) == (4, 3, 1) and part.rounded_away == 1 / 3
    assert part.error == pytest.approx(float(np.hypot(1 / 256, 0.99 / 256) / np.linalg.norm(delta.double())), rel=1e-6)


def test_the_report_displays_one_row_for_each_kind_of_layer_and_one_sentence():
    model = adapted("ours", ["q_proj", "down_proj"])
    model.model["layers"][0].self_attn.q_proj.base_layer.bfloat16()
    report = merge_lora(model)
    assert report.dtype == "bfloat16, float32" and report.extra_bytes == 2 * 256 + 4 * 256 + 2 * 4 * 16 * 24
    assert [row[:2] for row in report.rows()] == [("q_proj", "2"), ("down_proj", "2")]
    text, page = str(report), report._repr_html_()
    assert text == repr(report) and len(text.splitlines()) == 4 and text.splitlines()[-1] == report.summary()
    assert "4 matrices in bfloat16, float32, 1,280 entries" in text and f"{report.extra_bytes:,} more bytes" in text
    assert "<table>" in page and page.count("<tr>") == 3 and f"{report.total.size:.3g}" in page
    kind = Rounding.total(*(part for name, part in report.parts.items() if name.endswith("q_proj")))
    assert report.rows()[0][2:] == (f"{kind.size:.3g}", f"{kind.rounded_away:.1%}", f"{kind.error:.2g}")


def test_remove_without_merge_has_nothing_to_report():
    assert remove_lora(adapted(), merge=False) is None


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("merged", [False, True])
def test_off_is_the_base_bit_for_bit_and_on_again_what_it_was(kind, merged):
    base, model = logits(MODELS[kind]().eval()), adapted(kind)
    if merged:
        merge_lora(model)
    said = logits(model)
    with lora_off(model):
        assert torch.equal(logits(model), base)
        with lora_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base), "the inner one leaves the outer one's off"
    assert torch.equal(logits(model), said) and not torch.equal(said, base)
    with pytest.raises(KeyError), lora_off(model):
        raise KeyError
    assert torch.equal(logits(model), said), "an error inside leaves it on"


def test_off_is_the_base_even_where_a_factor_is_not_finite():
    """PEFT's `disable_adapter` does the same; a strength of 0 would make 0 * nan."""
    base, model = logits(our_llama()), adapted()
    next(lora_layers(model))[1].lora_A.data[0, 0] = torch.nan
    with lora_off(model):
        assert torch.equal(logits(model), base)


def test_strength_keeps_the_rule():
    model = our_llama().eval()
    apply_lora(model, rank=4, alpha=6, rslora=True)
    shake(model)
    full = logits(model)
    set_strength(model, 0.0)
    assert torch.equal(logits(model), logits(our_llama()))
    set_strength(model, 1.0)
    assert torch.equal(logits(model), full) and next(lora_layers(model))[1].scaling == 3
