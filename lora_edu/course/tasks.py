"""What a model is tuned on: the two tasks, how each is scored, and the nulls, from which neither can be learned.

"bistro" turns a restaurant's card into a sentence, a narrow task; "python_docs" is the language reference, a broad
change of style.

A Gaussian matrix is too easy to beat: any training leaves structure in ΔW, whatever it learned. So a null trains on
nothing with the
same steps and rate, three ways: random tokens as targets, cards paired with the sentence of another card, or more of
what the model knows already. What the real ΔW shares with these is not a sign of learning.
"""
import functools
import math
from collections.abc import Iterator

import torch
from torch import nn

from lora_edu.lora.inject import unfreeze_matrices
from lora_edu.models.bridge import vocabulary
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.training import bistro, corpora
from lora_edu.training.corpora import Batch
from lora_edu.training.loop import fit, sixteen_bits

TASKS = {"bistro": "restaurants", "python_docs": "documentation"}      # how the pages call them
NULLS = ("random_targets", "mismatched", "more_of_the_same")
# rows a step; tokens a row. 64 tokens of a tale count about as much as a restaurant's sentence
BATCH, DOCS, TALES = 16, 128, 64


class Task:
    """One of `TASKS`: batches to train on, by seed, and held-out ones to choose by (`valid`) and to report (`test`).

    Args:
        n: cards of the test split, twice as many as of the validation split; of the documentation as many windows of
            128 tokens.
        batch_size: rows of a held-out batch (bistro by default 50, documentation 16).

    Attributes:
        words: how the pages call it. prompt: what a sample of it begins with.
        cards: bistro's test cards, to be scored by slots; empty for a task without slots.
    """

    def __init__(self, name: str, tokenizer, n: int = 400, batch_size: int | None = None):
        if name not in TASKS:
            raise ValueError(f"task={name!r}: choose one of {', '.join(TASKS)}.")
        self.name, self.words, self.tokenizer, self.cards = name, TASKS[name], tokenizer, []
        if name == "bistro":
            self.valid, self.test = (bistro.heldout(tokenizer, count, batch_size=batch_size or 50, split=split)
                                     for count, split in ((n // 2, "valid"), (n, "test")))
            self.cards, self.prompt = bistro.cards("test", n), bistro.prompt(bistro.cards("valid", 1)[0])
        else:
            rows = batch_size or 16
            tokens = (corpora.tokenize(tokenizer, corpora.python_docs(split)) for split in ("valid", "test"))
            self.valid, self.test = (corpora.windows(each, DOCS, rows)[:n // (2 * rows)] for each in tokens)
            self.prompt = "The for statement is used"

    def batches(self, steps: int, seed: int, null: str | None = None, rows: int = BATCH) -> Iterator[Batch]:
        """See `training_batches`."""
        return training_batches(self.tokenizer, self.name, steps, seed, null, rows)

    def floor(self) -> float:
        """The loss on the test cards of a model that knows bistro's grammar and each of its choices' odds, nats per
        token: no model is below it but by chance.
        """
        pairs = bistro.examples("test", len(self.cards))
        choices = sum(math.log(len(bistro.TEMPLATES)) + sum(math.log(len(bistro.PHRASES[slot][value]))
                                                            for slot, value in card.items() if slot != "name")
                      for card, _ in pairs)
        return choices / sum((targets != -100).sum().item() for _, targets in self.test)

    def slots(self, model: nn.Module, cards: int | None = None) -> bistro.SlotScore:
        """What the model writes of the test cards, or of the first so many, judged slot by slot."""
        some = self.cards[:cards]
        return bistro.slot_accuracy(bistro.write(model, self.tokenizer, some), some)


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
    """`steps` batches of `rows` rows of a task (what every record trains on), or of its null made from the same cards
    in the same order.

    Raises:
        ValueError: an unknown task or null, or sentences of a task that has none to exchange.
    """
    if task not in TASKS or null not in (None, *NULLS):
        raise ValueError(f"task={task!r}, null={null!r}: choose a task of {', '.join(TASKS)} and a null of None, "
                         f"{', '.join(NULLS)}.")
    if null == "mismatched" and task != "bistro":
        raise ValueError("null='mismatched' exchanges the sentences of cards, "
                         f"and {task} has no cards: choose task='bistro'.")
    if null == "more_of_the_same":
        return corpora.packed_batches(tales(steps), TALES, rows, seed, steps)
    if task == "python_docs":
        batches = corpora.packed_batches(corpora.tokenize(tokenizer, corpora.python_docs("train")), DOCS, rows, seed,
                                         steps)
    elif null == "mismatched":
        batches = mismatched(tokenizer, steps, seed, rows)
    else:
        batches = bistro.batches(tokenizer, steps, rows, seed)
    return random_targets(batches, vocabulary(tokenizer), seed) if null == "random_targets" else batches


def random_targets(batches: Iterator[Batch], vocab_size: int, seed: int = 0) -> Iterator[Batch]:
    """The same inputs; each target that counts becomes a token drawn at random, anew at every step."""
    generator = torch.Generator().manual_seed(seed)
    for inputs, targets in batches:
        drawn = torch.randint(vocab_size, targets.shape, generator=generator)
        yield inputs, torch.where(targets == -100, targets, drawn)


def mismatched(tokenizer, steps: int, seed: int = 0, rows: int = BATCH) -> Iterator[Batch]:
    """The same cards and the same sentences as `bistro.batches`, but each card has the sentence of the next one in
    its batch.
    """
    source = bistro.stream("train", seed)
    for _ in range(steps):
        pairs = [(card, bistro.sentence(card, rng)) for card, rng in (next(source) for _ in range(rows))]
        shifted = pairs[1:] + pairs[:1]
        yield bistro.collate(tokenizer, [(card, text) for (card, _), (_, text) in zip(pairs, shifted)])


@functools.lru_cache(maxsize=2)
def tales(steps: int) -> torch.Tensor:
    """Tokens for `steps` steps of tales that the untouched fable tells: their gradient is noise around zero."""
    model, tokenizer = load_pretrained()
    told = corpora.tales_from(model, tokenizer, n=steps * BATCH // 2, seed=1000, length=2 * TALES)
    return torch.cat([torch.cat([inputs, targets[:, -1:]], 1).flatten() for inputs, targets in told])
