"""Checkers of notebook 08. Reading this file tells you the answers."""
import functools
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_edu.course.checks.nb01 import randn
from lora_edu.course.checks.nb03 import equals
from lora_edu.course.figures.memory import GB
from lora_edu.course.page.exercises import (
    Verdict,
    check,
    check_match,
    describe,
    is_blank,
    is_stub,
    not_attempted,
    say,
    word,
)
from lora_edu.course.page.guarded import TooSlow, guarded
from lora_edu.course.records.stored import load_record
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.layer import LoRALinear
from lora_edu.measure.memory import bill
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.quantize import BLOCK, GROUP, QuantLinear, dequantize_nf4, quantize_nf4
from lora_edu.training.autograd_kept import kept_by_autograd
from lora_edu.training.loop import loss_on

CAUSES = {"A": "reentrant", "B": "first step", "C": "only queries", "D": "healthy"}
T4 = {"memory": 15.0, "model": "llama-3.1-8b", "length": 1024}        # exercise 8.5: GB that Colab's T4 has free
PRODUCTS = ("float32", "float16", "bfloat16")
NEAR = 0.03                                  # nats per token from the best cell of the record


def check_nf4_bytes(student) -> Verdict:
    """Exercise 8.1: what the library's own layer holds, counted tensor by tensor."""
    def oracle(numbers):
        return QuantLinear(nn.Linear(BLOCK, numbers // BLOCK, bias=False)).nbytes

    def hint(got, want, numbers):
        blocks = numbers // BLOCK
        groups = -(-blocks // GROUP)
        slips = [(numbers / 2, "that is the codes alone; each block has a largest entry, too."),
                 (numbers / 2 + 4 * blocks,
                  "that is without double quantisation: the largest entries take a byte each, and a float32 scale for "
                  "every 256 of them."),
                 (numbers / 2 + blocks, "the largest entries need their scales: a float32 for every 256."),
                 (numbers / 2 + blocks + 4 * groups, "one float32 more: the mean that was taken out of them."),
                 (numbers / 2 + blocks + 4 * blocks / GROUP + 4,
                  "a group that is not full needs its scale, too: round up."),
                 (numbers + blocks + 4 * groups + 4, "a code is four bits, so two of them share a byte."),
                 (8 * want, "in bytes, not in bits.")]
        return next((text for wrong, text in slips if equals(got, wrong)), None)

    return check("8.1", student, cases=[(576 * 1536,), (64 * 256 * 4,), (64,), (256 * 256,)], oracle=oracle, hint=hint)


def check_right_merge(student) -> Verdict:
    """Exercise 8.2: a sum of outer products on what the layer computed with while the adapter learned."""
    def oracle(codes, shape, published, lora_A, lora_B, scaling):
        outer = sum(torch.outer(lora_B[:, i].double(), lora_A[i].double()) for i in range(len(lora_A)))
        return dequantize_nf4(*codes, shape).double() + scaling * outer

    def hint(got, want, codes, shape, published, lora_A, lora_B, scaling):
        update, stored = scaling * lora_B @ lora_A, dequantize_nf4(*codes, shape)
        again = dequantize_nf4(**quantize_nf4(stored + update), shape=shape)
        slips = [(published + update, "the adapter learned beside the weights of four bits, and repaired some of what "
                                      "they lost: added to the published ones it repairs what is not broken."),
                 (again, "stored in four bits again, part of a small update is rounded away: keep the sum as it is."),
                 (stored + lora_B @ lora_A, "the scaling is missing."), (update, "that is the update alone."),
                 (stored, "that is the weight without its update.")]
        return next((text for wrong, text in slips
                     if got.shape == want.shape and torch.allclose(got, wrong.double(), atol=1e-6)), None)

    cases = []
    for out, into, rank, scaling in ((6, 64, 2, 0.5), (128, 32, 3, 2.0)):
        published = 0.05 * randn(out, into, seed=out)
        codes = tuple(quantize_nf4(published).values())
        cases.append((codes, (out, into), published, 0.1 * randn(rank, into), 0.1 * randn(out, rank), scaling))
    return check("8.2", student, cases=cases, oracle=oracle, hint=hint)


class Block(nn.Module):
    """Exercise 8.3: three adapted layers with something to keep between them."""

    def __init__(self, seed: int):
        super().__init__()
        self.inner = nn.ModuleList(LoRALinear.wrap(nn.Linear(8, 8, bias=False), 2, 4) for _ in range(3))
        for i, layer in enumerate(self.inner):
            layer.base_layer.weight.data = randn(8, 8, seed=seed + i)
            layer.lora_A.data, layer.lora_B.data = randn(2, 8, seed=seed + 3 + i), randn(8, 2, seed=seed + 6 + i)

    def forward(self, x):
        for layer in self.inner:
            x = torch.tanh(layer(x))
        return x


def check_checkpointed(student) -> Verdict:
    """Exercise 8.3: the plain block's gradients, with only the block's input kept."""
    if student is None or student is ... or is_stub(student):
        return not_attempted("8.3")
    for seed in (0, 20):
        plain, block, x = Block(seed), Block(seed), randn(5, 8, seed=seed + 9)
        answer = plain(x)
        answer.square().sum().backward()
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
        try:
            with warnings.catch_warnings(), guarded(), kept_by_autograd() as found:
                warnings.simplefilter("ignore")
                got = student(block, x)
            if got is None or got is ...:
                return say("8.3", False, "your function returns nothing: is a `return` missing?")
            if not isinstance(got, torch.Tensor) or got.shape != answer.shape:
                return say("8.3", False, f"got {describe(got)}, expected what the block returns, a tensor of shape "
                                         f"{tuple(answer.shape)}.")
            if got.requires_grad:
                got.square().sum().backward()
        except TooSlow:
            return say("8.3", False, "your function has not come back: is there a loop without an end in it?")
        except Exception as error:       # whatever a reader's code may raise is a verdict, not a traceback
            return say("8.3", False, f"your function raised {type(error).__name__}: {str(error)[:120]}")
        kept = len(found)
        del found
        silent = [name for name, p in block.named_parameters() if p.requires_grad and p.grad is None]
        if silent:
            return say("8.3", False, f"{len(silent)} of {len(wanted)} factors got no gradient, and nothing was raised: "
                                     "the input needs none, so the reentrant kind drops the whole block. "
                                     "use_reentrant=False, or an input that requires a gradient.")
        if not all(torch.allclose(p.grad, wanted[name]) for name, p in block.named_parameters() if p.requires_grad):
            return say("8.3", False, "the gradients are not the plain block's.")
        if kept > 4:
            return say("8.3", False, f"right gradients, but autograd kept {kept} tensors of the block: it is not "
                                     "checkpointed.")
    return say("8.3", True, "correct: the plain block's gradients, and only its input is kept.")


def mystery_runs() -> dict[str, dict[str, str]]:
    """Exercise 8.4: four trainings of a small Llama of three blocks; what the factors' gradients look like after one
    backward pass, by block.
    """
    return {name: _gradients(cause) for name, cause in CAUSES.items()}


def _gradients(cause: str) -> dict[str, str]:
    """{"block 0, lora_A": "none", ...}"""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 16, 24, 3, 2, 1))
    targets = ("q_proj",) if cause == "only queries" else "all-linear"
    apply_lora(model, targets, rank=2, alpha=4)
    if cause != "first step":
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(p)
    if cause == "reentrant":
        for block in list(model.model["layers"])[:-1]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=True)
    ids = torch.arange(20).reshape(2, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_on(model, (ids[:, :-1], ids[:, 1:])).backward()
    found = {}
    for i, block in enumerate(model.model["layers"]):
        for end in ("lora_A", "lora_B"):
            those = {name: p for name, p in block.named_parameters() if name.endswith(end)}
            kinds = {"none" if p.grad is None else "zero" if not p.grad.any() else "flows" for p in those.values()}
            found[f"block {i}, {len(those)} {end}"] = " and ".join(sorted(kinds))
    return found


def check_runs(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 8.4."""
    return check_match("8.4", answers, right=CAUSES,
                       because="None is a path that was never there (A: dropped by checkpointing, but for the last "
                               "block, which was not checkpointed); zero is a path through a factor that is zero (B: "
                               "lora_B at its start); and C has one adapter a block in place of seven.",
                       hints={"A": "which blocks learn, and what was done to the others?",
                              "B": "a zero is not a None: what multiplies the gradient on its way to lora_A?",
                              "C": "count the factors of a block.",
                              "D": "is there anything wrong with it?"})


def check_plan(plan) -> Verdict:
    """Exercise 8.5: (recipe of the weights, products, rank, rate) for 8 billion parameters on a T4."""
    if is_blank(plan):
        return not_attempted("8.5")
    try:
        recipe, products, rank, lr = plan
        recipe, products, lr = word(recipe), word(products), float(lr)
        rank = int(word(rank)) if word(rank).isdigit() else rank
        said = bill(T4["model"], recipe=recipe, rank=rank, length=T4["length"], checkpointing=True)
    except (TypeError, ValueError) as error:
        return say("8.5", False, f"{plan!r} cannot be billed: {error}")
    if products not in PRODUCTS:
        return say("8.5", False, f"{products!r} is not one of the products: {', '.join(PRODUCTS)}.")
    if said.total > T4["memory"] * GB:
        largest = max(said.parts, key=said.parts.get)
        return say("8.5", False, f"{said.total / GB:.1f} GB do not fit in {T4['memory']:g}; the largest part is "
                                 f"{largest}, {said.parts[largest] / GB:.1f} GB.")
    if products == "bfloat16":
        return say("8.5", False, "a T4 (compute capability 7.5) emulates bfloat16: it runs, slower than float32.")
    if products == "float32":
        return say("8.5", False, "it runs, and leaves the tensor cores unused: in an hour you see a fraction of the "
                                 "tokens that float16 with a loss scale would.")
    grid = load_record("real_model").runs("grid", model="SmolLM2")
    scores = {(run["method"], run["lr"]): run["valid"] for run in grid}
    found = scores.get((f"rank {rank}", lr))
    if found is None:
        rates = sorted(rate for method, rate in scores if method == f"rank {rank}")
        return say("8.5", False, f"the record has no rank {rank} at rate {lr}: it has rank 1 and 16"
                                 + (f", this one at {', '.join(map(str, rates))}." if rates else "."))
    best = min(run["valid"] for run in grid if run["method"] in ("rank 1", "rank 16"))
    if found > best + NEAR:
        return say("8.5", False, f"{found:.3f} nats per token on held-out restaurants; another rank or rate reaches "
                                 f"{best:.3f}.")
    return say("8.5", True, f"a good plan: {said.total / GB:.1f} GB by the ledger, float16 with a loss scale, and "
                            f"{found:.3f} nats per token on held-out restaurants, where the best is {best:.3f}.")
