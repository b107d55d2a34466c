"""The methods LoRA is compared with, against PEFT, a forward written by hand, and what the text itself would do in
their place.
"""
import copy

import peft
import pytest
import torch
from torch import nn

from lora_edu import apply_lora, load_pretrained
from lora_edu.rivals import rival
from lora_edu.rivals.bottleneck import BottleneckAdapter, apply_adapters
from lora_edu.rivals.methods import add_biases
from lora_edu.rivals.virtual_tokens import apply_prefix, apply_prompt
from lora_edu.training.loop import evaluate, loss_on, train
from tests.lora.tiny import IDS, hf_llama, logits, our_llama

VIRTUAL = torch.tensor([[7, 3, 9]])
METHODS = {"houlsby": lambda model: apply_adapters(model, 3), "lin": lambda model: apply_adapters(model, 5, "lin"),
           "prefix": lambda model: apply_prefix(model, VIRTUAL), "prompt": lambda model: apply_prompt(model, VIRTUAL)}
every_method = pytest.mark.parametrize("method", METHODS)


def make(**how):
    return our_llama(**how).eval()


def shaken(model, std=0.5):
    """Everything that trains, at random: as after training."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def everything(model):
    hooks = [len(getattr(module, name)) for module in model.modules()
             for name in ("_forward_hooks", "_forward_pre_hooks")]
    return ([(name, id(module), module.training) for name, module in model.named_modules()], hooks,
            [(name, id(p), p.requires_grad, p.detach().clone().numpy().tobytes())
             for name, p in model.named_parameters()])


# counts

def test_counts_are_those_of_the_papers_formulas():
    """By hand, with grouped queries: hidden 16, two layers, one key/value head of 8."""
    assert apply_adapters(make(), 3) == 2 * 2 * (2 * 16 * 3 + 3 + 16)
    assert apply_adapters(make(), 5, "lin") == 2 * (2 * 16 * 5 + 5 + 16)
    assert apply_prefix(make(), VIRTUAL) == 2 * 2 * 3 * 1 * 8
    assert apply_prompt(make(), VIRTUAL) == 3 * 16
    assert add_biases(make()) == 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)


@every_method
def test_what_is_counted_is_what_trains_and_the_rest_is_frozen(method):
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = METHODS[method](model)
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert told == sum(p.numel() for p in training.values()) > 0
    assert not set(training) & set(before)
    targets = IDS.roll(-1, 1)
    steps = list(train(model, [(IDS, targets)] * 6, 6, lr=0.05))
    assert steps[-1].loss < steps[0].loss
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items() if "_proj" not in name)


# adapters

def by_hand(model, adapters, ids):
    """Our Llama's forward written out; adapters: layer -> {"attention" or "mlp": BottleneckAdapter}."""
    def bent(h, adapter):
        low = torch.einsum("btc,rc->btr", h, adapter.down.weight) + adapter.down.bias
        low = low * 0.5 * (1 + torch.erf(low / 2**0.5))
        return h + torch.einsum("btr,cr->btc", low, adapter.up.weight) + adapter.up.bias
    from lora_edu.models.llama import rotary_angles
    x = model.model["embed_tokens"](ids)
    cos, sin = rotary_angles(model.config, 0, ids.shape[1], ids.device)
    for layer, found in zip(model.model["layers"], adapters, strict=True):
        h = layer.self_attn(layer.input_layernorm(x), cos, sin, None)
        x = x + (bent(h, found["attention"]) if "attention" in found else h)
        h = layer.mlp(layer.post_attention_layernorm(x))
        x = x + (bent(h, found["mlp"]) if "mlp" in found else h)
    return model.lm_head(model.model["norm"](x))


@pytest.mark.parametrize("kind, places", [("houlsby", ("attention", "mlp")), ("lin", ("mlp",))])
def test_adapters_are_the_forward_written_by_hand(kind, places):
    plain, model = make(), make()
    apply_adapters(model, 4, kind)
    shaken(model)
    found = [module for module in model.modules() if isinstance(module, BottleneckAdapter)]
    each = [dict(zip(places, found[i:i + len(places)])) for i in range(0, len(found), len(places))]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), by_hand(plain, each, IDS))
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)


@pytest.mark.parametrize("kind", ["houlsby", "lin"])
def test_adapters_do_the_same_to_both_llamas(kind, tmp_path):
    ours = make(tied=False)
    ours.save_folder(tmp_path)
    theirs = type(hf_llama()).from_pretrained(tmp_path).eval()
    for model in (ours, theirs):
        apply_adapters(model, 4, kind)
        shaken(model)
    torch.testing.assert_close(logits(ours), logits(theirs))


