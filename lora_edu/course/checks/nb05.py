"""Checkers of notebook 05. Reading this file tells you the answers."""
from lora_edu.course.checks.nb03 import equals
from lora_edu.course.figures.memory import CARDS, GB
from lora_edu.course.page.exercises import Verdict, check, check_choice, is_blank, not_attempted, say, word
from lora_edu.measure.memory import Bill, bill
from lora_edu.models.sizes import Sizes

CARD, USED, TASK = "L4", 0.8, dict(model="llama-3.1-8b", length=1024, rank=16)      # exercise 5.4: what is settled


def check_adam_bytes(student) -> Verdict:
    """Exercise 5.1: the bill of a model whose every number trains."""
    def oracle(parameters, weight, state):
        return sum(each for each in (weight, weight, state, state)) * parameters

    def hint(got, want, parameters, weight, state):
        slips = [(parameters * (weight + 2 * state),
                  "the gradients are missing: one for each weight, in the weights' type."),
                 (parameters * (2 * weight + state),
                  "Adam keeps two states: the mean of the gradient, and that of its square."),
                 (parameters * 4 * weight, "the states have their own type, `state` bytes each."),
                 (2 * weight + 2 * state, "that is for one number; the model has `parameters`."),
                 (want / 1e9, "in bytes, not in GB.")]
        return next((text for wrong, text in slips if equals(got, wrong)), None)

    cases = [(1000, 2, 5), (7_000_000_000, 2, 2), (175_000_000_000, 4, 4), (123, 4, 1)]
    return check("5.1", student, cases=cases, oracle=oracle, hint=hint)


def check_lora_count(student) -> Verdict:
    """Exercise 5.3: the library's count of an adapter on sizes made up for it."""
    def sizes(layers, hidden, kv):
        return Sizes("llama", 10, hidden, 2 * hidden, layers, hidden // 4, kv // 4, 16, 4)

    def oracle(layers, hidden, kv, rank):
        return sizes(layers, hidden, kv).adapter(("q_proj", "v_proj"), rank)

    def hint(got, want, layers, hidden, kv, rank):
        slips = [(layers * rank * 4 * hidden, "v_proj has `kv` outputs, here fewer than its inputs."),
                 (layers * rank * (hidden + hidden + kv),
                  "two matrices, and each has an A and a B: A reads `hidden` numbers in both."),
                 (want // layers, "that is one layer."), (want // rank, "that is rank 1."),
                 (layers * (hidden * hidden + hidden * kv),
                  "those are the matrices themselves; an adapter has rank · (inputs + outputs)."),
                 (layers * rank * (hidden * hidden + hidden * kv), "inputs + outputs, not inputs times outputs."),
                 (4 * want, "that is bytes in float32; how many numbers are asked for."),
                 (2 * want, "that is bytes in 16 bits; how many numbers are asked for.")]
        return next((text for wrong, text in slips if equals(got, wrong)), None)

    cases = [(3, 64, 16, 8), (32, 64, 64, 8), (2, 48, 16, 4), (5, 32, 8, 1)]
    return check("5.3", student, cases=cases, oracle=oracle, hint=hint)


def _billed(recipe: str, batch: int, checkpointing: bool) -> Bill:
    """Exercise 5.4: the bill of a choice."""
    return bill(**TASK, recipe=recipe, batch=batch, checkpointing=checkpointing)


def check_fit(choice) -> Verdict:
    """Exercise 5.4: (recipe, batch, checkpointing) with the largest batch that one card has room for."""
    if is_blank(choice):
        return not_attempted("5.4")
    try:
        recipe, batch, checkpointing = choice
        if word(checkpointing) not in ("true", "false", "0", "1"):
            raise ValueError(f"checkpointing is True or False, not {checkpointing!r}.")
        recipe, checkpointing = word(recipe), word(checkpointing) in ("true", "1")
        batch = int(word(batch)) if word(batch).isdigit() else batch
        said = _billed(recipe, batch, checkpointing)
    except (TypeError, ValueError) as error:
        return say("5.4", False, f"{choice!r} cannot be billed: {error}")
    room = USED * CARDS[CARD] * GB
    if said.total > room:
        largest = max(said.parts, key=said.parts.get)
        return say("5.4", False, f"{said.total / GB:.1f} GB do not fit in {room / GB:.1f}; the largest part is "
                                 f"{largest}, {said.parts[largest] / GB:.1f} GB.")
    if batch < most(recipe, checkpointing):
        return say("5.4", False, f"{said.total / GB:.1f} GB: it fits, and with {recipe} "
                                 f"{'and' if checkpointing else 'without'} checkpointing a larger batch does, too.")
    best = max(most(each, on) for each in ("bf16-mixed", "16-bit", "nf4", "nf4-double") for on in (False, True))
    if batch < best:
        other = "another recipe" + ("" if checkpointing else ", or checkpointing,")
        return say("5.4", False, f"{batch} is the most for these two; {other} has room for {best}.")
    return say("5.4", True, f"correct: {said.total / GB:.1f} GB of {room / GB:.1f}, and the largest batch there is.")


def most(recipe: str, checkpointing: bool) -> int:
    """The largest batch that fits the card; 0 where none does."""
    batch = 0
    while _billed(recipe, batch + 1, checkpointing).total <= USED * CARDS[CARD] * GB:
        batch += 1
    return batch


def check_wrong_row(answer: str | None) -> Verdict:
    """Exercise 5.2: another table, whose sound cells follow three conventions."""
    return check_choice("5.2", answer, right="70B with LoRA",
                        because="16-bit weights of 70 billion parameters are 140 GB, or 130 GiB, before anything "
                                "trains; 48 GB needs a quantised base.",
                        hints={"8B in full": "16 bytes for each of 8 billion parameters: mixed precision, or float32.",
                               "8B with LoRA": "2 bytes × 8 billion: the weights alone, but it can be had.",
                               "34B in full": "8 bytes × 34 billion: all in 16 bits.",
                               "34B with LoRA": "2 bytes × 34 billion is 68 GB, and 63.3 GiB: another unit, not "
                                                "another truth.",
                               "70B in full": "8 bytes × 70 billion: the recipe of the row above."})
