"""Checkers of notebook 06. Reading this file tells you the answers."""
import functools
from collections.abc import Callable

import torch

from lora_edu.course.checks.nb01 import randn
from lora_edu.course.checks.nb03 import equals
from lora_edu.course.labs.merge_lab import losses_at, twin_in
from lora_edu.course.page.exercises import Verdict, check, check_limits, check_match, is_stub
from lora_edu.lora.adapter_file import TENSORS, load_adapter
from lora_edu.lora.merge import merge_lora
from lora_edu.measure.operators import operators
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import BISTRO_ADAPTER, load_pretrained
from lora_edu.rivals.methods import variants
from lora_edu.rivals.virtual_tokens import apply_prefix
from lora_edu.training import bistro

SQUARE = "model.layers.3.self_attn.q_proj"       # exercise 6.2: transposed, its update has the shape it should have
MERGES: dict[str, tuple[str, Callable]] = {      # what was added to W₀, given B @ A and the scaling
    "A": ("transposed", lambda product, scaling: scaling * product.T),
                                           "B": ("right", lambda product, scaling: scaling * product),
    "C": ("merged twice", lambda product, scaling: 2 * scaling * product),
                                           "D": ("scaling forgotten", lambda product, scaling: product)}
PLANS = ("merge", "merge in float32", "keep apart", "prefix")
# exercise 6.4: the most that each situation allows, and of what
LIMITS = {"A": {"operators more than the base runs": 0}, "B": {"MB of weights for 200 customers": 100},
          "C": {"tokens of a 500-token input that no longer fit": 0}, "D": {"% of the gain on held-out cards lost": 10}}


def check_fold(student) -> Verdict:
    """Exercise 6.1: a sum of outer products in float64, rounded once; and in the dtype of the weight, to the bit."""
    def oracle(weight, lora_A, lora_B, alpha):
        outer = sum(torch.outer(lora_B[:, i].double(), lora_A[i].double()) for i in range(len(lora_A)))
        return _typed((weight.double() + outer * alpha / len(lora_A)).to(weight.dtype))

    def hint(got, want, weight, lora_A, lora_B, alpha):
        scaling, product = alpha / len(lora_A), lora_B @ lora_A
        slips = [(weight.float() + product, "the scaling alpha / rank is missing."),
                 (weight.float() + alpha * product, "alpha is not divided by the rank, the number of rows of lora_A."),
                 (scaling * product, "that is the update alone; add it to the weight."),
                 (weight.float() - scaling * product, "the update is added, not subtracted.")]
        if product.shape[0] == product.shape[1]:
            slips.append((weight.float() + scaling * product.T,
                          "the product is transposed: on a square weight no shape warns you. It is lora_B @ lora_A."))
        if said := next((text for wrong, text in slips if equals(got[1], wrong.to(weight.dtype).double())), None):
            return said
        if got[0] != want[0]:
            return f"the merged weight is {got[0]} and should have the type of the weight, {want[0]}."
        if got[1].shape == want[1].shape and (got[1] - want[1]).abs().max() < 0.02 * want[1].abs().max():
            off = (got[1] != want[1]).sum().item()
            return (f"{off} of {want[1].numel()} entries differ in their last bit: rounded more than once. Make "
                    "product and sum in float32 (weight.float()), then round once, at the end.")
        if got[1].shape != want[1].shape:
            return f"the shape is {tuple(got[1].shape)}, expected {tuple(want[1].shape)}."
        return "the numbers are others: add alpha / rank times lora_B @ lora_A to the weight."

    cases = [(randn(5, 3), randn(2, 3), randn(5, 2), 6.0),
             (randn(4, 4).bfloat16(), randn(2, 4), 0.1 * randn(4, 2, seed=1), 3.0),
             (randn(24, 16, seed=1).bfloat16(), randn(3, 16, seed=1), 0.05 * randn(24, 3, seed=1), 6.0)]
    attempted = callable(student) and not is_stub(student)
    judged = (lambda *case: _typed(student(*case))) if attempted else student
    return check("6.1", judged, cases=cases, oracle=oracle, hint=hint)


def _typed(value):
    """(the name of its type, its numbers in float64), so that `check` judges a 16-bit answer as exactly as any
    other.
    """
    if value is None or value is ...:
        return None
    name = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    return name, value.double() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def mystery_merges() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Exercise 6.2: W₀ and ΔW of a square matrix of fable with the shipped adapter, and four ways to merge them,
    three wrong.
    """
    model, _ = load_pretrained("fable")
    load_adapter(model, BISTRO_ADAPTER)
    layer = model.get_submodule(SQUARE)
    product = layer.lora_B @ layer.lora_A
    merged = {name: layer.weight + make(product, layer.scaling) for name, (_, make) in MERGES.items()}
    return layer.weight.clone(), layer.delta_weight(), merged


def check_merges(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 6.2."""
    return check_match("6.2", answers, right={name: cause for name, (cause, _) in MERGES.items()},
                       because="the change has ΔW's size in A and B, but in A it points elsewhere, along ΔW.T. C holds "
                               "ΔW twice, D half of it, because this adapter's scaling is 2.",
                       hints={"A": "its change is as large as ΔW. Does it also point where ΔW points, or ΔW.T?",
                              "B": "measure how much of ΔW its change holds, and how much of ΔW.T.",
                              "C": "its change points along ΔW. How long is it?",
                              "D": "its change points along ΔW. How long is it, and what is this adapter's scaling?"})