@pytest.mark.parametrize("method", ["houlsby", "lin"])
def test_new_adapters_and_biases_are_the_identity_bit_for_bit(method):
    model = make()
    before = logits(model)
    METHODS[method](model)
    assert torch.equal(logits(model), before)
    biased = make()
    add_biases(biased)
    assert torch.equal(logits(biased), before)


# prefix and prompt

@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_start_is_a_model_that_has_just_read_the_tokens(method):
    """Oracle: the base reads the tokens and the text in one go."""
    model = make()
    with torch.no_grad():
        out = model(torch.cat([VIRTUAL.expand(2, -1), IDS], dim=1))
    want = getattr(out, "logits", out)[:, 3:]
    METHODS[method](model)
    torch.testing.assert_close(logits(model), want)
    assert logits(model).shape == (2, 5, 50)


def as_peft_stores(prefix):
    """Keys and values of a `Prefix` as one row a position: layer by layer, its key, then its value, (P, layers * 2 *
    H_kv * D).
    """
    both = torch.stack([prefix.keys, prefix.values], dim=1)                              # (layers, 2, H_kv, P, D)
    return both.permute(3, 0, 1, 2, 4).flatten(1)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_peft_says_the_same_with_the_same_numbers(method, tmp_path):
    """Oracle: PEFT on transformers' Llama with the same weights. It leaves a prompt's own logits in place."""
    ours = make(tied=False)
    ours.save_folder(tmp_path)
    theirs = type(hf_llama()).from_pretrained(tmp_path).eval()
    METHODS[method](ours)
    shaken(ours)
    kind = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[method]
    theirs = peft.get_peft_model(theirs, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        weight = as_peft_stores(ours.prefix) if method == "prefix" else ours.prompt.vectors
        theirs.prompt_encoder["default"].embedding.weight.copy_(weight)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == rival.trainable(ours)
    torch.testing.assert_close(logits(ours), logits(theirs)[:, -5:])
    loss_on(ours, (IDS, IDS.roll(-1, 1))).backward()
    assert all(p.grad.abs().sum() > 0 for p in ours.parameters() if p.requires_grad)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    heard = theirs.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **how)
    assert torch.equal(ours.generate(IDS, 8, temperature=0), heard) and heard.shape == (2, 13)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_with_a_cache_the_text_can_come_in_pieces(method):
    """The prefix is there once, whoever made the cache; the limit counts it."""
    model = make()
    METHODS[method](model)
    shaken(model)
    whole, cache = logits(model), model.new_cache()
    with torch.no_grad():
        parts = torch.cat([model(IDS[:, :2], cache), model(IDS[:, 2:3], cache), model(IDS[:, 3:], cache=cache)], dim=1)
    torch.testing.assert_close(parts, whole)
    assert cache.length == 3 + 5
    with_cache, without = (model.generate(IDS, 6, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape == (2, 11)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_context_is_shorter_by_its_length(method):
    model, limit = make(), 32
    METHODS[method](model)
    with torch.no_grad():
        model(torch.zeros(1, limit - 3, dtype=torch.long))
        with pytest.raises(ValueError, match=rf"{limit - 2} tokens do not fit: of a context of {limit} the {method} "
                           rf"leaves {limit - 3}"):
            model(torch.zeros(1, limit - 2, dtype=torch.long))
    before = logits(model)
    with pytest.raises(ValueError, match="stands before token ids"):
        model()
    assert torch.equal(logits(model), before), "a refused call leaves nothing behind"


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_a_cache_holds_of_the_text_is_counted_once(method):
    model = make()
    METHODS[method](model)
    cache = model.new_cache()
    with torch.no_grad():
        for piece in (20, 9):                            # 3 + 29 fill the context of 32
            model(torch.zeros(1, piece, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="30 tokens do not fit"):
            model(torch.zeros(1, 1, dtype=torch.long), cache)


def test_a_prompt_changes_the_embedding_only_while_the_model_reads():
    model = make()
    embedding = model.get_submodule("model.embed_tokens")
    before = embedding(IDS)
    apply_prompt(model, VIRTUAL)
    shaken(model)
    logits(model)
    assert torch.equal(embedding(IDS), before)


def test_a_prefix_s_loss_on_a_batch_is_that_of_its_rows():
    model = make()
    apply_prefix(model, VIRTUAL)
    shaken(model)
    targets = IDS.roll(-1, 1)
    alone = [evaluate(model, [(IDS[i:i + 1], targets[i:i + 1])]) for i in (0, 1)]
    assert evaluate(model, [(IDS, targets)]) == pytest.approx(sum(alone) / 2, rel=1e-6)


@every_method
def test_a_deep_copy_has_hooks_of_its_own(method):
    model = make()
    METHODS[method](model)
    said, twin = logits(model), copy.deepcopy(model)
    shaken(twin)
    assert not torch.allclose(logits(twin), said, atol=1e-3) and torch.equal(logits(model), said)


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_the_dtype_and_mode_are_the_model_s(method, training):
    model = our_llama().bfloat16().train(training)
    METHODS[method](model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training == training for module in model.modules())
    assert logits(model).dtype == torch.bfloat16


# what is refused

REFUSED = {
    "bottleneck 0": (lambda m: apply_adapters(m, 0), "bottleneck=0: choose a whole number"),
    "another kind": (lambda m: apply_adapters(m, 2, "parallel"), "kind='parallel': choose 'houlsby'"),
    "no token": (lambda m: apply_prefix(m, torch.zeros(1, 0, dtype=torch.long)), r"ids of shape \(1, 0\): a prefix "
                 r"starts from"),
    "two texts": (lambda m: apply_prompt(m, IDS),
                  r"ids of shape \(2, 5\): a prompt starts from the tokens of one text"),
    "no batch": (lambda m: apply_prefix(m, IDS[0]), r"ids of shape \(5,\)"),
    "prefix as long as the context": (lambda m: apply_prefix(m, torch.zeros(1, 32, dtype=torch.long)),
                                      "a prefix of 32 leaves no place for a text in a context of 32: choose fewer"),
    "prompt longer than the context": (lambda m: apply_prompt(m, torch.zeros(1, 600, dtype=torch.long)), "a prompt of "
                                       "600 leaves no place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_sentence_and_the_model_unharmed(case):
    call, message = REFUSED[case]
    model = make()
    before, said = everything(model), logits(model)
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert everything(model) == before and torch.equal(logits(model), said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("first", [*METHODS, "LoRA"])
@pytest.mark.parametrize("second", [*METHODS, "BitFit"])
def test_a_second_method_is_refused(first, second):
    model = make()
    (METHODS | {"LoRA": apply_lora})[first](model)
    before = everything(model)
    with pytest.raises(ValueError, match="the model carries a .* already, and adding another method would freeze it"):
        (METHODS | {"BitFit": add_biases})[second](model)
    assert everything(model) == before


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="this Sequential has no linear layer called o_proj or down_proj"):
        apply_adapters(nn.Sequential(nn.Linear(2, 2)), 1)


# biases

def test_biases_train_and_the_head_has_none():
    model = make(tied=False)
    add_biases(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("_proj.bias") for name in named) and len(named) == 14 and model.lm_head.bias is None
    before = {name: p.clone() for name, p in model.named_parameters()}
    list(train(model, [(IDS, IDS.roll(-1, 1))] * 3, 3, lr=0.1))
    assert all(torch.equal(p, before[name]) != (name in named) for name, p in model.named_parameters())


def test_biases_that_are_there_are_kept_and_train():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    bias = model[0].bias.detach().clone()
    assert add_biases(model) == 6 and torch.equal(model[0].bias, bias) and not model[0].weight.requires_grad


def test_on_fable_equal_budgets_are_equal_and_a_prompt_cannot_have_one():
    """LoRA of rank 8 everywhere trains 156,160 numbers.

    As a prompt these would be 610 embeddings, in a context of 512.
    """
    counts = []
    for apply in (lambda m: apply_lora(m, rank=8).trainable, lambda m: apply_adapters(m, 38),
                  lambda m: apply_adapters(m, 76, "lin"),
                  lambda m: apply_prefix(m, torch.zeros(1, 76, dtype=torch.long))):
        counts.append(apply(load_pretrained()[0]))
    assert counts[0] == 156_160 and all(abs(count - counts[0]) < 0.02 * counts[0] for count in counts)
    model = load_pretrained()[0]
    with pytest.raises(ValueError, match="a prompt of 610 leaves no place for a text in a context of 512"):
        apply_prompt(model, torch.zeros(1, 156_160 // 256, dtype=torch.long))
