"""The records of notebook 06: they run end to end on tiny models, and hold what the notebook reads."""
import json

import pytest
import torch

from lora_edu import load_pretrained
from lora_edu.course.records import merging, runs
from lora_edu.course.records.merging import SMOLLM2, equal_budget, latency, table
from lora_edu.measure.timing import Times
from lora_edu.lora.inject import linear_layers
from lora_edu.models.llama import Llama
from lora_edu.rivals.bottleneck import apply_adapters
from lora_edu.rivals.methods import METHODS
from lora_edu.rivals.virtual_tokens import apply_prefix
from tests.lora.tiny import our_llama

pytestmark = pytest.mark.slow

VARIANTS = ["base", "LoRA", "LoRA merged", "merged and unloaded", "LoRA on q and v",
            "adapters (two a block)", "adapters (one a block)", "prefix"]


def on(patch, device_type):
    """As if this were the best device; what is measured stays on the CPU."""
    class Device:
        type = device_type
    patch.setattr(merging, "best_device", Device)
    patch.setattr(Llama, "to", lambda self, device: self)
    patch.setattr(merging, "load_pretrained", lambda: (our_llama(positions=512).eval(), None))
    patch.setattr(merging, "SMOLLM2", our_llama(positions=512, kv_heads=2).config)


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        on(patch, "cpu")
        return latency(rounds=5)


def test_both_models_at_the_shapes_that_a_cpu_can_do(made):
    assert list(made["models"]) == ["fable", "135M"]
    shapes = {name: [(shape["batch"], shape["length"]) for shape in found["shapes"]]
              for name, found in made["models"].items()}
    assert shapes == {"fable": [(1, 16), (1, 128), (8, 128), (32, 256)], "135M": [(1, 16), (1, 128)]}
    assert [entry.split(":")[0] for entry in made["settings"]["left out"]] == ["135M at 8 x 128", "135M at 32 x 256"]


def test_the_settings_are_there(made):
    settings = made["settings"]
    assert (settings["rank"], settings["rounds"], settings["tokens decoded"]) == (8, 5, 8)
    assert {key: settings[key] for key in ("bottleneck", "prefix", "narrow")} == equal_budget(our_llama().config)
    for found, kv_heads in zip(made["models"].values(), (1, 2), strict=True):
        model = our_llama(positions=512, kv_heads=kv_heads)
        assert found["dtype"] == "float32" and found["parameters"] == sum(p.numel() for p in model.parameters())
        assert {key: found[key] for key in ("bottleneck", "prefix", "narrow")} == equal_budget(model.config)
    json.dumps(made, allow_nan=False)


def test_the_rounds_are_said(made):
    assert [shape["rounds"] for shape in made["models"]["fable"]["shapes"]] == [50, 50, 5, 5]
    assert [shape["rounds"] for shape in made["models"]["135M"]["shapes"]] == [5, 5]


def test_every_variant_has_its_times_and_its_ratio(made):
    for found in made["models"].values():
        for shape in found["shapes"]:
            for part in (shape["prefill"], shape["decode"]):
                assert list(part) == VARIANTS
                for row in part.values():
                    assert row.keys() == {"ms", "low", "high", "ratio", "ratio_low", "ratio_high"}
                    assert 0 < row["low"] <= row["ms"] <= row["high"]
                    assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
                assert [part["base"][key] for key in ("ratio", "ratio_low", "ratio_high")] == [1, 1, 1]


def test_the_operators_are_counted(made):
    for found in made["models"].values():
        seen, products = found["operators"], found["matrix products"]
        assert list(seen) == list(products) == VARIANTS
        assert seen["base"] == seen["LoRA merged"] == seen["merged and unloaded"] < min(seen["LoRA"],
                                                                                        seen["adapters (one a block)"])
        assert [products[name] for name in VARIANTS] == [15, 15 + 28, 15, 15, 15 + 8, 15 + 8, 15 + 4, 15]


