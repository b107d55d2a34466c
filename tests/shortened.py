"""A notebook in little time: trainings of one step, texts of two tokens. For the tests of what cells do to one another
and to a device or a page; what they find is compared elsewhere, at full length.

    from tests.shortened import shorten_everything
    shorten_everything()                # in a process of its own: it changes the library until the process ends
"""
import contextlib
import functools
import inspect
import itertools
import sys
from pathlib import Path

import lora_edu
import lora_edu.course
from lora_edu.course.page.claims import ClaimError
from lora_edu.measure import timing
from lora_edu.models import sampling
from lora_edu.training import bistro, corpora, loop, stacked

ROOT = Path(__file__).resolve().parents[1]
CELL = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.shortened import shorten_everything
shorten_everything()"""                     # to stand behind a notebook's first cell, its set-up


def at_most(whole, **limits):
    """`whole` with arguments cut down to a number, or by a function."""
    signature = inspect.signature(whole)

    @functools.wraps(whole)
    def cut(*args, **how):
        given = signature.bind(*args, **how)
        given.apply_defaults()
        for name, limit in limits.items():
            value = given.arguments[name]
            given.arguments[name] = limit(value) if callable(limit) else min(value or limit, limit)
        return whole(*given.args, **given.kwargs)
    return cut


def soft(claim):
    """A claim whose verdict does not matter: three steps teach nothing."""
    def said(*args, **how):
        with contextlib.suppress(ClaimError):
            claim(*args, **how)
    return said


def small(batches):
    """The first two rows of the first batch."""
    return [tuple(each[:2] for each in batch) for batch in itertools.islice(batches, 1)]


def first_eight(write):
    """Two tokens for each of eight cards, and the same again for the rest."""
    def written(model, tokenizer, cards, *args, **how):
        texts = write(model, tokenizer, cards[:8], max_new_tokens=2)
        return [texts[i % 8] for i in range(len(cards))]
    return written


def shorten_everything() -> None:
    """Trainings of one step (or of the few that a notebook writes out), texts of two tokens, times of eight."""
    few = lambda steps: steps if steps <= 8 else 1                                          # noqa: E731
    changed = {loop.train: at_most(loop.train, steps=few), stacked.train_stack: at_most(stacked.train_stack, steps=few),
               loop.evaluate: at_most(loop.evaluate, batches=small),
               bistro.write: first_eight(bistro.write),
               corpora.tales_from: at_most(corpora.tales_from, n=40, model=lambda _: lora_edu.load_pretrained()[0]),
               timing.interleaved: at_most(timing.interleaved, rounds=5, warmup=0),
               timing.prefill: at_most(timing.prefill, ids=lambda ids: ids[:1, :8]),
               timing.decode: at_most(timing.decode, ids=lambda ids: ids[:1, :8], tokens=2),
               lora_edu.course.claim: soft(lora_edu.course.claim)}
    lora_edu.Llama.generate = at_most(sampling.generate, max_new_tokens=2)
    for module in [module for name, module in sys.modules.items() if name.startswith("lora_edu")]:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in changed:
                setattr(module, name, changed[value])
