"""The memory bill: every rule against what autograd really keeps, bills by hand, and every refusal."""
import math

import pytest
import torch
from torch.nn import functional as F

from lora_edu.lora.inject import apply_lora
from lora_edu.measure import memory, memory_measured
from lora_edu.measure.memory import RECIPES, bill, kept
from lora_edu.measure.memory_measured import measure
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import FABLE
from lora_edu.models.sizes import PRESETS, Sizes
from lora_edu.training.loop import loss_on

SMALL = LlamaConfig(50, 24, 40, 3, 4, 2, 64)
TARGETS = (None, "all-linear", ("q_proj", "v_proj"), ("o_proj",), ("down_proj",), ("up_proj",), ("gate_proj", "o_proj"),
           ("k_proj", "down_proj"))


def sizes_like(config):
    return Sizes("llama", config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                 config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings,
                 config.head_dim,
                 config.tie_word_embeddings)


def batch_of(vocab, batch, length):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(vocab, (batch, length), generator=generator) for _ in range(2))


def one_step(model, targets, batch, rank=3, optimizer=None):
    if targets is not None:
        apply_lora(model, targets if isinstance(targets, str) else list(targets), rank=rank, alpha=2 * rank)
    stepper = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer else None
    return measure(model, lambda: loss_on(model, batch), stepper)


def predicted(sizes, targets, recipe="fp32", **how):
    how = {"batch": 2, "length": 7, "rank": 3} | how
    return bill(sizes, "full" if targets is None else "lora", targets=targets or (), recipe=recipe, **how)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("dtype, recipe", [(torch.float32, "fp32"), (torch.bfloat16, "bf16-mixed")], ids=str)
def test_the_rules_are_what_autograd_keeps_to_the_byte(targets, dtype, recipe):
    found = one_step(Llama(SMALL).to(dtype), targets, batch_of(50, 2, 7))
    assert predicted(sizes_like(SMALL), targets, recipe).parts["activations"] == found.activations


@pytest.mark.parametrize("config", [LlamaConfig(300, 64, 172, 2, 4, 4, 64),
                                    LlamaConfig(500, 96, 256, 4, 6, 2, 128, tie_word_embeddings=True),
                                    LlamaConfig(1000, 128, 344, 6, 8, 8, 128)], ids=lambda c: f"{c.hidden_size}")
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_category_of_our_llama_at_three_sizes(config, targets, checkpointing):
    model = Llama(config)
    if checkpointing:
        memory_measured.checkpoint_blocks(model)
    found = one_step(model, targets, batch_of(config.vocab_size, 3, 33), rank=4, optimizer=torch.optim.AdamW)
    said = predicted(sizes_like(config), targets, batch=3, length=33, rank=4, checkpointing=checkpointing).parts
    for part in ("weights", "adapter", "gradients", "optimizer states"):
        assert found.parts[part] == said[part], part
    assert said["activations"] == pytest.approx(found.activations, rel=1e-3)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model, batch = Llama(SMALL), batch_of(50, 2, 7)

    def gradients():
        model.zero_grad()
        loss_on(model, batch).backward()
        return [p.grad.clone() for p in model.parameters()]
    plain = gradients()
    memory_measured.checkpoint_blocks(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def in_transformers(kind):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
    from transformers import LlamaConfig as HFLlamaConfig
    if kind == "gpt2":
        config = GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0,
                            attn_pdrop=0,
                            bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config), Sizes("gpt2", 300, 48, 192, 3, 4, 4, 64, 12, True)
    config = HFLlamaConfig(vocab_size=300, hidden_size=48, intermediate_size=128, num_hidden_layers=3,
                           num_attention_heads=4,
                           num_key_value_heads=4, max_position_embeddings=64)
    return LlamaForCausalLM(config), Sizes("llama", 300, 48, 128, 3, 4, 4, 64, 12)


