"""Texts and the way they become batches: read, split so that nothing overlaps, tokenize, cut into windows.

A text is a str whose documents are separated by a line `<|endoftext|>`; tokens are a LongTensor (N,). Read
`packed_batches` (training) beside `windows` (measuring). Python's own documentation is there without a download.
"""
import copy
import gzip
import re
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch

from lora_edu.models.bridge import END, encode, end_token
from lora_edu.models.sampling import generate
from lora_edu.training.loop import Batch, mode

PIECE = 20_000          # characters encoded at once
SHOW_PROGRESS = 5e6     # characters from which a progress bar is worth its line


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, plain or `.gz`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a .txt or .gz file with UTF-8 text.")
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return file.read()


def python_docs(split: str = "train") -> str:
    """The language reference that every CPython carries (`pydoc_data.topics`), one document a topic; about 370 kB in
    all.

    Topics go to "train", "valid" or "test" by a checksum of their name. Long topics repeat short ones word for word, so
    a paragraph is kept only in the shortest topic that has it: no paragraph is in two splits. The text differs between
    versions of Python.

    Raises RuntimeError where Python was installed without it.
    """
    if split not in ("train", "valid", "test"):
        raise ValueError(f"split={split!r}: choose one of train, valid, test.")
    try:
        from pydoc_data.topics import topics  # here, because it is half a megabyte that few imports need
    except ModuleNotFoundError:
        raise RuntimeError("this Python comes without pydoc_data, the language reference that is read here: install "
                           "the whole of it (on Debian libpython3-stdlib), or take another Python.") from None
    seen, documents = set(), []
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        paragraphs = [p for p in re.split(r"\n\s*\n", clean(topics[topic])) if p.strip() not in seen]
        seen.update(p.strip() for p in paragraphs)
        part = {0: "test", 1: "valid"}.get(zlib.crc32(topic.encode()) % 10, "train")
        if part == split and paragraphs:
            documents.append("\n\n".join(paragraphs).strip("\n") + "\n")
    return f"{END}\n".join(documents)


def clean(text: str) -> str:
    """Without trailing spaces and the rows of stars or dashes under headings."""
    return re.sub(r"\n[*=\-~^\"]{4,}(?=\n)", "", re.sub(r"[ \t]+\n", "\n", text))


def pieces(document: str) -> Iterator[str]:
    """Cut before line breaks, where the usual byte-level pattern cuts too: the tokens are those of the whole
    document.
    """
    start = 0
    for cut in re.finditer(r"\n(?=\S)", document):
        if cut.start() - start >= PIECE:
            yield document[start:cut.start()]
            start = cut.start()
    yield document[start:]


def tokenize(tokenizer, text: str) -> torch.Tensor:
    """Text -> LongTensor (N,).

    A line `<|endoftext|>` becomes the one end-of-text token; big texts show a progress bar.
    """
    from tqdm.auto import tqdm
    end, todo = end_token(tokenizer), []
    for i, document in enumerate(re.split(rf"^{re.escape(END)}(?:\n|\Z)", text, flags=re.MULTILINE)):
        todo += ([None] if i else []) + list(pieces(document))
    done = []
    with tqdm(total=len(text), unit="char", unit_scale=True, desc="tokenize", disable=len(text) < SHOW_PROGRESS) as bar:
        for i in range(0, len(todo), 64):
            chunk = todo[i:i + 64]
            ids = [token for piece in chunk for token in ([end] if piece is None else encode(tokenizer, piece))]
            done.append(torch.tensor(ids, dtype=torch.long))
            bar.update(sum(len(piece) for piece in chunk if piece is not None))
    return torch.cat(done)


def _require(tokens: torch.Tensor, length: int) -> None:
    if tokens.ndim != 1 or length < 1 or len(tokens) < length + 1:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} hold no window of {length}: give one row of at least "
                         f"{max(length, 1) + 1} tokens, or choose a shorter window.")


