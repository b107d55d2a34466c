"""Training in float16, on a CPU: the oracle is torch's own GradScaler, and what overflows is skipped and counted."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_edu import LoRASettings, LoRAStack, apply_lora, fit, lora_parameters, train
from lora_edu.training.loop import Diverged, adamw, loss_on, sixteen_bits, warmup_linear
from lora_edu.training.loss_scale import LossScale
from lora_edu.training.stacked import side_by_side, train_stack
from tests.lora.tiny import our_llama

STEPS = 9


def batches(n=STEPS):
    ids = torch.randint(64, (n, 3, 9), generator=torch.Generator().manual_seed(1))
    return [(each[:, :-1], each[:, 1:]) for each in ids]


def tiny(seed=0, rank=2):
    torch.manual_seed(5)
    model = our_llama(vocab_size=64)
    torch.manual_seed(seed)
    apply_lora(model, rank=rank)
    return model


def with_gradscaler(model, first, doubles_after):
    """The loop of torch's documentation: losses, steps that were skipped, the scale at the end."""
    optimizer, factor = adamw(model), warmup_linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=doubles_after)
    losses, skipped = [], []
    for step, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor(step, STEPS)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_on(model, batch)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        skipped.append(scaler.get_scale() < before)
    return losses, skipped, scaler.get_scale()


@pytest.mark.parametrize("first, doubles_after", [(2.0**8, 2000), (2.0**26, 2000), (2.0**16, 2), (2.0**22, 3),
                                                  (2.0**10, 1)])
def test_the_loop_is_that_of_gradscaler(first, doubles_after, monkeypatch):
    monkeypatch.setattr(LossScale, "first", first)
    monkeypatch.setattr(LossScale, "doubles_after", doubles_after)
    ours, other = tiny(), tiny()
    steps = list(train(ours, batches(), STEPS, 0.05, autocast=torch.float16))
    losses, skipped, _ = with_gradscaler(other, first, doubles_after)
    assert [step.skipped for step in steps] == skipped
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-5)
    assert any(skipped) == (first > 2.0**8)         # from 2^10 on by doubling
    for mine, theirs in zip(lora_parameters(ours), lora_parameters(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_skipped_step_moves_nothing_and_fit_counts_it(monkeypatch, capsys):
    monkeypatch.setattr(LossScale, "first", 2.0**60)
    model = tiny()
    before = [p.clone() for p in lora_parameters(model)]
    steps = fit(model, batches(3), 3, 0.05, autocast=torch.float16)
    assert all(step.skipped for step in steps)
    assert all(torch.equal(p, was) for p, was in zip(lora_parameters(model), before))
    assert "3 of 3 steps overflowed in float16 and were skipped." in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_other_type_is_scaled_or_skipped(dtype):
    scale = LossScale(2, dtype)
    assert scale.scales == [1.0, 1.0] and not scale.skips(0, 1.0, float("inf"))


def test_what_overflows_at_scale_1_has_diverged(monkeypatch):
    """A gradient that is never finite: the scale falls from 16 to 1, and then the training stops."""
    monkeypatch.setattr(LossScale, "first", 16.0)
    model = tiny()
    lora_parameters(model)[0].register_hook(lambda gradient: gradient * float("inf"))
    loop = train(model, batches(), STEPS, 0.05, autocast=torch.float16)
    assert [next(loop).skipped for _ in range(4)] == [True] * 4
    with pytest.raises(Diverged, match="step 5"):
        next(loop)


def test_every_adapter_of_a_stack_has_its_own_scale_and_the_numbers_of_training_it_alone(monkeypatch):
    monkeypatch.setattr(LossScale, "first", 2.0**24)
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)) or norms[-1])
    adapters = [LoRASettings(rank=2, alpha=4, lr=0.05, seed=0), LoRASettings(rank=3, alpha=3000, lr=1e-4, seed=1)]
    torch.manual_seed(5)
    stack = LoRAStack(our_llama(vocab_size=64), adapters)
    together = list(train_stack(stack, [side_by_side([batch] * 2) for batch in batches()], STEPS,
                                autocast=torch.float16))
    by_adapter, counts = [norms[0::2], norms[1::2]], []
    for i, adapter in enumerate(adapters):
        torch.manual_seed(5)
        model = our_llama(vocab_size=64)
        torch.manual_seed(adapter.seed)
        apply_lora(model, rank=adapter.rank, alpha=adapter.alpha)
        alone = list(train(model, batches(), STEPS, adapter.lr, autocast=torch.float16))
        assert [step.losses[i] for step in together] == pytest.approx([step.loss for step in alone], rel=2e-3)
        assert by_adapter[i][-3:] == pytest.approx([step.grad_norm for step in alone][-3:], rel=0.02)
        counts.append(sum(step.skipped for step in alone))
    assert together[-1].skipped == counts and counts[0] != counts[1] and min(counts) > 0


@pytest.mark.parametrize("capability, hip, found", [
    ((9, 0), None, torch.bfloat16), ((8, 0), None, torch.bfloat16), ((7, 5), None, torch.float16),
    ((7, 0), None, torch.float16), ((6, 1), None, None), ((9, 0), "6.2", torch.bfloat16)])
def test_a_gpu_is_asked_what_its_hardware_can(capability, hip, found, monkeypatch):
    """A T4 (7.5) says that it has bfloat16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(major=capability[0], minor=capability[1]))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True, raising=False)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert sixteen_bits(torch.device("cuda")) is found
