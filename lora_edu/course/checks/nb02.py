"""Checkers of notebook 02. Reading this file tells you the answers."""
from torch import nn

from lora_edu.course.page.exercises import Verdict, check, check_decision, check_match
from lora_edu.course.records.stored import load_record
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.targets import PLACEMENTS


class Named(nn.Module):
    """Linear layers at the given dotted names, and a head that comes last."""

    def __init__(self, names):
        super().__init__()
        for name in [*names, "head"]:
            *parents, leaf = name.split(".")
            place = self
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = getattr(place, parent)
            place.add_module(leaf, nn.Linear(2, 2))


def check_matching(student) -> Verdict:
    """Exercise 2.1: apply_lora itself, on a model whose layers have the given names."""
    def oracle(names, entries):
        return list(apply_lora(Named(names), entries, rank=1).matched)

    def hint(got, want, names, entries):
        if not isinstance(got, (list, tuple)):
            return None
        if set(got) > set(want) and all(any(n.endswith(e) for e in entries) for n in got):
            return "an ending must begin after a dot: my_q_proj does not match q_proj."
        if set(got) > set(want):
            extra = next(name for name in got if name not in want)
            return f"{extra!r} is listed, and it ends in none of the entries after a dot."
        if set(got) < set(want):
            missing = next(name for name in want if name not in got)
            return f"{missing!r} is missing: it is an entry, or it ends in a dot and an entry."
        if isinstance(got, list) and sorted(got) == sorted(want):
            return "the right names, but not in the order of `names`."
        if isinstance(got, list) and len(got) > len(set(got)):
            return "a name that matches two entries is listed twice."

    cases = [(["layers.0.q_proj", "layers.0.my_q_proj", "layers.1.q_proj"], ["q_proj"]),
             (["a.up", "a.down", "b.up", "up"], ["up", "a.down"]),
             (["z.q", "z.k", "z.v"], ["v", "q", "z.q"]),
             (["x.aa.down", "x.a.down", "a.down.more", "x.a_down"], ["a.down"])]     # inside, in the middle, a regex
    return check("2.1", student, cases=cases, oracle=oracle, hint=hint)


def check_rank_for_budget(student) -> Verdict:
    """Exercise 2.2: count up, rank by rank."""
    def oracle(shapes, budget):
        rank = 0
        while rank < min(side for shape in shapes
                         for side in shape) and sum((rank + 1) * sum(shape) for shape in shapes) <= budget:
            rank += 1
        return rank

    def hint(got, want, shapes, budget):
        if got > want == min(side for shape in shapes for side in shape):
            return "that is more than the smaller side of one of the matrices."
        if got == want + 1:
            return "one too many: the budget may not be passed."
        if got == want - 1:
            return "one too few: the budget may be used up to the last number."

    cases = [([(256, 256)] * 8, 40_000), ([(64, 96), (96, 64)], 100), ([(4, 100)], 10_000),
             ([(688, 256), (256, 688)], 157_000), ([(64, 96)], 480), ([(100, 4)], 10_000),
             ([(100, 50), (90, 6), (80, 80)], 100_000), ([(256, 256), (512, 256)], 10_000_000)]
    return check("2.2", student, cases=cases, oracle=oracle, hint=hint)


def mystery_curves() -> dict[str, list[tuple[int, float]]]:
    """Exercise 2.3: held-out loss over the steps, of trainings in the record and of one that never moved."""
    record = load_record("lora_rates")
    start = record["before"]["task"]["bistro"]["valid"]
    curves = {run["lr"]: [(0, start)] + [(step, task) for step, task, _ in run["path"]] for run in record["runs"]}
    best = min(record["runs"], key=lambda run: run["valid"])["lr"]
    return {"P": curves[max(curves)], "Q": [(step, start) for step, _ in curves[best]], "R": curves[best],
            "S": curves[min(curves)]}


def check_causes(answers: dict[str, str | None]) -> Verdict:
    """Exercise 2.3."""
    return check_match("2.3", answers,
                       right={"P": "rate too high", "Q": "factors not given to the optimizer", "R": "rate about right",
                              "S": "rate too low"},
                       because="too small a step is late, too large a step is behind in spite of its size.",
                       hints={"P": "compare its early steps with its end.",
                              "Q": "what does a model do that is never updated?",
                              "R": "which one ends lowest?", "S": "it goes the right way all the time, slowly."})


def check_placement(choice: str | None) -> Verdict:
    """Exercise 2.4: mean recorded test loss on documentation; within 0.02 nats of the best is a tie, as the course's
    rules say.
    """
    docs = load_record("placements_docs").runs(task="python_docs").by("method")
    scores = {name: docs[name].mean("test") for name in PLACEMENTS if name in docs}
    return check_decision("2.4", choice, scores, within=0.02,
                          because="at an equal budget this placement is the best, or ties with it.")
