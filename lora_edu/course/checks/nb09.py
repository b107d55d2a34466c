"""Checkers of notebook 09. Reading this file tells you the answers."""
import math

import torch

from lora_edu.course.page.exercises import Verdict, by_key, check, check_match, is_blank, say, word
from lora_edu.lora.factors import lora_parameters
from lora_edu.lora.inject import apply_lora
from lora_edu.measure.memory import Bill, bill
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro
from lora_edu.training.loop import Batch, loss_on

RUNS = {"A": "same rows", "B": "healthy", "C": "mean of means", "D": "not sent"}              # exercise 9.3
# exercise 9.4: LLaMA 3.1 70B, rank 8, one text of 1,024 tokens in each of four processes, checkpointed; what a card
# holds, what a card sends in a second, how long sending may take in a step, and whether four bits are allowed
PLAN = {"model": "llama-3.1-70b", "length": 1024, "checkpointing": True, "processes": 4}
CARDS = {"A": {"GB": 48, "GB a second": 25, "seconds": 1.0, "bits": ("bf16-mixed", "nf4-double")},
         "B": {"GB": 80, "GB a second": 450, "seconds": 1.0, "bits": ("bf16-mixed",)}}


def check_mean(student) -> Verdict:
    """Exercise 9.1: as if the losses of all tokens lay in one list."""
    def oracle(means, tokens):
        each = [mean for mean, count in zip(means, tokens) for _ in range(count)]
        return math.fsum(each) / len(each)

    def hint(got, want, means, tokens):
        if 0 in tokens and not math.isfinite(got):
            return "a process without a token that counts has no mean (nan), and nan times 0 is nan: leave it out."
        known = [mean for mean in means if math.isfinite(mean)]
        if abs(got - sum(known) / len(known)) < 1e-6:
            return "that is the mean of the means: a token of the shorter batch counts for more."
        return None

    return check("9.1", student, oracle=oracle, hint=hint, cases=[
        ([2.0, 5.0], [30, 10]), ([1.5, 4.0, 2.5], [7, 3, 12]), ([3.0, float("nan"), 1.0], [5, 0, 15])])


def check_sent(student) -> Verdict:
    """Exercise 9.2: a ring is walked, a piece of the gradient after another."""
    def oracle(shapes, rank, processes, bytes_each):
        numbers = sum(rank * side for shape in shapes for side in shape)
        piece, sent = numbers * bytes_each / processes, 0.0
        for _round in range(processes - 1):
            sent += piece                                    # adding up
        for _round in range(processes - 1):
            sent += piece                                    # handing round
        return sent

    def hint(got, want, shapes, rank, processes, bytes_each):
        size = want * processes / (2 * (processes - 1))
        whole = bytes_each * sum(out * into for out, into in shapes) * 2 * (processes - 1) / processes
        slips = [(size, "that is the gradients' size: on a ring a process sends 2 (n - 1) / n times as much."),
                 (want / 2, "the ring is walked twice: once to add up, once to hand round."),
                 (size * 2, "nearly: of n pieces each walk sends n - 1."),
                 (want * processes, "that is what all of them send together; one process is asked for."),
                 (whole, "that is full fine-tuning's: a pair of factors has rank * (out + in) numbers.")]
        return next((text for wrong, text in slips if math.isclose(got, wrong)), None)

    return check("9.2", student, oracle=oracle, hint=hint, cases=[
        ([(64, 48), (48, 80)], 4, 4, 4), ([(96, 32)], 3, 5, 2), ([(20, 20), (8, 44), (8, 44)], 2, 8, 4)])


def mystery_runs() -> dict[str, tuple[str, ...]]:
    """Exercise 9.3: one step of fable's LoRA in two processes, played one after the other, with four ways of doing it:
    how many rows both saw, how far their factors are apart afterwards, and how far the first one's are from those of
    one process with all sixteen rows; relative to how far that one's moved.
    """
    model, tokenizer = load_pretrained("fable")
    torch.manual_seed(0)
    apply_lora(model, rank=4)
    batch = by_length(next(bistro.batches(tokenizer, 1)))
    halves = list(zip(*(t.tensor_split(2) for t in batch)))
    start = factors(model)
    alone = moved(model, gradient(model, batch, (batch[1] != -100).sum().item())) - start
    found = {}
    for name, cause in RUNS.items():
        given = [halves[0], halves[0]] if cause == "same rows" else halves
        counts = [(targets != -100).sum().item() for _, targets in given]
        over = {"mean of means": [2 * count for count in counts], "not sent": counts}.get(cause, [sum(counts)] * 2)
        own = [gradient(model, half, count) for half, count in zip(given, over)]
        ends = [moved(model, one) for one in own] if cause == "not sent" else [moved(model, sum(own))] * 2
        rows = 8 if cause == "same rows" else 0
        apart, off = ((a - b).norm() / alone.norm() for a, b in ((ends[0], ends[1]), (ends[0] - start, alone)))
        found[name] = str(rows), f"{apart:.2f}", f"{off:.2f}"
    return found


