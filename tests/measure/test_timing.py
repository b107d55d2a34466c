"""Latency: what is reported of given times, how variants take turns, and the operators.

No test depends on how long anything takes.
"""
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from lora_edu import LoRALinear, load_pretrained
from lora_edu.measure import timing
from lora_edu.measure.operators import chained_products, matrix_products, operators
from lora_edu.measure.timing import Ratio, Times, decode, interleaved, prefill, seconds_for
from lora_edu.rivals.methods import variants
from tests.lora.tiny import IDS, our_llama

LAYERS = 2


def loud():
    """A tiny model that does not say one token over and over: its matrices are large."""
    model = our_llama(tied=False, positions=64).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 15
    return model


@pytest.fixture(scope="module")
def models():
    return variants(loud(), rank=2, bottleneck=3, prefix=4, narrow=3)


def test_a_drift_of_the_machine_cancels_in_the_paired_ratio():
    drift = np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.3, 60)))
    ratio = Times({"base": drift, "LoRA": 1.3 * drift}).ratio("LoRA", "base")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.3, 1.3, 1.3)) and max(drift) > 3 * min(drift)


def test_the_ratio_has_a_direction_and_a_median():
    times = Times({"base": np.array([1.0, 2.0, 4.0, 1.0, 2.0]), "LoRA": np.array([2.0, 4.0, 400.0, 2.0, 4.0])})
    assert times.ratio("LoRA", "base").value == 2 and times.ratio("base", "LoRA").value == 0.5
    assert times.ratio("base", "base") == Ratio(1, 1, 1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    noise = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        base, other = np.exp(noise.normal(0, 0.1, (2, 40)))
        ratio = Times({"base": base, "LoRA": 1.1 * other}).ratio("LoRA", "base")
        held += ratio.low <= 1.1 <= ratio.high
        assert ratio.low <= ratio.value <= ratio.high
    assert 0.91 <= held / 300 <= 0.98


def test_the_interval_is_the_same_each_time_and_narrows_with_rounds():
    noise = np.random.default_rng(2)
    base, other = np.exp(noise.normal(0, 0.1, (2, 400)))
    few, many = (Times({"base": base[:n], "LoRA": other[:n]}).ratio("LoRA", "base") for n in (25, 400))
    assert all(many == Times({"base": base, "LoRA": other}).ratio("LoRA", "base") for _ in range(3))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_median_and_quartiles():
    times = Times({"base": np.array([5.0, 1.0, 2.0, 4.0, 3.0])})
    assert times.median("base") == 3 and times.quartiles("base") == (2, 4)


@pytest.mark.parametrize("ratio, widest, said", [
    (Ratio(1.03, 1.02, 1.04), 0.1, "1.03 (1.02 to 1.04)"),
    (Ratio(1.05, 0.91, 1.30), 0.1, "too noisy (0.91 to 1.30)"),
    (Ratio(2.0, 1.9, 2.09), 0.1, "2.00 (1.90 to 2.09)"),          # the bound is a share of the ratio
    (Ratio(0.5, 0.4, 0.5), 0.1, "too noisy (0.40 to 0.50)"),
    (Ratio(1.05, 0.91, 1.30), 0.5, "1.05 (0.91 to 1.30)"),
])
def test_a_ratio_says_its_interval_or_that_it_is_too_noisy(ratio, widest, said):
    assert ratio.text(widest) == said


@pytest.mark.parametrize("seconds, sentence", [
    ({}, "no variant"),
    ({"base": [1, 2], "LoRA": [1, 2, 3]}, "'base': 2, 'LoRA': 3"),
    ({"base": []}, "'base': 0"),
    ({"base": [1.0, float("nan")]}, "'base'.*nan"),
    ({"base": [1.0, float("inf")]}, "'base'.*inf"),
    ({"base": [1.0, 0.0]}, r"'base'.* 0\.0 "),
    ({"base": [1.0, -1.0]}, r"'base'.*-1\.0"),
])
def test_times_that_cannot_be(seconds, sentence):
    with pytest.raises(ValueError, match=sentence):
        Times({name: np.array(times, dtype=float) for name, times in seconds.items()})


def test_an_unknown_name_is_refused():
    times = Times({"base": np.ones(5)})
    for ask in (lambda: times.ratio("LoRA", "base"), lambda: times.ratio("base", "LoRA"), lambda: times.median("LoRA")):
        with pytest.raises(ValueError, match="no variant 'LoRA': choose one of 'base'"):
            ask()


def counted(names):
    """Variants that write down who was called."""
    calls = []
    return calls, {name: (lambda name=name: calls.append(name)) for name in names}


def test_every_variant_runs_once_a_round_in_a_new_order_that_a_seed_gives():
    calls, calling = counted("abcd")
    interleaved(calling, rounds=40, warmup=3)
    rounds = [tuple(calls[i:i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 43 and all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 12
    first = [order[0] for order in rounds]
    assert all(first.count(name) >= 4 for name in "abcd")
    again, calling = counted("abcd")
    interleaved(calling, rounds=40, warmup=3)
    assert again == calls


def test_times_stand_by_round_and_the_warm_up_is_not_among_them(monkeypatch):
    clock = itertools.count(1)
    monkeypatch.setattr(timing, "seconds_for", lambda call: float(next(clock)))
    times = interleaved({"a": None, "b": None, "c": None}, rounds=6, warmup=2)
    together = np.sort(np.stack([times.seconds[name] for name in "abc"]), axis=0)
    assert together.T.tolist() == [[3 * i + 1, 3 * i + 2, 3 * i + 3] for i in range(2, 8)]


def test_a_call_is_timed_from_its_beginning_to_its_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

    def quarter():
        now[0] += 0.25
    assert seconds_for(quarter) == 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_a_gpu_is_waited_for():
    torch.zeros(1, device="cuda")
    assert seconds_for(lambda: torch.cuda._sleep(100_000_000)) > 0.02        # cycles; no GPU has 5 GHz


def test_threads_are_fixed_and_put_back_and_gradients_are_off():
    before, seen = torch.get_num_threads(), []

    def look():
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    def fail():
        raise RuntimeError("broken variant")
    try:
        torch.set_num_threads(2)
        interleaved({"look": look}, rounds=5, threads=1)
        assert set(seen) == {(1, True)} and len(seen) == 7 and torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="broken variant"):
            interleaved({"fail": fail}, rounds=5, threads=1)
        assert torch.get_num_threads() == 2 and not torch.is_inference_mode_enabled()
        seen.clear()
        interleaved({"look": look}, rounds=5)
        assert set(seen) == {(2, True)}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("calls, how, sentence", [
    ({}, {"rounds": 5}, "nothing to time"),
    ({"a": list}, {"rounds": 4}, "rounds=4 are too few.*at least 5"),
    ({"a": list}, {"rounds": 5, "threads": 0}, "threads=0"),
])
def test_what_cannot_be_timed(calls, how, sentence):
    with pytest.raises(ValueError, match=sentence):
        interleaved(calls, **how)


def test_prefill_is_one_reading_of_the_model(models):
    with torch.inference_mode():
        for model in models.values():
            assert torch.equal(prefill(model, IDS)(), model(IDS))


@pytest.mark.parametrize("length", [1, 5])
def test_decode_goes_on_as_generate_does_and_from_the_same_place_each_time(models, length):
    ids = IDS[:, :length]
    for name, model in models.items():
        write, want = decode(model, ids, 6), model.generate(ids, 7, temperature=0)[:, -6:]
        with torch.inference_mode():
            assert torch.equal(write(), want) and torch.equal(write(), want), name
    assert len(want.unique()) > 3


def test_decode_reads_one_token_at_a_time_and_nothing_else_is_timed():
    model, shapes = loud(), []
    write = decode(model, IDS, 3)
    model.register_forward_hook(lambda module, args, output: shapes.append((tuple(args[0].shape), args[1].length)))
    write()
    assert shapes == [((2, 1), 6), ((2, 1), 7), ((2, 1), 8)]


def test_the_operators_are_the_same_in_every_run(models):
    for name, model in models.items():
        first = operators(model, IDS)
        assert all(operators(model, IDS) == first for _ in range(3)), name
        assert "aten::embedding" in first and all(operator.startswith("aten::") for operator in first)


def test_who_runs_more_operators_than_the_base(models):
    """Merged but still wrapped, a layer runs what the base runs: what it costs is Python, not torch."""
    seen = {name: operators(model, IDS) for name, model in models.items()}
    same = {name for name, names in seen.items() if names == seen["base"]}
    assert same == {"base", "LoRA merged", "merged and unloaded"}
    products = {name: matrix_products(names) for name, names in seen.items()}
    base = 7 * LAYERS + 1
    assert products == {"base": base, "LoRA": base + 2 * 7 * LAYERS, "LoRA merged": base, "merged and unloaded": base,
                        "LoRA on q and v": base + 4 * LAYERS, "adapters (two a block)": base + 4 * LAYERS,
                        "adapters (one a block)": base + 2 * LAYERS, "prefix": base}


def test_how_deep_the_work_is(models):
    """By hand, a block: q, k, v side by side, o behind them, gate and up side by side, down: four; LoRA's two stand
    beside W₀'s one.
    """
    depth = {name: chained_products(model, IDS) for name, model in models.items()}
    base = 4 * LAYERS + 1
    assert depth == {"base": base, "LoRA": base + 4 * LAYERS, "LoRA merged": base, "merged and unloaded": base,
                     "LoRA on q and v": base + LAYERS, "adapters (two a block)": base + 4 * LAYERS,
                     "adapters (one a block)": base + 2 * LAYERS, "prefix": base}


def test_a_chain_is_counted_whatever_trains_and_the_model_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(),
                                torch.nn.Linear(3, 3, bias=False)).requires_grad_(False)
    with torch.no_grad():
        assert chained_products(model, torch.ones(2, 3)) == chained_products(model, torch.ones(1, 2, 3)) == 2
    assert not any(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())
    deep = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(3000)))
    assert chained_products(deep, torch.ones(1, 1)) == 3000


