"""Every checker that judges a function, against right answers in many dresses and wrong ones of every kind.

Kinds: a forgotten return, a raise, a sign, a doubling, off by one, transposed, right on the first case only, another
type, a changed input, a private container; and for each exercise the slips of its own. A wrong answer is told in one
line and never raises; a right one is never refused.
"""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lora_edu.course.checks import nb00, nb01, nb02, nb03, nb04, nb05, nb06, nb07, nb09


def slots_right(said, given):
    slots = said.keys() | given.keys()
    return sum(slot in said and slot in given and said[slot] == given[slot] for slot in slots) / len(slots)


def matching(names, entries):
    return [name for name in names if any(name == entry or name.endswith("." + entry) for entry in entries)]


def rank_for_budget(shapes, budget):
    return min(budget // sum(map(sum, shapes)), min(map(min, shapes)))


def effective_rank(sigma):
    p = sigma**2 / (sigma**2).sum()
    p = p[p > 0]
    return torch.exp(-(p * p.log()).sum())


def scaling(rank, alpha, rule):
    return 2.0 if rule == "2r" else alpha / rank if rule == "fixed" else alpha / rank**0.5


def fold(weight, lora_A, lora_B, alpha):
    return (weight.float() + alpha / lora_A.shape[0] * (lora_B @ lora_A)).to(weight.dtype)


def prefix_cost(config, tokens):
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * tokens, config.max_position_embeddings - tokens


def customers(room, base_bytes, shapes, rank, bytes_each):
    return (room - base_bytes) // (bytes_each * sum(rank * (out + into) for out, into in shapes))


def add(A1, B1, s1, A2, B2, s2):
    return torch.cat([A1, A2]), torch.cat([s1 * B1, s2 * B2], dim=1)


def mean_of_all(means, tokens):
    return sum(mean * count for mean, count in zip(means, tokens) if count) / sum(tokens)


def sent_by_each(shapes, rank, processes, bytes_each):
    return 2 * (processes - 1) / processes * bytes_each * sum(rank * (out + into) for out, into in shapes)


RIGHT = {
    "0.1": (nb00.check_turn, lambda W, delta, strength: W + strength * delta),
    "0.2": (nb00.check_slots_right, slots_right),
    "1.1": (nb01.check_delta_weight, lambda A, B, alpha: alpha / len(A) * B @ A),
    "1.2": (nb01.check_trainable_numbers, lambda shapes, rank: sum(rank * (a + b) for a, b in shapes)),
    "1.4": (nb01.check_fold, lambda W, A, B, alpha: W + alpha / A.shape[0] * B @ A),
    "2.1": (nb02.check_matching, matching),
    "2.2": (nb02.check_rank_for_budget, rank_for_budget),
    "3.1": (nb03.check_energy_kept, lambda sigma, rank: (sigma[:rank]**2).sum() / (sigma**2).sum()),
    "3.2": (nb03.check_truncated, lambda U, S, Vh, rank: (U[:, :rank] * S[:rank]) @ Vh[:rank]),
    "3.3": (nb03.check_effective_rank, effective_rank),
    "4.1": (nb04.check_scaling, scaling),
    "4.2": (nb04.check_rate_for_b,
            lambda lr, factor, optimizer: lr / factor if optimizer == "adam" else lr / factor**2),
    "4.3": (nb04.check_stacked, lambda x, A, B, s: x @ A.transpose(1, 2) @ B * s[:, None, None]),
    "5.1": (nb05.check_adam_bytes, lambda parameters, weight, state: parameters * (2 * weight + 2 * state)),
    "5.3": (nb05.check_lora_count,
            lambda layers, hidden, kv, rank: layers * rank * ((hidden + hidden) + (hidden + kv))),
    "6.1": (nb06.check_fold, fold),
    "6.3": (nb06.check_prefix_cost, prefix_cost),
    "7.1": (nb07.check_customers, customers),
    "7.4": (nb07.check_sum, add),
    "9.1": (nb09.check_mean, mean_of_all),
    "9.2": (nb09.check_sent, sent_by_each),
}


def each(change):
    """The same change of a result, whatever it is made of."""
    def changed(value):
        if isinstance(value, tuple):
            return tuple(changed(part) for part in value)
        return change(value)
    return changed


def arithmetic(change):
    return each(lambda value: [str(part) + "x" for part in value] if isinstance(value, list) else change(value))


def first_only(student):
    """Right on the case that is shown, and the same for all others."""
    kept = []

    def answer(*case):
        kept.append(student(*case))
        return kept[0]
    return answer


def forgets(student):
    def answer(*case):
        student(*case)
    return answer


def raising(student):
    def answer(*case):
        raise RuntimeError("two\nlines")
    return answer


def leaves_torch_changed(student):
    def answer(*case):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(5)
        return {"a dict": student(*case)}
    return answer


def then(change):
    return lambda student: lambda *case: change(student(*case))


WRONG_KINDS = {
    "a forgotten return": forgets, "a raise": raising, "only the first": first_only,
    "twice": then(arithmetic(lambda value: 2 * value)), "minus": then(arithmetic(lambda value: -value)),
    "one more": then(arithmetic(lambda value: value + 1)), "half": then(arithmetic(lambda value: value / 2)),
    "in a dict": then(lambda value: {"result": value}), "as text": then(lambda value: f"<{value}>"),
    "a function": then(lambda value: lambda: value), "with another": then(lambda value: (value, "and", 1)),
    "a generator of letters": then(lambda value: (letter for letter in "abc")),
    "nan": then(arithmetic(lambda value: value * math.nan)), "torch changed": leaves_torch_changed,
    "an empty list": then(lambda value: []), "complex": then(arithmetic(lambda value: value * 1j)),
    "a set": then(lambda value: {1, 2}), "a list of strings": then(lambda value: ["a", "b"]),
}
OWN = {
    "0.1": [lambda W, d, s: W + d, lambda W, d, s: (1 - s) * W + s * d, lambda W, d, s: s * (W + d),
            lambda W, d, s: W + max(0, min(1, s)) * d, lambda W, d, s: W.T + s * d.T, lambda W, d, s: s * d],
    "0.2": [lambda a, b: sum(a.get(s) == v for s, v in b.items()) / len(b),
            lambda a, b: sum(a.get(s) == v for s, v in b.items()) / max(1, len(a)),
            lambda a, b: len(set(a.values()) & set(b.values())) / len(set(a) | set(b)),
            lambda a, b: len(set(a) & set(b)) / len(set(a) | set(b)),
            lambda a, b: sum(a.get(s) == v for s, v in b.items()) / max(len(a), len(b)), lambda a, b: float(a == b)],
    "1.1": [lambda A, B, a: a * B @ A, lambda A, B, a: B @ A / len(A), lambda A, B, a: (a / len(A) * B @ A).T,
            lambda A, B, a: a / torch.linalg.matrix_rank(A).item() * B @ A, lambda A, B, a: a / min(A.shape) * B @ A,
            lambda A, B, a: a // len(A) * B @ A, lambda A, B, a: a / A.shape[1] * B @ A, lambda A, B, a: B @ A],
    "1.2": [lambda s, r: sum(a * b for a, b in s), lambda s, r: sum(a + b for a, b in s),
            lambda s, r: sum(r * a * b for a, b in s), lambda s, r: sum(r * (a + b) for a, b in s[:1]),
            lambda s, r: 2 * r * sum(a for a, b in s), lambda s, r: 2 * r * sum(b for a, b in s)],
    "1.4": [lambda W, A, B, a: W + B @ A, lambda W, A, B, a: a / len(A) * B @ A, lambda W, A, B, a: W + a * B @ A,
            lambda W, A, B, a: W + a / torch.linalg.matrix_rank(A).item() * B @ A,
            lambda W, A, B, a: W + a / min(A.shape) * B @ A, lambda W, A, B, a: W - a / len(A) * B @ A],
    "2.1": [lambda n, e: [x for x in n if any(x.endswith(y) for y in e)], lambda n, e: [x for x in n if x in e],
            lambda n, e: [x for x in n if any(y in x for y in e)],
            lambda n, e: [x for y in e for x in n if x == y or x.endswith("." + y)],
            lambda n, e: [x for x in n if any(x.split(".")[-1] == y for y in e)],
            lambda n, e: sorted(matching(n, e), reverse=True), lambda n, e: set(matching(n, e)),
            lambda n, e: [x for x in n if any(__import__("re").search(rf"(^|\.){y}$", x) for y in e)],
            lambda n, e: [x for x in n if any(f".{y}." in f".{x}." for y in e)]],
    "2.2": [lambda s, b: b // sum(map(sum, s)), lambda s, b: min(map(min, s)),
            lambda s, b: min((b - 1) // sum(map(sum, s)), min(map(min, s))),
            lambda s, b: min(b // sum(map(sum, s)), min(s[0])),
            lambda s, b: min(b // sum(map(sum, s)), min(x[0] for x in s)),
            lambda s, b: min(b // sum(map(sum, s)), min(x[1] for x in s)), lambda s, b: min(rank_for_budget(s, b), 128),
            lambda s, b: min(b / sum(map(sum, s)), min(map(min, s))), lambda s, b: max(1, rank_for_budget(s, b)),
            lambda s, b: b // sum(x * y for x, y in s)],
    "3.1": [lambda s, r: s[:r].sum() / s.sum(), lambda s, r: 1 - (s[:r]**2).sum() / (s**2).sum(),
            lambda s, r: (s[:r]**2).sum(), lambda s, r: ((s[:r]**2).sum() / (s**2).sum())**0.5,
            lambda s, r: (s[:r + 1]**2).sum() / (s**2).sum(), lambda s, r: (s[:r - 1]**2).sum() / (s**2).sum(),
            lambda s, r: 100 * (s[:r]**2).sum() / (s**2).sum(), lambda s, r: (s[-r:]**2).sum() / (s**2).sum()],
    "3.2": [lambda U, S, V, r: (U[:, :r] * S[:r] @ V[:r]).T, lambda U, S, V, r: U * S @ V,
            lambda U, S, V, r: U[:, :r] @ V[:r], lambda U, S, V, r: U[:, -r:] * S[-r:] @ V[-r:],
            lambda U, S, V, r: U[:r] * S[:r] @ V[:, :r], lambda U, S, V, r: U[:, :r] * S[:r].sqrt() @ V[:r],
            lambda U, S, V, r: U[:, :r] * S[:r]**2 @ V[:r]],
    "3.3": [lambda s: -(s * s.log()).sum(), lambda s: (s > 0).sum(), lambda s: 1 / effective_rank(s),
            lambda s: effective_rank(s).log(), lambda s: effective_rank(s.sqrt()),
            lambda s: torch.exp(-((s**2 / (s**2).sum()) * (s**2 / (s**2).sum()).log()).sum())],
    "4.1": [lambda r, a, rule: a / r, lambda r, a, rule: a / r**0.5, lambda r, a, rule: 2.0,
            lambda r, a, rule: 2 * r if rule == "2r" else scaling(r, a, rule),
            lambda r, a, rule: 1 / scaling(r, a, rule),
            lambda r, a, rule: (a / r)**0.5 if rule == "rslora" else scaling(r, a, rule),
            lambda r, a, rule: int(scaling(r, a, rule))],
    "4.2": [lambda lr, f, o: lr, lambda lr, f, o: lr * f, lambda lr, f, o: lr / f, lambda lr, f, o: lr / f**2,
            lambda lr, f, o: lr / f**0.5, lambda lr, f, o: lr * f**2, lambda lr, f, o: 1 / f],
    "4.3": [lambda x, A, B, s: x @ A.transpose(1, 2) @ B, lambda x, A, B, s: x @ A.transpose(1, 2) @ B * s[0],
            lambda x, A, B, s: (x @ A.transpose(1, 2) @ B * s[:, None, None]).sum(0),
            lambda x, A, B, s: x @ A[0].T @ B[0] * s[:, None, None],
            lambda x, A, B, s: x @ A.transpose(1, 2) @ B / s[:, None, None],
            lambda x, A, B, s: (x @ A.transpose(1, 2) @ B * s[:, None, None]).transpose(1, 2)],
    "5.1": [lambda p, w, s: p * (w + 2 * s), lambda p, w, s: p * (2 * w + s), lambda p, w, s: p * 4 * w,
            lambda p, w, s: p * 4 * s, lambda p, w, s: 2 * w + 2 * s, lambda p, w, s: p * (w + s),
            lambda p, w, s: p * (2 * w + 2 * s) / 1e9],
    "5.3": [lambda n, h, k, r: n * r * 4 * h, lambda n, h, k, r: r * (3 * h + k), lambda n, h, k, r: n * (3 * h + k),
            lambda n, h, k, r: n * (h * h + h * k), lambda n, h, k, r: n * r * (h * h + h * k),
            lambda n, h, k, r: n * r * (2 * h + 2 * k), lambda n, h, k, r: 4 * n * r * (3 * h + k)],
    "6.1": [lambda W, A, B, a: W + B @ A, lambda W, A, B, a: (W.float() + a * (B @ A)).to(W.dtype),
            lambda W, A, B, a: W.float() + a / len(A) * (B @ A), lambda W, A, B, a: (a / len(A) * (B @ A)).to(W.dtype),
            lambda W, A, B, a: W + (a / len(A) * (B @ A)).to(W.dtype),
            lambda W, A, B, a: (W.float() - a / len(A) * (B @ A)).to(W.dtype),
            lambda W, A, B, a: [fold(W, A, B, a)], lambda W, A, B, a: fold(W, A, B, a).tolist()],
    "6.3": [lambda c, t: prefix_cost(c, t)[::-1], lambda c, t: prefix_cost(c, t)[0],
            lambda c, t: (prefix_cost(c, t)[0] // 2, prefix_cost(c, t)[1]),
            lambda c, t: (2 * c.num_hidden_layers * c.hidden_size * t, c.max_position_embeddings - t),
            lambda c, t: (prefix_cost(c, t)[0], c.max_position_embeddings),
            lambda c, t: (prefix_cost(c, t)[0], c.max_position_embeddings - c.num_hidden_layers * t)],
    "7.1": [lambda room, b, s, r, n: room // (n * sum(r * (o + i) for o, i in s)),
            lambda room, b, s, r, n: (room - b) // sum(r * (o + i) for o, i in s),
            lambda room, b, s, r, n: (room - b) / (n * sum(r * (o + i) for o, i in s)),
            lambda room, b, s, r, n: -(-(room - b) // (n * sum(r * (o + i) for o, i in s))),
            lambda room, b, s, r, n: (room - b) // (n * sum(r * o * i for o, i in s)),
            lambda room, b, s, r, n: (room - b) // (n * sum(o * i for o, i in s)),
            lambda room, b, s, r, n: (room - b) // (n * r * sum(s[0])),
            lambda room, b, s, r, n: max(1, customers(room, b, s, r, n))],
    "7.4": [lambda A1, B1, s1, A2, B2, s2: (torch.cat([A1, A2]), torch.cat([B1, B2], 1)),
            lambda A1, B1, s1, A2, B2, s2: (torch.cat([s1 * A1, s2 * A2]), torch.cat([s1 * B1, s2 * B2], 1)),
            lambda A1, B1, s1, A2, B2, s2: (torch.cat([A1, A2]), torch.cat([s2 * B1, s1 * B2], 1)),
            lambda A1, B1, s1, A2, B2, s2: (torch.cat([A1, A2]), torch.cat([s2 * B2, s1 * B1], 1)),
            lambda A1, B1, s1, A2, B2, s2: (torch.cat([s1 * B1, s2 * B2], 1), torch.cat([A1, A2])),
            lambda A1, B1, s1, A2, B2, s2: (A1 + A2, s1 * B1 + s2 * B2),
            lambda A1, B1, s1, A2, B2, s2: (A1, s1 * B1),
            lambda A1, B1, s1, A2, B2, s2: s1 * B1 @ A1 + s2 * B2 @ A2,
            lambda A1, B1, s1, A2, B2, s2: (torch.eye(5), s1 * B1 @ A1 + s2 * B2 @ A2)],
    "9.1": [lambda means, tokens: sum(means) / len(means),
            lambda means, tokens: sum(m * n for m, n in zip(means, tokens)) / sum(tokens),       # nan in case 3
            lambda means, tokens: sum(m * n for m, n in zip(means, tokens) if n),
            lambda means, tokens: sum(m * n for m, n in zip(means, tokens) if n) / len(means),
            lambda means, tokens: max(means)],
    "9.2": [lambda shapes, r, n, b: b * sum(r * (o + i) for o, i in shapes),
            lambda shapes, r, n, b: (n - 1) / n * b * sum(r * (o + i) for o, i in shapes),
            lambda shapes, r, n, b: 2 * b * sum(r * (o + i) for o, i in shapes),
            lambda shapes, r, n, b: 2 * (n - 1) * b * sum(r * (o + i) for o, i in shapes),
            lambda shapes, r, n, b: 2 * (n - 1) / n * b * sum(o * i for o, i in shapes),
            lambda shapes, r, n, b: 2 * (n - 1) / n * sum(r * (o + i) for o, i in shapes)],
}
ALIKE = {("2.1", "one more"), ("2.1", "half"), ("2.1", "minus"), ("2.1", "nan"), ("2.1", "complex"),
         ("7.4", "minus")}      # one change
WRONG = {f"{number}, {kind}": (number, change(RIGHT[number][1])) for number in RIGHT
         for kind, change in WRONG_KINDS.items() if (number, kind) not in ALIKE}
WRONG |= {f"{number}, own {i}": (number, student) for number, some in OWN.items() for i, student in enumerate(some)}


@pytest.mark.parametrize("number, student", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_told_in_one_line_and_leaves_torch_as_it_was(number, student, capsys):
    verdict = RIGHT[number][0](student)
    assert verdict.passed is False, "it was let through, or taken for a stub"
    out = capsys.readouterr().out
    assert out.startswith(f"Exercise {number} ✗ case ") and out.count("\n") == 1 and len(out) > 45, out
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def as_numpy(value):
    return value.numpy() if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16 else value


def as_float(value):
    return float(value) if isinstance(value, int) else value.double() if isinstance(value, torch.Tensor) else value


def as_scalar(value):
    kinds = {int: np.int64, float: np.float64, str: np.str_}
    return kinds.get(type(value), lambda same: same)(value)


def as_fraction(value):
    return Fraction(value) if isinstance(value, (int, float)) else value


def as_strings(value):
    return [np.str_(part) for part in value] if isinstance(value, list) else value


DRESSES = {"as it is": each(lambda value: value), "numpy": each(as_numpy), "numpy's numbers": each(as_scalar),
           "fractions": each(as_fraction), "numpy's strings": each(as_strings),
           "a tensor of the pair": lambda value: torch.tensor(value)
           if isinstance(value, tuple) and not isinstance(value[0], torch.Tensor) else value}


@pytest.mark.parametrize("dress", DRESSES.values(), ids=DRESSES)
@pytest.mark.parametrize("number", RIGHT)
def test_a_right_answer_is_right_in_every_dress(number, dress, capsys):
    checker, student = RIGHT[number]
    assert checker(lambda *case: dress(student(*case))), capsys.readouterr().out


@pytest.mark.parametrize("number", [number for number in RIGHT if number != "6.1"])       # which asks for a dtype
def test_whole_numbers_may_come_as_floats_and_floats_in_double(number, capsys):
    checker, student = RIGHT[number]
    assert checker(lambda *case: each(as_float)(student(*case))), capsys.readouterr().out


def test_every_exercise_has_its_dozen():
    for number in RIGHT:
        assert sum(which == number for which, _ in WRONG.values()) >= 12 and len(DRESSES) >= 4
    assert OWN.keys() == RIGHT.keys()


STUBS = [lambda *case: None, lambda *case: ..., None, ...]


@pytest.mark.parametrize("stub", STUBS, ids=range(len(STUBS)))
@pytest.mark.parametrize("number", RIGHT)
def test_a_stub_is_not_attempted(number, stub, capsys):
    assert RIGHT[number][0](stub).passed is None
    assert capsys.readouterr().out == f"Exercise {number}: not attempted yet.\n"


CHOICES = {"0.4": (nb00.check_dial, [0.5, "0.5", np.float64(0.5), Fraction(1, 2)]),
           "1.5": (nb01.check_rank, [8, 8.0, "8", np.int64(8)]),
           "3.5": (nb03.check_rank, [32, 32.0, "32", np.int64(32)]),
           "5.2": (nb05.check_wrong_row, ["70B with LoRA", "70b  with lora", "'70B with LoRA'", " 70B with LoRA"])}
ODD = [["R"], {"a": 1}, object(), 3.7, (1, 2), torch.ones(2), lambda: 1, "everything", b"R", [[1], [2, 3]], True, -1]


@pytest.mark.parametrize("number", CHOICES)
def test_a_choice_may_be_written_in_several_ways_and_nothing_raises(number, capsys):
    checker, right = CHOICES[number]
    for answer in right:
        assert checker(answer), (answer, capsys.readouterr().out)
    for answer in ODD:
        assert checker(answer).passed is False, answer
        assert len(capsys.readouterr().out.splitlines()[-1]) > 25


MATCHES = {"3.4": (nb03.check_mystery, {"P": "documentation", "Q": nb03.SENTENCES, "R": "random targets",
                                        "S": nb03.SENTENCES}),
           "0.3": (nb00.check_texts, {"A": "0.4", "B": "0", "C": "1"}),
           "1.3": (nb01.check_mystery, {"P": "both factors random", "Q": "both factors zero", "R": "healthy",
                                        "S": "learning rate too high"}),
           "2.3": (nb02.check_causes, {"P": "rate too high", "Q": "factors not given to the optimizer",
                                       "R": "rate about right", "S": "rate too low"}),
           "4.4": (nb04.check_curves, {"A": "rank too small", "B": "rate too high", "C": "both factors zero",
                                       "D": "rate too low"}),
           "7.2": (nb07.check_files, {"A": "right", "B": "wrong prefix", "C": "wrong layers", "D": "never trained"}),
           "9.3": (nb09.check_runs, {"A": "same rows", "B": "healthy", "C": "mean of means", "D": "not sent"}),
           "6.2": (nb06.check_merges, {"A": "transposed", "B": "right", "C": "merged twice", "D": "scaling forgotten"})}


@pytest.mark.parametrize("number", MATCHES)
def test_a_match_may_be_written_in_several_ways_and_nothing_raises(number, capsys):
    checker, right = MATCHES[number]
    for change in (str.upper, lambda text: f" {text} ", lambda text: f"'{text}'", str.lower):
        assert checker({key: change(text) for key, text in right.items()}), capsys.readouterr().out
    assert checker({key.lower(): text for key, text in right.items()})
    keys = list(right)
    wrong = [right | {key: other} for key in keys for other in set(right.values()) - {right[key]}]
    wrong += [right | {keys[0]: odd} for odd in ([1], {"a": 1}, "magic", 17, object())]
    wrong += ["text", [1, 2], 3, list(right)]
    assert len(wrong) >= 12
    for answer in wrong:
        assert checker(answer).passed is False, answer
    assert checker(dict.fromkeys(right)).passed is checker({}).passed is checker(None).passed is None