@pytest.mark.parametrize("kind, within", [("llama", 0.03), ("gpt2", 0.1)])
@pytest.mark.parametrize("targets", [None, "all-linear"], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_of_transformers(kind, within, targets, checkpointing):
    model, sizes = in_transformers(kind)
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads() if targets else None
    found = one_step(model, targets, batch_of(300, 2, 50), optimizer=torch.optim.AdamW)
    said = predicted(sizes, targets, length=50, checkpointing=checkpointing).parts
    for part in ("weights", "adapter", "gradients", "optimizer states"):
        assert found.parts[part] == said[part], part
    assert said["activations"] == pytest.approx(found.activations, rel=within)


def test_lora_keeps_more_than_full_where_its_factors_are_wider():
    """A float32 copy of the input for every adapted layer: the price of float32 factors over a 16-bit base."""
    sizes = PRESETS["llama-7b"]
    act = {method: bill(sizes, method, recipe="bf16-mixed").parts["activations"] for method in ("full", "lora")}
    assert act["lora"] > act["full"]
    act = {method: bill(sizes, method, recipe="fp32").parts["activations"] for method in ("full", "lora")}
    assert 0.9 < act["lora"] / act["full"] < 1


def test_bills_by_hand():
    n = 6_738_415_616
    blocks = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008)
    full = {recipe: bill("llama-7b", "full", recipe=recipe, batch=1, length=1).parts
            for recipe in ("fp32", "bf16-mixed", "16-bit")}
    state = {recipe: parts["weights"] + parts["gradients"] + parts["optimizer states"]
             for recipe, parts in full.items()}
    assert state == {"fp32": 16 * n, "bf16-mixed": 16 * n, "16-bit": 8 * n}
    lora = bill("llama-7b", rank=8, targets=("q_proj", "v_proj"), recipe="nf4-double").parts
    trained = 32 * 2 * 8 * (4096 + 4096)
    assert trained == 4_194_304 and lora["adapter"] == 4 * trained and lora["optimizer states"] == 8 * trained
    assert lora["weights"] == pytest.approx(blocks * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (n - blocks))
    assert bill("llama-7b", rank=8, recipe="nf4").parts["weights"] - bill("llama-7b", rank=8,
                                                                          recipe="nf4-double").parts["weights"] == (
        # Dettmers et al. (2023), section 3: 0.373 bits a parameter
        pytest.approx(blocks * 0.373 / 8, rel=2e-3))
    # the rank's price: 16 bytes for each number of an adapter on all linear layers
    priced = {r: sum(bill("llama-7b", rank=r).parts[part] for part in ("adapter", "gradients", "optimizer states"))
              for r in (8, 64)}
    assert [round(value / 1e9, 2) for value in priced.values()] == [0.32, 2.56]


def test_optimizers_by_hand():
    n = PRESETS["gpt2"].parameters()
    states = {name: bill("gpt2", "full", recipe="fp32", optimizer=name, length=1).parts["optimizer states"]
              for name in memory.OPTIMIZERS}
    assert states == {"sgd": 0, "adam": 8 * n, "adamw-8bit": 2 * n * (1 + 4 / 256)}


