"""The loop against a loop written out by hand, and its promises: stops, schedules, modes, devices."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_edu import apply_lora, evaluate, lora_parameters, train
from lora_edu.training import loop
from lora_edu.training.loop import Diverged, Step, adamw, constant, fit, warmup_linear
from tests.lora.tiny import our_llama


class Tiny(nn.Module):
    """Logits of the next token from the one before it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(11, 6), nn.Dropout(dropout), nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(self.drop(self.embed(ids)))


class HasLogits(Tiny):
    def forward(self, ids):
        return type("Output", (), {"logits": super().forward(ids)})


def model(kind=Tiny, **how):
    torch.manual_seed(0)
    return kind(**how).double()


def batches(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(11, (3, 8), generator=generator)
        targets = ids[:, 1:].clone()
        targets[0, :2] = -100
        made.append((ids[:, :-1], targets))
    return made


@pytest.mark.parametrize("kind", [Tiny, HasLogits])
def test_losses_and_weights_equal_a_loop_written_out(kind):
    """Oracle: AdamW, clipping and the schedule by hand, on an identical model."""
    ours, other = model(kind), model()
    factor = warmup_linear(0.25)
    steps = list(train(ours, batches(), 8, 0.05, schedule=factor, max_grad_norm=0.5))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1.0, weight_decay=0.0)
    for i, (inputs, targets) in enumerate(batches()):
        logp = F.log_softmax(other(inputs), -1)
        mask = targets != -100
        loss = -(logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in other.parameters()))
        for p in other.parameters():
            p.grad *= min(1.0, 0.5 / norm)
        optimizer.param_groups[0]["lr"] = 0.05 * factor(i, 8)
        optimizer.step()
        assert steps[i].loss == pytest.approx(loss.item(), rel=1e-6)
        assert steps[i].grad_norm == pytest.approx(norm, rel=1e-6)
    # clip_grad_norm_ divides by norm + 1e-6: not the last digits
    for a, b in zip(ours.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_schedules():
    factor = warmup_linear(0.1)
    values = [factor(i, 100) for i in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1.0 and values[9] == 1.0
    assert values[-1] == pytest.approx(1 / 90)
    assert values[10:] == sorted(values[10:], reverse=True) and all(v > 0 for v in values)
    assert [warmup_linear(0.0)(i, 4) for i in range(4)] == [1.0, 1.0, pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert constant(3, 10) == 1.0


def test_steps_are_counted_from_one_and_carry_the_learning_rate():
    steps = list(train(model(), batches(), 4, 0.1, schedule=constant))
    assert [s.step for s in steps] == [1, 2, 3, 4] and all(s.lr == 0.1 and s.tokens_per_second > 0 for s in steps)
    assert isinstance(steps[0], Step)


def test_evaluate_is_the_mean_over_counted_tokens_and_puts_the_mode_back():
    net, data = model(dropout=0.5), batches(2) + [tuple(t[:1] for t in batches(1, 5)[0])]
    net.eval()
    with torch.no_grad():
        rows = torch.cat([F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="none")[y.flatten() != -100]
                          for x, y in data])
    net.train()
    assert evaluate(net, data) == pytest.approx(rows.mean().item(), rel=1e-12)      # not the mean of the batches' means
    assert net.training
    with pytest.raises(ValueError, match="no token that counts"):
        evaluate(net, [])


def test_only_what_is_trainable_moves():
    net = model()
    net.embed.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    list(train(net, batches(), 3, 0.1))
    assert torch.equal(net.embed.weight, before["embed.weight"])
    assert not torch.equal(net.head.weight, before["head.weight"])
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen.*apply_lora"):
        next(train(net, batches(), 3, 0.1))


def test_stopping_early_keeps_what_was_learned_and_the_mode():
    net = model().eval()
    for step in train(net, batches(), 8, 0.1):
        if step.step == 3:
            break
    assert not net.training
    assert evaluate(net, batches()) < evaluate(model(), batches())


def test_going_on_with_the_optimizer_equals_one_run():
    whole, parts = model(), model()
    list(train(whole, batches(), 8, 0.05))
    optimizer = adamw(parts)
    run = train(parts, batches(), 8, 0.05, optimizer=optimizer)
    for _ in range(5):
        next(run)
    run.close()
    list(train(parts, batches()[5:], 8, 0.05, optimizer=optimizer, first_step=5))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_batches_that_end_early_are_an_error():
    with pytest.raises(ValueError, match="ended after 8 steps, and 9 were asked for"):
        list(train(model(), batches(8), 9, 0.1))


def test_fit_keeps_what_was_learned_when_interrupted(capsys, monkeypatch):
    def interrupted():
        yield from batches(3)
        raise KeyboardInterrupt

    net = model()
    steps = fit(net, interrupted(), 8, 0.1)
    assert [s.step for s in steps] == [1, 2, 3] and "Stopped after 3 of 8 steps" in capsys.readouterr().out
    assert evaluate(net, batches()) < evaluate(model(), batches())
    assert len(fit(net, batches(), 8, 0.1)) == 8


def test_autocast_multiplies_in_16_bits_and_keeps_weights_and_losses_in_32():
    net, seen = model().float(), []
    net.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    steps = list(train(net, batches(), 2, 0.1, autocast=torch.bfloat16))
    assert seen == [torch.bfloat16] * 2 and net.head.weight.dtype == torch.float32
    assert all(math.isfinite(s.loss) for s in steps)


def test_only_matrices_decay():
    groups = adamw(model(), weight_decay=0.3).param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.3, {2}), (0.0, {1})]