def by_length(batch: Batch) -> Batch:
    """The rows with the fewest tokens that count first, as a loader that sorts texts by length deals them out."""
    order = (batch[1] != -100).sum(dim=1).argsort(stable=True)
    return batch[0][order], batch[1][order]


def factors(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in lora_parameters(model)])


def gradient(model, batch: Batch, tokens: float) -> torch.Tensor:
    """Of the summed loss over so many tokens, all factors in one row."""
    model.zero_grad()
    (loss_on(model, batch, "sum") / tokens).backward()
    return torch.cat([p.grad.flatten() for p in lora_parameters(model)])


def moved(model, grad: torch.Tensor) -> torch.Tensor:
    """The factors after one step of plain SGD; the model stays as it is."""
    return factors(model) - 0.1 * grad


def check_runs(answers) -> Verdict:
    """Exercise 9.3."""
    return check_match("9.3", answers, right=RUNS, because=(
        "D's processes end apart, so nothing was sent; A's saw the same eight rows twice; C's saw all sixteen, agree, "
        "and are still not where one process would be: the weights of the two halves are wrong."),
        hints={"A": "how many rows did both see?", "B": "this one ends where one process ends.",
               "C": "all rows once, both processes alike, and yet elsewhere than one process: what is left?",
               "D": "two processes that talked would end at the same factors."})


def plan_of(recipe: str, strategy: str) -> Bill:
    """Exercise 9.4: the bill of one card."""
    return bill(**PLAN, recipe=recipe, strategy=strategy)


def seconds(recipe: str, strategy: str, speed: float) -> float:
    """Exercise 9.4: of sending in a step, at so many GB a second, on a ring. DDP adds up the factors' gradients; FSDP2
    gathers the weights twice, for the forward and the backward pass, and reduces the gradients.
    """
    n = PLAN["processes"]
    whole = bill(**PLAN | {"processes": 1}, recipe=recipe).parts
    weights, gradients = whole["weights"] + whole["adapter"], whole["gradients"]
    given = 2 * gradients if strategy == "ddp" else 2 * weights + gradients
    return given * (n - 1) / n / 1e9 / speed


def check_plans(answers) -> Verdict:
    """Exercise 9.4: each plan is billed."""
    plans = by_key("9.4", answers, CARDS)
    if isinstance(plans, Verdict):
        return plans
    told = []
    for name, cards in CARDS.items():
        plan = plans[name]
        if is_blank(plan):
            return say("9.4", False, f"{name}: no plan yet; give (recipe, strategy), such as ('bf16-mixed', 'ddp').")
        try:
            recipe, strategy = map(word, plan)
            said = plan_of(recipe, strategy)
        except (TypeError, ValueError) as error:
            return say("9.4", False, f"{name}: {plan!r} cannot be billed: {error}")
        if recipe not in cards["bits"]:
            return say("9.4", False, f"{name}: the weights are to be {' or '.join(cards['bits'])}, not {recipe}.")
        if said.total > cards["GB"] * 1e9:
            largest = max(said.parts, key=said.parts.get)
            return say("9.4", False, f"{name}: {said.total / 1e9:.1f} GB do not fit in {cards['GB']}; the largest part "
                                     f"is {largest}, {said.parts[largest] / 1e9:.1f} GB.")
        takes = seconds(recipe, strategy, cards["GB a second"])
        if takes > cards["seconds"]:
            return say("9.4", False, f"{name}: it fits, {said.total / 1e9:.0f} GB, and a step sends for {takes:.1f} "
                                     f"seconds; {cards['seconds']:g} may be.")
        told.append(f"{name}: {said.total / 1e9:.0f} GB a card, {takes:.2f} s of sending a step")
    return say("9.4", True, f"both fit and are quick enough, by the ledger. {'; '.join(told)}.")