def packed_batches(tokens: torch.Tensor, length: int, batch_size: int, seed: int,
                   steps: int | None = None) -> Iterator[Batch]:
    """`steps` batches (or no end of them) of windows packed side by side, each (batch_size, length).

    One pass takes every window once in a shuffled order; each pass starts at another offset, so window borders move.
    The same seed gives the same batches, on every device.
    """
    _require(tokens, length)
    generator = torch.Generator().manual_seed(seed)
    starts, made = torch.empty(0, dtype=torch.long), 0
    while steps is None or made < steps:
        while len(starts) < batch_size:
            offset = torch.randint(min(length, len(tokens) - length), (1,), generator=generator)
            count = (len(tokens) - 1 - int(offset)) // length
            starts = torch.cat([starts, offset + length * torch.randperm(count, generator=generator)])
        index = starts[:batch_size, None] + torch.arange(length)
        starts = starts[batch_size:]
        yield tokens[index].long(), tokens[index + 1].long()
        made += 1


def windows(tokens: torch.Tensor, length: int, batch_size: int = 16) -> list[Batch]:
    """The windows to measure a loss on, in order: every token but the first is a target exactly once.

    The last window is filled up, with -100 as its targets.
    """
    _require(tokens, length)
    rows = -(-(len(tokens) - 1) // length)
    missing = rows * length - (len(tokens) - 1)
    inputs = torch.cat([tokens[:-1], tokens.new_zeros(missing)]).view(rows, length).long()
    targets = torch.cat([tokens[1:], tokens.new_full((missing,), -100)]).view(rows, length).long()
    return list(zip(inputs.split(batch_size), targets.split(batch_size)))


def _generate(model, ids: torch.Tensor, max_new_tokens: int, **how) -> torch.Tensor:
    """A model without a config is a stranger that says for itself how it writes."""
    return generate(model, ids, max_new_tokens, **how) if hasattr(model, "config") else model.generate(
        ids, max_new_tokens, **how)


def completions(model, tokenizer, prompts: list[str], batch_size: int = 64, max_new_tokens: int = 80) -> list[str]:
    """What the model writes after each prompt, up to its end-of-text token, the likeliest token at every step.

    Prompts of one length go through together, so none is padded. `model` is a `Llama`, or a causal language model of
    transformers with its tokenizer; or any nn.Module with `generate(ids, max_new_tokens, temperature=, stop_token=)`
    that returns prompt and new tokens, (B, T + new).
    """
    end, device = end_token(tokenizer), next(model.parameters()).device
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    texts = [""] * len(prompts)
    with mode(model, training=False):
        by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        for length, same in groupby(by_length, key=lambda i: len(encoded[i])):
            same = list(same)
            for rows in (same[i:i + batch_size] for i in range(0, len(same), batch_size)):
                ids = torch.tensor([encoded[i] for i in rows], device=device)
                out = _generate(model, ids, max_new_tokens, temperature=0.0, stop_token=end)[:, length:].tolist()
                for i, new in zip(rows, out):
                    texts[i] = tokenizer.decode(new[:new.index(end)] if end in new else new).strip()
    return texts


def tales_from(model, tokenizer, n: int = 32, seed: int = 0, length: int = 256, batch_size: int = 16) -> list[Batch]:
    """An offline yardstick of forgetting: `n` windows of tales that the untouched base itself tells, at temperature 1.

    The base's loss on them estimates its own entropy, in nats per token; a changed model's loss exceeds it by how far
    it has moved from the base on the base's own tales (a Kullback-Leibler divergence). It is not the loss on tales that
    people wrote: that is higher, and this one cannot tell what the base never knew. Sampled on a CPU copy, so the
    device does not matter.
    """
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("tales_from samples the untouched base, "
                         "and this model carries an adapter: call it before apply_lora.")
    base = copy.deepcopy(model).cpu().eval()
    start = torch.full((n, 1), end_token(tokenizer))
    tokens = _generate(base, start, length, temperature=1.0, seed=seed)          # (n, 1 + length)
    return list(zip(tokens[:, :-1].split(batch_size), tokens[:, 1:].split(batch_size)))