def test_16_bit_logits_are_widened_before_the_loss():
    net = model().bfloat16()
    assert loop.loss_on(net, batches(1)[0]).dtype == torch.float32


@pytest.mark.gpu
def test_batches_move_to_the_models_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    net = model().cuda()
    assert list(train(net, batches(), 8, 0.05))[-1].loss < evaluate(model(), batches())


def adapted(alpha=16.0, **how):
    model = our_llama(vocab_size=50)
    apply_lora(model, ["q_proj", "v_proj"], rank=2, alpha=alpha, **how)
    return model


def some_batches(count=6):
    ids = torch.randint(50, (count, 2, 9), generator=torch.Generator().manual_seed(3))
    return [(each[:, :-1], each[:, 1:]) for each in ids]


def test_an_optimizer_of_before_apply_lora_is_refused_in_the_first_step():
    model = our_llama(vocab_size=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    apply_lora(model, ["q_proj"], rank=2)
    with pytest.raises(ValueError, match="holds .* none of them is one of the 4 that train.*after apply_lora"):
        next(train(model, some_batches(), 6, 1e-3, optimizer=optimizer))


def test_an_optimizer_that_holds_the_head_and_no_factors_is_refused():
    model = our_llama(vocab_size=50, tied=False)
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    apply_lora(model, ["q_proj"], rank=2)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="does not hold model.layers.0.self_attn.q_proj.lora_A"):
        next(train(model, some_batches(), 6, 1e-3, optimizer=optimizer))


def test_a_first_gradient_of_zero_is_said():
    with pytest.raises(ValueError, match="gradient of the first step is exactly zero"):
        next(train(adapted(alpha=0), some_batches(), 6, 1e-3))