def test_the_operators_stand_in_their_order():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3, bias=False))
    names = operators(model, torch.ones(2, 3))
    assert [name for name in names if name in ("aten::addmm", "aten::relu", "aten::mm")] == ["aten::addmm",
                                                                                             "aten::relu", "aten::mm"]
    assert names.index("aten::linear") < names.index("aten::addmm") and matrix_products(names) == 2


def test_what_is_no_operator_is_left_out():
    class Marked(torch.nn.Module):
        def forward(self, x):
            with torch.profiler.record_function("a mark of its own"):
                return x + 1
    names = operators(Marked(), torch.ones(2))
    assert names[0] == "aten::add" and all(name.startswith("aten::") for name in names)


@pytest.mark.slow
def test_the_profiler_writes_nothing_beside_a_notebook():
    code = ("import torch; from lora_edu.measure.operators import operators; print(len(operators(torch.nn.Linear(2, "
            "2), torch.ones(1, 2))) > 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_variants_say_what_they_should(models):
    base, lora, merged, unloaded, *others = (prefill(model, IDS)().detach() for model in models.values())
    assert torch.equal(base, loud()(IDS)) and not torch.allclose(lora, base, atol=1e-2)
    assert torch.equal(merged, unloaded)
    torch.testing.assert_close(merged, lora, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(others[3], base, atol=1e-3)      # a prefix is seen; adapters start as the identity
    wrapped = {name: sum(isinstance(module, LoRALinear) for module in model.modules())
               for name, model in models.items()}
    assert wrapped == dict.fromkeys(models, 0) | {"LoRA": 7 * LAYERS, "LoRA merged": 7 * LAYERS,
                                                      "LoRA on q and v": 2 * LAYERS}
    assert all(layer.merged == (name == "LoRA merged") for name, model in models.items() for layer in model.modules()
               if isinstance(layer, LoRALinear))
    assert not any(module.training for model in models.values() for module in model.modules())


def test_the_base_and_the_random_numbers_are_left_alone():
    base = loud().train()
    before, state = {name: p.clone() for name, p in base.named_parameters()}, torch.get_rng_state()
    made = variants(base, rank=2, bottleneck=3, prefix=4, narrow=3)
    assert torch.equal(torch.get_rng_state(), state) and base.training
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in base.named_parameters())
    again = variants(base, rank=2, bottleneck=3, prefix=4, narrow=3)
    for name, model in made.items():
        assert all(torch.equal(p, same)
                   for p, same in zip(model.parameters(), again[name].parameters(), strict=True)), name


def test_no_variant_has_the_weights_of_another(models):
    """Shared weights would be in the processor's cache already for whoever comes second."""
    places = {name: {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
              for name, model in models.items()}
    for one, two in itertools.combinations(models, 2):
        assert not places[one] & places[two], (one, two)


def test_the_defaults_are_equal_budgets_on_fable():
    counts = {name: sum(p.numel() for p in model.parameters() if p.requires_grad)
              for name, model in variants(load_pretrained()[0]).items()}
    assert counts["LoRA"] == 156_160
    for name in ("LoRA on q and v", "adapters (two a block)", "adapters (one a block)", "prefix"):
        assert counts[name] == pytest.approx(counts["LoRA"], rel=0.02), name
