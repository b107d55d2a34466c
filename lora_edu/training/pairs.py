"""Questions and answers as batches: the model's own template around the question, the loss on the answer alone.

A pair is (question, answer), two texts. A question "" stands for plain text, where every token counts.
"""
from collections.abc import Sequence

import torch

from lora_edu.models.bridge import ask, encode, end_token
from lora_edu.training.loop import Batch

Pair = tuple[str, str]


def row(tokenizer, pair: Pair, longest: int | None = None) -> tuple[list[int], int, bool]:
    """A pair's tokens, how many of them come before the answer, and whether the end was cut off to fit `longest`.

    An answer ends with the end token, so that the model learns to stop; one that was cut has none to learn.
    """
    question, answer = pair
    end = end_token(tokenizer)
    if not question:
        before, after = [end], encode(tokenizer, answer)
    else:
        asked = ask(tokenizer, question)
        # after an arrow a word follows a space; a template ends in a line of its own
        before, after = encode(tokenizer, asked), encode(tokenizer, answer if asked.endswith("\n") else " " + answer)
    ids = before + after + [end]
    cut = longest is not None and len(ids) > longest
    return ids[:longest] if cut else ids, len(before), cut


def pad(rows: Sequence[tuple[list[int], int]], filler: int) -> Batch:
    """Rows of tokens, each with how many of them are the question, as one batch (inputs, targets), each (B, T), padded
    on the right. Question and padding are -100 among the targets.
    """
    width = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.tensor([ids[:-1] + [filler] * (width - len(ids) + 1) for ids, _ in rows])
    targets = [[-100] * (before - 1) + ids[before:] for ids, before in rows]
    return inputs, torch.tensor([wanted + [-100] * (width - len(wanted)) for wanted in targets])


def collate(tokenizer, pairs: Sequence[Pair], longest: int | None = None) -> Batch:
    """Pairs as one batch (see `pad`); what is longer than `longest` tokens is cut at its end.

    >>> from lora_edu import load_pretrained
    >>> inputs, targets = collate(load_pretrained()[1], [("name: Clover", "Clover is cheap."), ("", "Once upon")])
    >>> inputs.shape == targets.shape, int((targets[1] != -100).sum())
    (True, 4)
    """
    rows = [row(tokenizer, pair, longest)[:2] for pair in pairs]
    return pad(rows, end_token(tokenizer))