def check_prefix_cost(student) -> Verdict:
    """Exercise 6.3: the library's own prefix on a tiny Llama, and the longest text that the model still reads."""
    def oracle(config, tokens):
        model = Llama(config)
        trained = apply_prefix(model, torch.zeros(1, tokens, dtype=torch.long))
        return trained, _longest(model, config.max_position_embeddings)

    def hint(got, want, config, tokens):
        if not isinstance(got, torch.Tensor) or got.shape != want.shape:
            return None
        numbers, left = want.tolist()
        c, given = config, got.tolist()
        per_head = 2 * c.num_hidden_layers * c.head_dim * tokens
        slips = [(per_head * c.num_attention_heads,
                  "keys and values have num_key_value_heads heads, here fewer than the queries have."),
                 (2 * c.num_hidden_layers * c.hidden_size * tokens,
                  "a key has num_key_value_heads * head_dim numbers, not hidden_size."),
                 (numbers // 2, "keys and values: two numbers where you count one."),
                 (numbers // c.num_hidden_layers, "every layer has a prefix of its own."),
                 (numbers // tokens, "that is one token's prefix.")]
        if given == [left, numbers]:
            return "the numbers come first, then the context."
        if given[0] != numbers:
            return next((text for wrong, text in slips if given[0] == wrong), None)
        if given[1] == c.max_position_embeddings - c.num_hidden_layers * tokens:
            return "the context is the same in every layer: the prefix takes its places once."
        if given[1] == c.max_position_embeddings:
            return "the prefix has places in the context, too: an input must leave them free."

    def config(layers, heads, kv_heads, context, head_dim=4):
        return LlamaConfig(8, 4 * heads, 8, layers, heads, kv_heads, context, head_dim)

    cases = [(config(3, 4, 4, context=32), 5), (config(2, 6, 2, context=48), 10),
             (config(1, 4, 1, context=20, head_dim=6), 7)]
    return check("6.3", student, cases=cases, oracle=oracle, hint=hint)


@torch.no_grad()
def _longest(model: Llama, context: int) -> int:
    """The most tokens that the model reads before it refuses."""
    for length in range(context, 0, -1):
        try:
            model(torch.zeros(1, length, dtype=torch.long))
            return length
        except ValueError:
            continue
    return 0


def check_choice(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 6.4: what each plan does in each situation is measured on fable, and must stay within that
    situation's limit.
    """
    def measured():
        return {name: {plan: dict.fromkeys(LIMITS[name], much) for plan, much in plans.items()}
                for name, plans in consequences().items()}
    return check_limits("6.4", answers, PLANS, LIMITS, measured)


@functools.cache
def consequences() -> dict[str, dict[str, float]]:
    """Exercise 6.4: {situation: {plan: what it costs}}, in the units of LIMITS, measured on fable with the shipped
    adapter.
    """
    base, tokenizer = load_pretrained("fable")
    models = variants(base)
    run = {name: len(operators(model, torch.arange(16)[None])) for name, model in models.items()}
    copy = 2 * sum(p.numel() for p in base.parameters()) / 1e6                    # MB in bfloat16
    adapter = (BISTRO_ADAPTER / TENSORS).stat().st_size / 1e6
    prefix = 2 * sum(p.numel() for p in models["prefix"].parameters() if p.requires_grad) / 1e6
    cut = {name: 500 - _longest(models[name], 500) for name in ("merged and unloaded", "LoRA", "prefix")}
    merged, apart = run["merged and unloaded"] - run["base"], run["LoRA"] - run["base"]
    return {"A": dict(zip(PLANS, (merged, merged, apart, run["prefix"] - run["base"]))),
            "B": dict(zip(PLANS, (200 * copy, 400 * copy, copy + 200 * adapter, copy + 200 * prefix))),
            "C": dict(zip(PLANS, (cut["merged and unloaded"], cut["merged and unloaded"], cut["LoRA"], cut["prefix"]))),
            "D": _small_update(base, bistro.heldout(tokenizer, 16)[0])}


def _small_update(model, cards, size: float = 0.001) -> dict[str, float]:
    """How much of the gain on held-out cards each plan loses, %, when the shipped adapter is scaled to ‖ΔW‖ = 0.001
    ‖W₀‖.
    """
    load_adapter(model, BISTRO_ADAPTER)
    wide, narrow = twin_in(model, torch.float32), twin_in(model, torch.bfloat16)
    strength = size / merge_lora(model).total.size
    (base,), (apart,) = (losses_at(wide, at, (cards,), merged=False) for at in (0.0, strength))
    (exact,), (rounded,) = (losses_at(twin, strength, (cards,), merged=True) for twin in (wide, narrow))
    return {plan: 100 * (loss - apart) / (base - apart) for plan, loss in zip(PLANS, (rounded, exact, apart, base))}
