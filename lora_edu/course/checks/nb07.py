"""Checkers of notebook 07. Reading this file tells you the answers."""
import functools

import torch
from torch import nn

from lora_edu.course.checks.nb01 import randn
from lora_edu.course.page.exercises import Verdict, check, check_limits, check_match, is_stub
from lora_edu.course.trades import SHIPPED
from lora_edu.lora.adapter_file import TENSORS, load_adapter, read_adapter
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.merge import merge_lora
from lora_edu.lora.stack import LoRAStack
from lora_edu.measure.operators import matrix_products, operators
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro
from lora_edu.training.loop import evaluate

FILES = {"A": "right", "B": "wrong prefix", "C": "wrong layers", "D": "never trained"}       # exercise 7.2
PLANS = ("merge", "stack", "swap")
# exercise 7.3: what each situation limits, and to how much
LIMITS = {"A": {"MB in memory": 20, "products with a matrix more than the base": 0},
          "B": {"passes through the base for one batch": 1, "MB in memory": 40},
          "C": {"products with a matrix more than the base": 0, "MB in memory": 40}}


def check_customers(student) -> Verdict:
    """Exercise 7.1: adapter after adapter is put into memory until one does not fit any more."""
    def oracle(room, base_bytes, shapes, rank, bytes_each):
        left, count = room - base_bytes, 0
        one = sum(rank * side * bytes_each for shape in shapes for side in shape)
        while left >= one:
            left, count = left - one, count + 1
        return count

    def hint(got, want, room, base_bytes, shapes, rank, bytes_each):
        sides = sum(out + into for out, into in shapes)
        slips = [(room // (rank * sides * bytes_each), "the base takes its place first: room - base_bytes is left."),
                 ((room - base_bytes) // (rank * sides), "that counts numbers: each of them takes bytes_each bytes."),
                 ((room - base_bytes) // (rank * bytes_each * sum(out * into for out, into in shapes)),
                  "a factor has rank rows of one side, not of both: rank * (out + in) numbers for each matrix."),
                 (want + 1, "the last one does not fit as a whole: round down.")]
        return next((text for wrong, text in slips if got == wrong), None)

    cases = [(1000, 300, [(4, 6), (5, 6)], 2, 4), (900, 100, [(3, 7)], 3, 2),
             (5000, 1000, [(8, 4), (8, 4), (2, 9)], 1, 2), (120, 100, [(5, 5)], 2, 4)]
    return check("7.1", student, cases=cases, oracle=oracle, hint=hint)


def mystery_files() -> dict[str, dict[str, torch.Tensor]]:
    """Exercise 7.2: the tensors of four adapter files, by name, as a loader that says nothing finds them."""
    _, tensors, _ = read_adapter(SHIPPED["bistro"])
    tensors = {name: t.float() for name, t in tensors.items()}
    layers = sorted({name.split(".")[2] for name in tensors})

    def moved(name):                    # each layer's factors in the next layer's place
        parts = name.split(".")
        parts[2] = layers[(layers.index(parts[2]) + 1) % len(layers)]
        return ".".join(parts)
    return {"A": tensors, "B": {f"base_model.model.{name}": t for name, t in tensors.items()},
            "C": {moved(name): t for name, t in tensors.items()},
            "D": {name: t if ".lora_A." in name else torch.zeros_like(t) for name, t in tensors.items()}}


def check_files(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 7.2."""
    return check_match("7.2", answers, right=FILES,
                       because="B's names begin with a prefix that the model's do not, so nothing was placed, and "
                               "nobody said so; D was placed whole and its B is zero; C was placed whole, with "
                               "numbers that were learned in other places.",
                       hints={"A": "all of it was placed, and the loss is low.",
                              "B": "how many of its tensors found a place?",
                              "C": "everything is placed and the update is as large as A's, and yet the loss is high.",
                              "D": "everything is placed. How large is the update?"})


def check_sum(student) -> Verdict:
    """Exercise 7.4: any two factors will do whose product is the sum of the two updates and whose inner side is no
    larger than both ranks together; the product is compared with a sum of outer products.
    """
    def oracle(A1, B1, s1, A2, B2, s2):
        return sum(s * torch.outer(B[:, i].double(), A[i].double()) for A, B, s in ((A1, B1, s1), (A2, B2, s2))
                   for i in range(len(A)))

    def hint(got, want, A1, B1, s1, A2, B2, s2):
        if got.shape != want.shape:
            return f"lora_B @ lora_A is {tuple(got.shape)}, and the update is {tuple(want.shape)}."
        slips = [(B1 @ A1 + B2 @ A2, "the two scalings are missing: put each into its own B."),
                 (s1 * s2 * (B1 @ A1 + B2 @ A2), "each update has its own scaling.")]
        if A1.shape == A2.shape:
            slips += [((s1 * B1 + s2 * B2) @ (A1 + A2), "that adds the factors: B₁A₂ and B₂A₁ are in it, which nobody "
                                                        "trained."),
                      ((B1 + B2) @ (A1 + A2), "that adds the factors: B₁A₂ and B₂A₁ are in it, which nobody trained.")]
        return next((text for wrong, text in slips if torch.allclose(got, wrong.double(), atol=1e-5)), None)

    def judged(A1, B1, s1, A2, B2, s2):
        answer = student(A1, B1, s1, A2, B2, s2)
        if answer is None or answer is ...:
            return None
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise TypeError("two factors are asked for: return A, B")
        A, B = map(torch.as_tensor, answer)
        if B.shape[1] > len(A1) + len(A2):
            raise ValueError(f"the rank of the answer is {B.shape[1]}, and {len(A1)} + {len(A2)} are enough")
        return B.double() @ A.double()

    def pair(rank, seed, scaling):
        return randn(rank, 5, seed=seed), randn(4, rank, seed=seed), scaling

    cases = [(*pair(2, 0, 2.0), *pair(3, 1, 0.5)), (*pair(2, 2, 1.5), *pair(2, 3, 3.0)),
             (*pair(1, 4, 1.0), *pair(2, 5, -1.0))]
    attempted = callable(student) and not is_stub(student)
    return check("7.4", judged if attempted else student, cases=cases, oracle=oracle, hint=hint)


def check_plans(answers: dict[str, str | None] | None) -> Verdict:
    """Exercise 7.3: what each plan does in each situation is counted on fable."""
    return check_limits("7.3", answers, PLANS, LIMITS, consequences)


@functools.cache
def consequences() -> dict[str, dict[str, dict[str, float]]]:
    """Exercise 7.3: {situation: {plan: {what: how much}}}; one adapter in A, ten in B and C."""
    folders = [*SHIPPED.values()]
    ids = torch.arange(16)[None]
    base = load_pretrained()[0]
    whole, plain = sum(p.nbytes for p in base.parameters()) / 1e6, matrix_products(operators(base, ids))
    adapter = (folders[0] / TENSORS).stat().st_size / 1e6
    found = {name: {plan: {} for plan in PLANS} for name in LIMITS}
    swapped = load_pretrained()[0]
    load_adapter(swapped, folders[0])
    beside = merge_lora(swapped).extra_bytes / 1e6                                  # the merged weights, W₀ is kept
    merged = matrix_products(operators(swapped, ids)) - plain
    for name, adapters in (("A", 1), ("B", 10), ("C", 10)):
        stack = LoRAStack.from_folders(load_pretrained()[0], (folders * 4)[:adapters])
        stacked = sum(p.nbytes for p in stack.model.parameters()) / 1e6
        with stack.rows([0]):
            more = sum("mm" in called for called in operators(stack.model, ids)) - sum(
                "mm" in called for called in operators(base, ids))
        for plan, memory, products, passes in (
                ("merge", adapters * whole, merged, adapters), ("stack", stacked, more, 1),
                ("swap", whole + beside + adapters * adapter, merged, adapters)):
            found[name][plan] = {"MB in memory": memory, "products with a matrix more than the base": products,
                                 "passes through the base for one batch": passes}
    return found


@torch.no_grad()
def loss_and_size(model: nn.Module) -> tuple[float, float]:
    """Loss on 32 held-out cards, nats per token, and ‖ΔW‖ over all layers."""
    tokenizer = load_pretrained()[1]
    size = sum(layer.delta_weight().square().sum().item() for _, layer in lora_layers(model)) ** 0.5
    return evaluate(model, bistro.heldout(tokenizer, 32, split="test")), size