def test_targets_of_which_none_counts_are_said_at_any_step():
    batches = some_batches()
    batches[2] = batches[2][0], torch.full_like(batches[2][1], -100)
    steps = train(adapted(), batches, 6, 1e-3)
    next(steps), next(steps)
    with pytest.raises(ValueError, match="step 3: no token of the batch counts"):
        next(steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_16_bits_are_refused(dtype):
    with pytest.raises(ValueError, match="q_proj.lora_A.* are in 16 bits.*before apply_lora"):
        next(train(adapted().to(dtype), some_batches(), 6, 1e-3))
    model = our_llama(vocab_size=50).to(dtype)
    apply_lora(model, ["q_proj"], rank=2)
    assert next(train(model, some_batches(), 6, 1e-3)).step == 1


@pytest.mark.parametrize("what", ["factor", "rate", "gradient"])
def test_it_stops_at_the_first_number_that_is_not_finite_and_keeps_the_last_finite_weights(what):
    model, losses = adapted(alpha=1e4 if what == "rate" else 16.0), []
    kept, lr = None, 1e36 if what == "rate" else 1e-2
    steps = train(model, some_batches(), 6, lr, schedule=constant, max_grad_norm=None)
    with pytest.raises(Diverged, match=r"step \d: loss .*weights are those of the last finite loss"):
        for step in steps:
            losses.append(step.loss)
            if step.step == 2 and what == "factor":
                lora_parameters(model)[0].data[0, 0] = torch.inf
            if step.step == 2 and what == "gradient":
                lora_parameters(model)[0].register_hook(lambda grad: grad * torch.nan)
            if step.step == 1:
                kept = [p.detach().clone() for p in lora_parameters(model)]
    assert all(map(math.isfinite, losses)) and all(p.isfinite().all() for p in lora_parameters(model))
    assert model.training
    if what == "factor":
        assert all(torch.equal(p, was) for p, was in zip(lora_parameters(model), kept, strict=True))


def test_adapted_layers_that_got_no_gradient_are_named_once():
    model = adapted()
    block = model.model["layers"][1].self_attn
    block.v_proj.forward = block.v_proj.base_layer.forward
    with pytest.warns(UserWarning, match="got no gradient: model.layers.1.self_attn.v_proj") as said:
        list(train(model, some_batches(), 6, 1e-3))
    assert len([w for w in said if "gradient" in str(w.message)]) == 1


IDS = torch.arange(8)[None]


@pytest.mark.parametrize("batch, message", [
    ({"input_ids": IDS, "labels": IDS}, r"dict of 2: give \(batch\['input_ids'\]\[:, :-1\]"),
    ((IDS, torch.ones_like(IDS), IDS), "tuple of 3"), (IDS, "this is a Tensor"), ((IDS.tolist(), IDS.tolist()), "list"),
    ((IDS, IDS), "targets are the inputs themselves"), ((IDS, IDS[:, 1:]), "are no batch"),
    ((IDS.float(), IDS), "are no batch"), ((IDS[0], IDS[0] + 1), "are no batch"),
    ((IDS + 60, IDS), "not in the model's vocabulary"),
    ((IDS, IDS + 60), "not in the model's vocabulary")])
def test_batches_of_other_kinds_get_a_sentence(batch, message):
    model = adapted()
    for call in (lambda: next(train(model, iter([batch, batch]), 1, 1e-3)), lambda: evaluate(model, [batch])):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.training


def test_ids_of_32_bits_are_ids():
    (inputs, targets), model = some_batches()[0], adapted()
    assert evaluate(model, [(inputs.int(), targets.int())]) == evaluate(model, [(inputs, targets)])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": -3}, {"steps": 1.0}, {"lr": -1.0}, {"lr": math.nan},
                                   {"lr": "1e-3"}])
def test_steps_and_rates_that_are_none(wrong):
    with pytest.raises(ValueError, match="choose a whole number of steps"):
        next(train(adapted(), some_batches(), **({"steps": 1, "lr": 1e-3} | wrong)))
    assert next(train(adapted(), some_batches(), np.int64(1), np.float32(1e-3))).step == 1


def test_every_module_gets_its_own_mode_back():
    model = adapted()
    frozen = model.model["layers"][0].eval()
    list(train(model, some_batches(), 2, 1e-3))
    evaluate(model, some_batches(1))
    assert model.training and not frozen.training and not frozen.mlp.training


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_a_batch_in_pieces_is_the_same_step(pieces):
    """Oracle: the batch as one, also where a piece has no token that counts."""
    ids = torch.randint(50, (5, 9), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, 3:] = -100
    targets[-1] = -100
    found = {}
    for asked in (1, pieces):
        adapted = our_llama().double()
        torch.manual_seed(0)
        apply_lora(adapted, rank=2)
        steps = list(train(adapted, [(ids[:, :-1], targets)] * 3, 3, 1e-2, pieces=asked))
        found[asked] = [(step.loss, step.grad_norm) for step in steps], [p.detach() for p in lora_parameters(adapted)]
    np.testing.assert_allclose(found[pieces][0], found[1][0], rtol=1e-12)
    torch.testing.assert_close(found[pieces][1], found[1][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong, message", [(6, "5 rows for 6 pieces: give each at least one, or ask for fewer pieces"),
                                            (0, "pieces=0: choose a whole number, 1 or more")])
def test_pieces_that_a_batch_has_not(wrong, message):
    ids = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        next(train(model(), [(ids[:, :-1], ids[:, 1:])], 1, 1e-2, pieces=wrong))
