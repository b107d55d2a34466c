"""Trained nulls: full fine-tuning with the same steps and rate on data from which the task cannot be learned.

A Gaussian matrix is too easy to beat: any training leaves structure in ΔW, whatever it learned. So train on nothing, three ways, and
compare with that: random tokens as targets, records paired with the sentence of another record, or more of what the model
knows already. What the real ΔW shares with these is not a sign of learning.
"""
import functools
from collections.abc import Iterator

import torch
from torch import nn

from lora_edu.lora.apply import unfreeze_matrices
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training import bistro, corpora
from lora_edu.training.corpora import Batch
from lora_edu.training.loop import fit, sixteen_bits

TASKS, NULLS = ("bistro", "python_docs"), ("random_targets", "mismatched", "more_of_the_same")
BATCH, DOCS, TALES = 16, 128, 64      # rows a step; tokens a row. 64 tokens of a tale count about as much as a restaurant's sentence


def full_fine_tune(task: str = "bistro", steps: int = 200, lr: float = 2e-3, *, seed: int = 0, null: str | None = None,
                   trains: str = "matrices") -> nn.Module:
    """fable, fully fine-tuned on a task or on its null; on the best device here, given back on the CPU.

    Args:
        task: "bistro" or "python_docs".
        lr: the highest learning rate; fable's best ones are in the record lora_beside_full.
        null: None for the task itself, or "random_targets", "mismatched", "more_of_the_same".
        trains: "matrices" (exactly those that LoRA adapts) or "everything" (embedding and norms as well).
    """
    if trains not in ("matrices", "everything"):
        raise ValueError(f"trains={trains!r}: choose 'matrices' (those that LoRA adapts) or 'everything'.")
    model, tokenizer = load_pretrained()
    batches = training_batches(tokenizer, task, steps, seed, null)
    device = best_device()
    model.to(device).requires_grad_(True)
    if trains == "matrices":
        unfreeze_matrices(model)
    fit(model, batches, steps, lr, autocast=sixteen_bits(device))
    return model.cpu().requires_grad_(False)


def training_batches(tokenizer, task: str, steps: int, seed: int = 0, null: str | None = None,
                     rows: int = BATCH) -> Iterator[Batch]:
    """`steps` batches of `rows` rows of a task (what every record trains on), or of its null made from the same records in the same order.

    Raises:
        ValueError: an unknown task or null, or sentences of a task that has none to exchange.
    """
    if task not in TASKS or null not in (None, *NULLS):
        raise ValueError(f"task={task!r}, null={null!r}: choose a task of {', '.join(TASKS)} and a null of None, {', '.join(NULLS)}.")
    if null == "mismatched" and task != "bistro":
        raise ValueError(f"null='mismatched' exchanges the sentences of records, and {task} has no records: choose task='bistro'.")
    if null == "more_of_the_same":
        return corpora.packed_batches(tales(steps), TALES, rows, seed, steps)
    if task == "python_docs":
        batches = corpora.packed_batches(corpora.tokenize(tokenizer, corpora.python_docs("train")), DOCS, rows, seed, steps)
    elif null == "mismatched":
        batches = mismatched(tokenizer, steps, seed, rows)
    else:
        batches = bistro.batches(tokenizer, steps, rows, seed)
    return random_targets(batches, tokenizer.get_vocab_size(), seed) if null == "random_targets" else batches


def random_targets(batches: Iterator[Batch], vocab_size: int, seed: int = 0) -> Iterator[Batch]:
    """The same inputs; each target that counts becomes a token drawn at random, anew at every step."""
    generator = torch.Generator().manual_seed(seed)
    for inputs, targets in batches:
        drawn = torch.randint(vocab_size, targets.shape, generator=generator)
        yield inputs, torch.where(targets == -100, targets, drawn)


def mismatched(tokenizer, steps: int, seed: int = 0, rows: int = BATCH) -> Iterator[Batch]:
    """The same records and the same sentences as `bistro.batches`, but each record has the sentence of the next one in its batch."""
    source = bistro.stream("train", seed)
    for _ in range(steps):
        pairs = [(record, bistro.sentence(record, rng)) for record, rng in (next(source) for _ in range(rows))]
        shifted = pairs[1:] + pairs[:1]
        yield bistro.collate(tokenizer, [(record, text) for (record, _), (_, text) in zip(pairs, shifted)])


@functools.lru_cache(maxsize=2)
def tales(steps: int) -> torch.Tensor:
    """Tokens for `steps` steps of tales that the untouched fable tells: their gradient is noise around zero."""
    model, tokenizer = load_pretrained()
    told = corpora.tales_from(model, tokenizer, n=steps * BATCH // 2, seed=1000, length=2 * TALES)
    return torch.cat([torch.cat([inputs, targets[:, -1:]], 1).flatten() for inputs, targets in told])