def test_sgd_has_no_states_and_plain_sizes_no_name():
    found = one_step(Llama(SMALL), None, batch_of(50, 2, 7), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert found.states == 0 == predicted(sizes_like(SMALL), None, optimizer="sgd").parts["optimizer states"]
    assert found.peak > found.weights + found.activations
    assert "a llama model: 14,000 parameters" not in repr(predicted(sizes_like(SMALL), None))
    assert repr(predicted(sizes_like(SMALL), None)).startswith("a llama model ")


def test_the_totals_are_sums_and_the_table_shows_them():
    said = bill(str(FABLE), length=512, batch=4)
    assert said.total == sum(said.parts.values())
    assert said.parts["activations"] == sum(times * row.bytes for times, row in said.tensors)
    assert f"{said.total:,.0f}" in repr(said) and f"{said.total:,.0f}" in said._repr_html_()
    assert "156,160 numbers train" in said.summary() and "3,688,704" in said.summary()
    assert said.parts["temporary"] == 4 * 512 * 2048 * 8


def test_checkpointing_keeps_one_input_a_block_and_brings_one_block_back():
    plain, spared = (bill("llama-65b", "full", checkpointing=on) for on in (False, True))
    block, logits = sum(row.bytes for row in kept(PRESETS["llama-65b"], 1, 2048, act=2)), 2048 * 32000 * 8
    assert plain.parts["activations"] - spared.parts["activations"] == 80 * (block - 2048 * 8192 * 2)
    assert block > logits and plain.parts["temporary"] == logits and spared.parts["temporary"] == block


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("recipe, dtype", [("fp32", torch.float32), ("bf16-mixed", torch.bfloat16)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_at_a_real_vocabulary(method, recipe, dtype, checkpointing):
    """32,000 tokens, as LLaMA has: the loss going back holds two float32 copies of the logits, whatever the recipe."""
    config = LlamaConfig(32_000, 64, 172, 3, 4, 4, 128, tie_word_embeddings=True)
    model = Llama(config).to(dtype)
    if checkpointing:
        memory_measured.checkpoint_blocks(model)
    found = one_step(model, "all-linear" if method == "lora" else None, batch_of(32_000, 2, 40), rank=4)
    said = bill(sizes_like(config), method, rank=4, recipe=recipe, batch=2, length=40,
                checkpointing=checkpointing).parts
    predicted = sum(said[part] for part in ("weights", "adapter", "activations", "temporary"))
    assert found.peak == pytest.approx(predicted, rel=1e-3)


def test_the_peak_is_that_of_torchs_own_profiler():
    """Oracle: what its memory events add up to, on top of what was there."""
    from torch.profiler import ProfilerActivity, profile
    torch.manual_seed(0)
    model, batch = Llama(SMALL), batch_of(50, 2, 7)
    loss_on(model, batch).backward()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as taken:
        loss_on(model, batch).backward()
    events = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    model.zero_grad(set_to_none=True)
    found = measure(model, lambda: loss_on(model, batch))
    assert found.peak - found.weights == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"], ids=str)
def test_under_autocast_an_adapter_keeps_no_copy_of_its_input(targets):
    """It shares what the base keeps, so that LoRA keeps less than full: the rules of "16-bit", but for the factors."""
    def kept_by(targets):
        model = Llama(LlamaConfig(50, 64, 172, 3, 4, 4, 64)).to(torch.bfloat16)
        if targets:
            apply_lora(model, targets if isinstance(targets, str) else list(targets), rank=3)

        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                return loss_on(model, batch_of(50, 4, 60))
        return measure(model, loss).activations
    sizes = sizes_like(LlamaConfig(50, 64, 172, 3, 4, 4, 64))
    said = bill(sizes, targets=targets, rank=3, recipe="16-bit", batch=4, length=60).parts["activations"]
    assert kept_by(targets) == pytest.approx(said, rel=0.02) and kept_by(targets) < kept_by(None)


def test_measure_counts_shared_storage_once_and_weights_never():
    x = torch.randn(6, 4, requires_grad=True)
    model = torch.nn.Linear(4, 5, bias=False)
    found = measure(model, lambda: (F.relu(y := model(x)) * y.view(5, 6).T).sum())
    shapes = {shape for shape, *_ in found.kept}
    assert found.activations == 4 * (6 * 4 + 2 * 6 * 5), shapes          # x, y, relu(y)
    assert found.gradients == model.weight.nbytes and found.states == 0


@pytest.mark.parametrize("loss, said", [(lambda m: m(torch.ones(2, 4)), r"shape \(2, 5\)"),
                                        (lambda m: torch.zeros(()), "depends on nothing")])
def test_a_loss_that_is_none_is_refused(loss, said):
    model = torch.nn.Linear(4, 5)
    with pytest.raises(ValueError, match=said):
        measure(model, lambda: loss(model))


@pytest.mark.parametrize("how, said", [
    ({"recipe": "fp8"}, "recipe='fp8'"), ({"optimizer": "lion"}, "optimizer='lion'"),
    ({"method": "dora"}, "method='dora'"),
    ({"batch": 0}, "batch=0"), ({"length": -5}, "length=-5"), ({"length": 2.0}, "length=2.0"),
    ({"batch": True}, "batch=True"),
    ({"length": 2049}, "at most 2,048"), ({"rank": 5000}, "rank <= 4096"), ({"rank": -1}, "rank=-1"),
    ({"targets": ("wq",)}, "named 'wq'"),
    ({"method": "full", "recipe": "nf4"}, "four bits"), ({"strategy": "zero"}, "strategy='zero'"),
    ({"processes": 0}, "processes=0"), ({"processes": 4}, "without a strategy"),
    ({"strategy": "fsdp", "processes": 4, "recipe": "nf4"}, "FSDP2 shares those out")])
def test_what_cannot_be_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        bill("llama-7b", **how)


def test_every_recipe_gives_a_finite_bill_and_less_for_fewer_bits():
    totals = [bill("llama-7b", recipe=recipe).parts["weights"] for recipe in RECIPES]
    assert all(math.isfinite(total) for total in totals) and totals[0] > totals[1] == totals[2] > totals[3] > totals[4]


@pytest.mark.parametrize("method, recipe", [("lora", "bf16-mixed"), ("full", "fp32")])
def test_one_of_eight_processes_by_hand(method, recipe):
    """LLaMA 7B; what PyTorch really holds is tested in several processes (test_distributed)."""
    alone, ddp, fsdp = (bill("llama-7b", method, recipe=recipe, **how).parts for how in (
        {}, {"strategy": "ddp", "processes": 8}, {"strategy": "fsdp", "processes": 8}))
    assert ddp.pop("in transit") == alone["gradients"] and ddp == alone
    sizes, each = PRESETS["llama-7b"], {"fp32": 4, "bf16-mixed": 2}[recipe]
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    outside = 2 * 32000 * 4096 + 4096
    assert sizes.parameters() == 32 * block + outside
    factors = sizes.adapter("all-linear", 8) * 4 / 32
    lora = method == "lora"
    assert fsdp.pop("in transit") == outside * each + (
        2 * (block * each + 2 * factors) if lora else 16 * block + 4 * 32000 * 4096)
    for name, value in fsdp.items():
        assert value == alone[name] / (8 if name in ("weights", "adapter", "gradients", "optimizer states") else 1)
