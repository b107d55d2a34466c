"""Prefix tuning and prompt tuning: a longer past. P virtual positions stand before every text and are gone from the
context.

For the course's `Llama`. Read `Prefix.give` and `Prompt.lengthen`: one puts keys and values into the cache, the other
embeddings in front of the text.

Sources: Li and Liang (2021), arXiv:2101.00190; Lester et al. (2021), arXiv:2104.08691.
"""
import torch
from torch import nn

from lora_edu.models.llama import KVCache, Llama
from lora_edu.rivals.rival import Rival, refuse_adapted, trainable


class Virtual(Rival):
    """P positions in front of every text, so the text's own begin at P."""

    length: int              # P

    def arguments(self, model: Llama, args: tuple, kwargs: dict) -> tuple[dict, int]:
        """What the model was called with, by name, and how many tokens of the text it has read before; a text that
        fits, or ValueError.
        """
        given = dict(zip(("ids", "cache"), args)) | kwargs
        if given.get("ids") is None:
            raise ValueError(f"a {type(self).__name__.lower()} stands before token ids, "
                             "and none were given: call model(ids).")
        past = max(given["cache"].length - self.length, 0) if given.get("cache") is not None else 0
        tokens, limit = past + given["ids"].shape[1], model.config.max_position_embeddings
        if self.length + tokens > limit:
            raise ValueError(f"{tokens} tokens do not fit: of a context of {limit} the {type(self).__name__.lower()} "
                             f"leaves {limit - self.length}. Shorten the text.")
        return given, past


class Prefix(Virtual):
    """Trainable keys and values for P positions, which every text finds in its cache: 2 · layers · P · H_kv · D
    numbers.

    Shapes: keys and values (layers, H_kv, P, D). Keys are stored as the cache holds them, turned to their positions
    already.
    """

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.cat([pair[i] for pair in pairs]).detach()) for i in (0, 1))
        self.length = self.keys.shape[2]

    def give(self, model: Llama, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the model reads: a cache that is empty gets the prefix as its past."""
        given, past = self.arguments(model, args, kwargs)
        if not past:
            given["cache"] = given.get("cache") or model.new_cache()
            given["cache"].pairs = [tuple(each.expand(len(given["ids"]), -1, -1, -1) for each in pair)
                                    for pair in zip(self.keys, self.values)]
        return (), given


def apply_prefix(model: Llama, ids: torch.Tensor) -> int:
    """Prefix tuning: freeze the model and give it trainable keys and values in front of every text, in each layer.

    Args:
        ids: (1, P) tokens. The prefix starts as their own keys and values (Li and Liang, section 7.4: better than a
            random start), so the model begins as one that has just read them.

    Returns:
        What trains: 2 · layers · P · H_kv · D numbers; there is no MLP that makes the prefix, as the paper has for
            training.

    Raises:
        ValueError: no token, a prefix that fills the whole context, a model that is adapted already.
    """
    _check_ids(model, ids, "prefix")
    cache: KVCache = model.new_cache()
    with torch.no_grad():
        model(ids, cache)
    model.requires_grad_(False)
    model.prefix = Prefix(cache.pairs).train(model.training)
    model.register_forward_pre_hook(model.prefix.give, with_kwargs=True)
    return trainable(model)


class Prompt(Virtual):
    """Trainable embeddings (P, C) that are read before every text; their outputs are cut off again."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors, self.length = nn.Parameter(vectors.detach()), len(vectors)
        self.tokens = 0          # of the text whose reading has just begun, else 0

    def lengthen(self, model: Llama, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the model reads: P places in front, whose ids do not matter."""
        given, past = self.arguments(model, args, kwargs)
        ids = given["ids"]
        self.tokens = 0 if past else ids.shape[1]
        if not past:
            given["ids"] = torch.cat([ids.new_zeros(len(ids), self.length), ids], dim=1)
        return (), given

    def speak(self, embedding: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """In place of their embeddings: the trained ones."""
        if not self.tokens:
            return output
        return torch.cat([self.vectors.expand(len(output), -1, -1), output[:, self.length:]], dim=1)

    def cut(self, model: Llama, args: tuple, logits: torch.Tensor) -> torch.Tensor:
        """After the model has read: only the text's own logits."""
        logits = logits[:, -self.tokens:] if self.tokens else logits
        self.tokens = 0
        return logits


def apply_prompt(model: Llama, ids: torch.Tensor) -> int:
    """Prompt tuning: freeze the model and let it read P trainable embeddings before every text; P · C numbers.

    Args: `ids`, and what is raised, as in `apply_prefix`; the start is their embeddings (Lester et al., section 2.1.2).
    """
    _check_ids(model, ids, "prompt")
    embedding = model.get_submodule("model.embed_tokens")
    model.requires_grad_(False)
    model.prompt = Prompt(embedding(ids.to(embedding.weight.device))[0]).train(model.training)
    model.register_forward_pre_hook(model.prompt.lengthen, with_kwargs=True)
    embedding.register_forward_hook(model.prompt.speak)
    model.register_forward_hook(model.prompt.cut)
    return trainable(model)


def _check_ids(model: nn.Module, ids: torch.Tensor, what: str) -> None:
    refuse_adapted(model)
    if not isinstance(model, Llama):
        raise ValueError(f"a {what} is written here for the course's Llama, "
                         f"and this is a {type(model).__name__}: use PEFT.")
    if ids.ndim != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"ids of shape {tuple(ids.shape)}: a {what} starts from the tokens of one text, "
                         "(1, P) with P at least 1.")
    limit = model.config.max_position_embeddings
    if ids.shape[1] >= limit:
        raise ValueError(f"a {what} of {ids.shape[1]} leaves no place for a text in a context of {limit}: choose fewer "
                         f"than {limit} positions, and as many fewer as the longest text has tokens.")