def test_decoding_at_one_length_is_measured_once(made):
    shapes = {(s["batch"], s["length"]): s["decode"] for s in made["models"]["fable"]["shapes"]}
    assert shapes[1, 128] == shapes[8, 128] and shapes[1, 16] != shapes[1, 128] != shapes[32, 256]


def test_on_a_gpu_nothing_is_left_out(monkeypatch):
    on(monkeypatch, "cuda")
    asked = []
    monkeypatch.setattr(merging, "measure", lambda base, shapes, rounds, many: asked.append((shapes, rounds, many)))
    assert latency(rounds=6)["settings"]["left out"] == []
    assert asked == [(merging.SHAPES, 60, 60)] * 2


def test_a_table_is_in_milliseconds_of_one_call():
    row = table(Times({"base": torch.full((5,), 0.008).numpy(),
                       "LoRA": torch.tensor([1, 2, 3, 4, 5]).double().numpy() / 100}), 8)["LoRA"]
    assert (row["ms"], row["low"], row["high"], row["ratio"]) == (3.75, 2.5, 5.0, 3.75)


@pytest.mark.parametrize("config, want", [(load_pretrained()[0].config, (38, 76)), (SMOLLM2, (35, 212))],
                         ids=["fable", "135M"])
def test_budgets_are_equal_within_two_per_cent(config, want):
    """Counted on the model's own parameters, on the meta device: no weights are made. A LoRA by its formula, r (out +
    in) a matrix, because none goes beside weights without values.
    """
    budget = equal_budget(config)
    assert (budget["bottleneck"], budget["prefix"]) == want
    with torch.device("meta"):
        models = [Llama(config) for _ in range(2)]
        lora = 8 * sum(sum(m.weight.shape) for name, m in linear_layers(models[0]).items() if name != "lm_head")
        apply_adapters(models[0], budget["bottleneck"], "houlsby")
        apply_adapters(models[1], 2 * budget["bottleneck"], "lin")
    two, one = (sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models)
    assert two == pytest.approx(lora, rel=0.02) and one == pytest.approx(lora, rel=0.02)
    prefix = 2 * budget["prefix"] * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert prefix == pytest.approx(lora, rel=0.02)


def test_the_prefix_trains_what_the_formula_says():
    model = our_llama(positions=512)
    apply_prefix(model, torch.zeros(1, 6, dtype=torch.long))
    # k and v, P, H_kv, D, layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 6 * 1 * 8 * 2


def test_smollm2_has_its_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(SMOLLM2).parameters()) == 134_515_008


# methods

def test_methods_has_what_the_notebook_reads_and_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(runs, "tune", lambda rates, one_run: tried.append(rates) or [one_run(rates[1])])
    names = ("prefix", "BitFit")
    made = merging.methods(steps=2, every=1, seeds=(1, 2), n=8, names=names, scratch=str(tmp_path))
    assert tried == [merging.RATES[name] for name in names]
    for name, count in zip(names, (76 * 2 * 2 * 2 * 8, 2 * (4 * 16 + 2 * 24 + 16))):
        found = made["methods"][name]
        assert found["lr"] == merging.RATES[name][1] and [run["seed"] for run in found["runs"]] == [1, 2]
        for run in found["runs"]:
            assert run["trainable"] == count and [step for step, *_ in run["path"]] == [1, 2]
            assert len(run["shares"]) == 8
    assert [step for step, *_ in made["patient"]["path"]] == [4, 8]
    assert made["before"]["task"]["bistro"]["test"] > 3 and "its own" in made["before"]["tales"]
    tried.clear()
    assert merging.methods(steps=2, every=1, seeds=(1, 2), n=8, names=names,
                           scratch=str(tmp_path))["methods"] == made["methods"]
    assert tried == []
    json.dumps(made, allow_nan=False)


def test_every_method_searches_the_same_way():
    """Three rates a factor of two apart for each, widened by `runs.tune` alike."""
    assert list(merging.RATES) == list(METHODS)
    assert all(len(rates) == 3 and rates[1] == 2 * rates[0] and rates[2] == 4 * rates[0]
               for rates in merging.RATES.values())
