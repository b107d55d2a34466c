"""Adapters in a stack against the same adapters one at a time: starts, losses, weights, rows, files; and against
PEFT's rsLoRA.
"""
import copy
import math
import threading

import peft
import pytest
import torch
from torch import nn

from lora_edu import apply_lora
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from lora_edu.lora.factors import lora_layers, lora_parameters
from lora_edu.lora.merge import remove_lora
from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack, StackedLinear
from lora_edu.training.loop import train
from lora_edu.training.stacked import side_by_side, train_stack
from tests.lora.tiny import IDS, MODELS, gpt2, hf_llama, logits, our_llama

ADAPTERS = [LoRASettings(1, 3.0, lr=0.01, seed=1), LoRASettings(4, 8.0, ("q_proj", "v_proj"), lr=0.01, seed=2),
            LoRASettings(3, 5.0, ["down_proj"], rslora=True, lr=0.03, seed=3),
            LoRASettings(8, 4.0, rslora=True, lr=0.005, seed=1),
            LoRASettings(2, 16.0, r"model\.layers\.1\..*", lr=0.008, seed=4)]
TEXTS = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(7))


def batches(seed, steps, rows=3, width=8):
    """Random tokens, the same four rows again and again so that there is something to learn; some targets do not
    count.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(50, (4, width + 1), generator=generator)
    for _ in range(steps):
        ids = pool[torch.randint(4, (rows,), generator=generator)]
        targets = ids[:, 1:].clone()
        targets[0, :seed] = -100
        yield ids[:, :-1], targets


def wrapped(base, adapter):
    """Oracle: the adapter by itself, as `apply_lora` makes it."""
    model = copy.deepcopy(base)
    torch.manual_seed(adapter.seed)
    apply_lora(model, adapter.target_modules, adapter.rank, adapter.scaling * adapter.rank)
    return model


def shake(stack):
    """Give every B something to say."""
    generator = torch.Generator().manual_seed(5)
    for i in range(len(stack)):
        for B in stack.parameters_of(i)[1::2]:
            B.data.normal_(std=0.3, generator=generator)


def shaken(build=our_llama, adapters=ADAPTERS):
    stack = LoRAStack(build().eval(), adapters)
    shake(stack)
    return stack


@torch.no_grad()
def says(model, ids=TEXTS):
    out = model(ids)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("dtype, loss_off, weight_off", [(torch.float64, 1e-9, 1e-8), (torch.float32, 2e-5, 1e-4)])
def test_fifty_steps_equal_those_of_each_adapter_alone(dtype, loss_off, weight_off):
    """Oracle: `train`. The rates are sane: from about 0.05 on this training is chaotic and turns rounding into 1e-2 of
    a loss within 50 steps, in either precision.

    Products of other shapes add in another order, so the last digit differs (1e-16 in float64, 1e-7 in float32), and
    each step
    carries the difference on: at these rates to 1e-13 and 1e-6. float32 gets a factor of twenty for another CPU's
    order, and weights a hundred, since Adam divides by small gradients too. A wrong rule (a scaling, a rate, a norm)
    moves both by 1e-3 and more.
    """
    base = our_llama().to(dtype)
    stack = LoRAStack(copy.deepcopy(base), ADAPTERS)
    sources = [batches(a.seed, 50) for a in ADAPTERS]
    steps = list(train_stack(stack, map(side_by_side, zip(*sources)), 50, max_grad_norm=0.05))
    norms = []
    assert [s.step for s in steps] == list(range(1, 51))
    for i, adapter in enumerate(ADAPTERS):
        alone = wrapped(base, adapter)
        want = list(train(alone, batches(adapter.seed, 50), 50, adapter.lr, max_grad_norm=0.05))
        norms += [s.grad_norm for s in want]
        assert want[-1].loss < want[0].loss - 0.02
        assert any(norm > 0.05 for norm in norms[-50:])      # it learns, and is clipped
        assert max(abs(s.losses[i] - w.loss) for s, w in zip(steps, want, strict=True)) < loss_off, i
        for ours, theirs in zip(lora_parameters(stack.unstack(i)), lora_parameters(alone), strict=True):
            assert (ours - theirs).abs().max() < weight_off and theirs.abs().max() > 10 * weight_off, i
    assert any(norm < 0.05 for norm in norms)                                                    # but not always
    for (name, ours), theirs in zip(our_llama().to(dtype).named_parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)
               for name, layer in stack.layers.items())


def test_what_pads_an_adapter_stays_zero():
    stack = shaken()
    list(train_stack(stack, (side_by_side([batch] * 5) for batch in batches(0, 10)), 10))
    for layer in stack.layers.values():
        for i, rank in enumerate(layer.ranks):
            assert rank in (0, ADAPTERS[i].rank)
            assert layer.lora_A[i, :rank].count_nonzero() == layer.lora_A[i, :rank].numel()
            for factor in (layer.lora_A, layer.lora_B):
                assert not factor[i, rank:].view(torch.int32).any()        # bit for bit: not even a -0.0
    assert {rank for layer in stack.layers.values() for rank in layer.ranks} == {0, 1, 2, 3, 4, 8}
    assert stack.layers["model.layers.0.mlp.gate_proj"].ranks == [1, 0, 0, 8, 0]


def test_it_starts_as_apply_lora_would_and_draws_no_random_number():
    base = our_llama()
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    stack = LoRAStack(copy.deepcopy(base), ADAPTERS)
    shake(stack)
    for i in range(len(stack)):
        stack.reset(i)
    assert torch.equal(torch.random.get_rng_state(), before)
    for i, adapter in enumerate(ADAPTERS):
        want = dict(lora_layers(wrapped(base, adapter)))
        got = dict(lora_layers(stack.unstack(i)))
        assert got.keys() == want.keys()
        for name, layer in want.items():
            assert torch.equal(got[name].lora_A, layer.lora_A) and torch.equal(got[name].lora_B, layer.lora_B)
            assert got[name].rank == adapter.rank and got[name].scaling == pytest.approx(adapter.scaling, rel=1e-15)
    assert torch.equal(says(stack.model), says(base))


def test_only_the_chosen_adapter_is_reset():
    stack = shaken()
    kept = [[p.clone() for p in stack.parameters_of(i)] for i in range(5)]
    stack.reset(3)
    for i in range(5):
        same = [torch.equal(a, b) for a, b in zip(kept[i], stack.parameters_of(i), strict=True)]
        assert not any(same[1::2]) and all(same[::2]) if i == 3 else all(same)


def test_groups_and_rows_read_each_their_adapter():
    stack = shaken()
    alone = [says(stack.unstack(i)) for i in range(5)]
    assert min((alone[i] - alone[j]).abs().max() for i in range(5) for j in range(i)) > 0.003
    grouped = says(stack.model, TEXTS.repeat(5, 1)).view(5, 5, 9, 50)
    torch.testing.assert_close(grouped, torch.stack(alone))
    with stack.rows([4, 0, 0, 2, 1]):
        mixed = says(stack.model)
        with stack.rows([3]):
            torch.testing.assert_close(says(stack.model, TEXTS[1:2])[0], alone[3][1])
        assert torch.equal(says(stack.model), mixed)
    torch.testing.assert_close(mixed, torch.stack([alone[i][n] for n, i in enumerate([4, 0, 0, 2, 1])]))
    # a row for each, as before
    torch.testing.assert_close(says(stack.model), torch.stack([alone[i][i] for i in range(5)]))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_different_adapters_write_together(use_cache):
    stack, index, prompts = shaken(), [4, 0, 3, 2, 1], TEXTS[:, :4]
    with torch.no_grad():
        # far from ties, and different adapters then say different things
        stack.model.lm_head.weight.mul_(20)
        with stack.rows(index):
            together = stack.model.generate(prompts, 12, temperature=0, use_cache=use_cache)
        alone = [stack.unstack(i).generate(prompts[n:n + 1], 12, temperature=0)[0] for n, i in enumerate(index)]
        other = [stack.unstack(0).generate(prompts[n:n + 1], 12, temperature=0)[0] for n in range(5)]
    assert torch.equal(together, torch.stack(alone)) and not torch.equal(together, torch.stack(other))


@pytest.mark.parametrize("index", [[], [5], [-1], [[0, 1]], 3, [0.0, 1.0], [True, False, True, True, True]])
def test_rows_that_name_no_adapter(index):
    stack = shaken()
    with pytest.raises(ValueError, match=r"rows\(.*one number from 0 to 4"), stack.rows(index):
        pass
    assert stack.routing["index"] is None


def test_rows_that_do_not_divide_are_refused():
    stack = shaken()
    with pytest.raises(ValueError, match="7 rows for 5 adapters: give each adapter as many"):
        stack.model(TEXTS[[0, 1, 2, 3, 4, 0, 1]])
    with stack.rows([0, 1, 2]), pytest.raises(ValueError, match="5 rows for 3 chosen adapters"):
        stack.model(TEXTS)
    assert stack.routing["index"] is None
    with pytest.raises(ValueError, match="7 rows for 5 adapters"):
        next(train_stack(stack, batches(0, 1, rows=7), 1))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_unstacked_it_is_an_ordinary_adapter(build, tmp_path):
    """Its own file gives PEFT and us the same logits, and so does merging it; the stack and its base do not notice."""
    adapters = [LoRASettings(2, 3.0),
                LoRASettings(3, 7.0, ("c_attn", "c_proj") if build is gpt2 else ("q_proj", "up_proj"), rslora=True)]
    stack = shaken(build, adapters)
    grouped = says(stack.model, TEXTS.repeat(2, 1)).view(2, 5, 9, 50)
    for i in (0, 1):
        alone = stack.unstack(i).eval()
        assert not any(isinstance(m, StackedLinear) for m in alone.modules())
        torch.testing.assert_close(says(alone), grouped[i], rtol=1e-4, atol=1e-5)
        save_adapter(alone, tmp_path / str(i))
        load_adapter(again := build().eval(), tmp_path / str(i))
        torch.testing.assert_close(says(again), grouped[i], rtol=1e-4, atol=1e-5)
        if build is not our_llama:
            theirs = peft.PeftModel.from_pretrained(build().eval(), tmp_path / str(i)).eval()
            torch.testing.assert_close(says(theirs), grouped[i], rtol=1e-4, atol=1e-5)
        merged = copy.deepcopy(alone)
        remove_lora(merged, merge=True)
        torch.testing.assert_close(says(merged), grouped[i], rtol=1e-4, atol=1e-5)
    assert (grouped[0] - grouped[1]).abs().max() > 0.01


def test_unstacking_shares_the_base_and_leaves_it_where_it_is():
    stack = shaken()
    before, alone = says(stack.model), stack.unstack(3)
    names = dict(alone.named_parameters())
    for name, weight in stack.model.named_parameters():
        if "lora_" not in name:
            assert names[name].data_ptr() == weight.data_ptr()
    assert alone.lm_head.weight is alone.model["embed_tokens"].weight
    trainable = {name for name, p in names.items() if p.requires_grad}
    assert trainable == {name for name in names if "lora_" in name}
    alone.requires_grad_(True).double()                            # a move to another device goes the same way
    assert says(alone).dtype == torch.float64
    assert all(p.dtype == torch.float32 and p.requires_grad == ("lora_" in name)
               for name, p in stack.model.named_parameters())
    assert torch.equal(says(stack.model), before)


def test_its_rslora_is_pefts():
    """Oracle: PEFT with use_rslora=True and the same factors."""
    adapter = LoRASettings(4, 6.0, ("q_proj", "down_proj"), rslora=True)
    stack = shaken(hf_llama, [LoRASettings(2, 3.0), adapter])
    theirs = peft.get_peft_model(hf_llama(),
                                 peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"],
                                                 use_rslora=True))
    for name, layer in stack.layers.items():
        if layer.ranks[1]:
            place = theirs.get_submodule(f"base_model.model.{name}")
            place.lora_A["default"].weight.data = layer.lora_A[1, :4].detach()
            place.lora_B["default"].weight.data = layer.lora_B[1, :4].detach().T
            assert place.scaling["default"] == adapter.scaling == 6 / math.sqrt(4)
    with stack.rows([1] * 5):
        torch.testing.assert_close(says(stack.model), says(theirs.eval()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(says(stack.unstack(1)), says(theirs), rtol=1e-5, atol=1e-6)
    assert LoRASettings(4, 6.0).scaling == 1.5


def test_removed_the_base_is_back_bit_for_bit():
    base = our_llama().train()
    stack = LoRAStack(model := copy.deepcopy(base).train(), ADAPTERS)
    shake(stack)
    list(train_stack(stack, (side_by_side([batch] * 5) for batch in batches(0, 3)), 3))
    stack.remove()
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == [(n, type(m), m.training)
                                                                            for n, m in base.named_modules()]
    for (name, after), (other, before) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        assert name == other and torch.equal(after, before) and after.grad is None
    assert torch.equal(says(model), says(base))
    LoRAStack(model, ADAPTERS[:1])                                  # and there is place for another


@pytest.mark.parametrize("occupy",
                         [lambda model: LoRAStack(model, ADAPTERS), lambda model: apply_lora(model, ["q_proj"])])
def test_there_is_one_stack_on_a_model(occupy):
    occupy(model := our_llama())
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="the model has LoRA already, on model.layers.0.self_attn.q_proj"):
        LoRAStack(model, ADAPTERS)
    assert list(model.named_modules()) == before


def test_a_16_bit_base_has_32_bit_factors():
    base = our_llama().bfloat16()
    stack = LoRAStack(copy.deepcopy(base), ADAPTERS)
    shake(stack)
    assert {p.dtype for i in range(5) for p in stack.parameters_of(i)} == {torch.float32}
    grouped = says(stack.model, TEXTS.repeat(5, 1)).view(5, 5, 9, 50)
    assert grouped.dtype == torch.bfloat16
    for i in range(5):          # logits below 0.6: one unit in bfloat16's last place is 0.004
        torch.testing.assert_close(grouped[i], says(stack.unstack(i)), rtol=0, atol=0.008)
    stack = LoRAStack(copy.deepcopy(base), ADAPTERS)
    steps = list(train_stack(stack, (side_by_side([batch] * 5) for batch in batches(0, 20)), 20))
    assert all(last < first for first, last in zip(steps[0].losses, steps[-1].losses))


@pytest.mark.parametrize("bad, message", [
    (LoRASettings(0), "adapter 1: .*rank=0 does not fit"),
    (LoRASettings(9), "adapter 1: .*rank=9 does not fit a 8 x 16"),
    (LoRASettings(2, float("nan")), "adapter 1: .*alpha=nan"),
    (LoRASettings(2, lr=float("inf")), "adapter 1: lr=inf is not finite"),
    (LoRASettings(2, target_modules=("v_porj",)), "adapter 1: .*Did you mean 'v_proj'"),
    (LoRASettings(2, target_modules=("lm_head",)), "adapter 1: .*tied"),
])
def test_an_adapter_that_does_not_fit_is_named_by_its_number(bad, message):
    model = our_llama()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        LoRAStack(model, [LoRASettings(2), bad])
    assert list(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


def test_no_adapters_and_a_model_of_one_layer():
    with pytest.raises(ValueError, match="no adapters: give a list"):
        LoRAStack(our_llama(), [])
    with pytest.raises(ValueError, match="itself one linear layer"):
        LoRAStack(nn.Linear(4, 4), [LoRASettings(2, 4.0, ".*")])


def test_targets_given_as_a_list_are_a_key_too():
    assert LoRASettings(target_modules=["q_proj"]) == LoRASettings(target_modules=("q_proj",))
    assert len({ADAPTERS[2], ADAPTERS[2]}) == 1


def folders_of(tmp_path, kinds):
    """An adapter each, and what a model with that one alone says."""
    found, said = [], []
    for i, how in enumerate(kinds):
        model = our_llama()
        torch.manual_seed(i)
        apply_lora(model, **how)
        for layer in dict(lora_layers(model)).values():
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        save_adapter(model, tmp_path / str(i))
        found.append(tmp_path / str(i))
        said.append(logits(model.eval()))
    return found, said


KINDS = [dict(target_modules=["q_proj", "v_proj"], rank=2), dict(target_modules="all-linear", rank=4, alpha=4),
         dict(target_modules=["down_proj"], rank=3, rslora=True), dict(target_modules=["q_proj"], rank=1, alpha=8)]


def test_adapters_from_folders_serve_each_its_rows(tmp_path):
    """Oracle: each alone, with load_adapter; ranks, alphas, targets and rules of scaling differ."""
    folders, said = folders_of(tmp_path, KINDS)
    stack = LoRAStack.from_folders(our_llama(), folders)
    for order in ([0, 1, 2, 3], [3, 0, 0, 2], [2]):
        with stack.rows(order):
            out = logits_of(stack.model, IDS[:1].repeat(len(order), 1))
        for row, i in enumerate(order):
            torch.testing.assert_close(out[row], said[i][0], atol=1e-5, rtol=1e-5)
    for i in range(4):
        torch.testing.assert_close(logits(stack.unstack(i)), said[i], atol=1e-5, rtol=1e-5)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids)


def test_one_is_swapped_and_the_others_do_not_notice(tmp_path):
    folders, said = folders_of(tmp_path, KINDS)
    stack = LoRAStack.from_folders(our_llama(), folders[:3])
    ids = IDS[:1].repeat(2, 1)
    with stack.rows([0, 1]):
        before = logits_of(stack.model, ids)
        stack.load(2, folders[3])
        assert torch.equal(logits_of(stack.model, ids), before)
    with stack.rows([2]):
        torch.testing.assert_close(logits_of(stack.model, ids[:1])[0], said[3][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(stack.unstack(2)), said[3], atol=1e-5, rtol=1e-5)


def test_while_a_thread_serves_others_are_loaded(tmp_path):
    folders, _ = folders_of(tmp_path, KINDS)
    stack, ids = LoRAStack.from_folders(our_llama(), folders[:3]), IDS[:1].repeat(2, 1)
    with stack.rows([0, 1]):
        expected, seen, stop = logits_of(stack.model, ids), [], threading.Event()

        def serve():
            while not stop.is_set():
                seen.append(torch.equal(logits_of(stack.model, ids), expected))
        thread = threading.Thread(target=serve)
        thread.start()
        for i in range(20):
            stack.load(2, folders[3 if i % 2 else 2])
        stop.set()
        thread.join()
    assert len(seen) > 1 and all(seen)


def test_what_a_stack_has_no_room_for_is_refused_and_nothing_moves(tmp_path):
    folders, _ = folders_of(tmp_path, KINDS + [dict(target_modules=["q_proj"], rank=5)])
    stack = LoRAStack.from_folders(our_llama(), [folders[0], folders[3]])
    ids = IDS[:1].repeat(2, 1)
    with stack.rows([0, 1]):
        before = logits_of(stack.model, ids)
        for i, folder, message in ((1, folders[4], "no room for .*q_proj at rank 5"), (1, folders[2], "no room for"),
                                   (2, folders[0], "has the adapters 0 to 1"), (0.5, folders[0], "load\\(0.5"),
                                   (1, tmp_path / "none", "adapter 1: .*no adapter_config")):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                stack.load(i, folder)
        assert torch.equal(logits_of(stack.model, ids), before)


def test_an_adapter_with_a_head_cannot_share(tmp_path):
    model = our_llama(tied=False)
    apply_lora(model, ["q_proj"], rank=2)
    model.lm_head.requires_grad_(True)
    save_adapter(model, tmp_path)
    plain = our_llama(tied=False)
    with pytest.raises(ValueError, match="adapter 0: .*replaces whole modules"):
        LoRAStack.from_folders(plain, [tmp_path])
    with pytest.raises(ValueError, match="no folders"):
        LoRAStack.from_folders(plain, [])
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_a_layer_whose_weight_is_read_past_the_stack_is_refused_from_folders_too(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    model = build()
    apply_lora(model, ["linear1"], rank=2)
    save_adapter(model, tmp_path)
    plain = build()
    before = list(plain.modules())
    with pytest.raises(ValueError, match="adapter 1: the layer around 1.linear1 reads the weight"):
        other = build()
        apply_lora(other, ["0"], rank=2)
        save_adapter(other, tmp_path / "good")
        LoRAStack.from_folders(plain, [tmp_path / "good", tmp_path])
    assert list(plain.modules()) == before


def test_from_folders_the_model_is_ready_to_serve(tmp_path):
    model = our_llama()
    apply_lora(model, ["q_proj"], rank=2)
    save_adapter(model, tmp_path)
    served = our_llama().train()
    LoRAStack.from_folders(served, [tmp_path])
    assert not any(module.training for module in served.modules()), "as after load_adapter"


def test_a_model_that_reads_the_sequence_first_is_refused():
    """Its positions would be taken for rows, and a user would get another's adapter."""
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(ValueError, match="1.self_attn reads the sequence first"):
        LoRAStack(model, [LoRASettings(2, target_modules=["0"])] * 2)
    assert type(model[0]) is nn.Linear
    LoRAStack(nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
              [LoRASettings(2, target_modules=["0"])] * 2)
