"""One way to talk to a model and its tokenizer, whether they are the course's or those of transformers.

The course's `Llama` is called as model(ids, cache) and gives logits; its tokenizer is a `tokenizers.Tokenizer`. Those
of transformers have other words for the same things, and this is the only module that knows them.
"""
from datetime import datetime

import torch
from torch import nn

END = "<|endoftext|>"


def encode(tokenizer, text: str) -> list[int]:
    """The token ids of a text, without what some tokenizers put around it.

    >>> from lora_edu import load_pretrained
    >>> encode(load_pretrained()[1], "Once upon a time")
    [47, 1422, 615, 259, 555]
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(ids, "ids", ids))


def end_token(tokenizer) -> int:
    """The id of the token that ends a text: what the tokenizer's folder or a tokenizer of transformers says, else
    `<|endoftext|>`.

    Raises:
        ValueError: the tokenizer has none.
    """
    if hasattr(tokenizer, "token_to_id"):
        end = tokenizer.token_to_id(getattr(tokenizer, "eos_token", None) or END)
    else:
        end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"this tokenizer has no {END} token, which ends every text here: add it as a special token.")
    return end


def ask(tokenizer, question: str) -> str:
    """A question as the model expects it, up to where the answer begins: in its chat template, or, of a model without
    one, with an arrow on the next line.

    A tokenizer of the course has its folder's template as `chat_template` (see `load_pretrained`).

    >>> from lora_edu import load_pretrained
    >>> ask(load_pretrained()[1], "name: Clover")
    'name: Clover\\n=>'
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return f"{question}\n=>"
    said = [{"role": "user", "content": question}]
    if hasattr(tokenizer, "apply_chat_template"):
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch brings it; a template is a stranger's program
    page = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    page.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    special = {"bos_token": getattr(tokenizer, "bos_token", None), "eos_token": getattr(tokenizer, "eos_token", None)}
    return page.from_string(template).render(messages=said, add_generation_prompt=True, **special)


def _refuse(message: str):
    raise ValueError(f"the model's chat template takes no such chat: {message}")


def vocabulary(tokenizer) -> int:
    """How many tokens there are."""
    return tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer)


def context(model: nn.Module) -> int:
    """How many tokens the model reads at most; a model that does not say is not limited here."""
    return getattr(model.config, "max_position_embeddings", None) or 2**31


class Reader:
    """A causal language model of transformers with the course's calls: reader(ids, cache) -> logits (B, T, vocab)."""

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config

    def __call__(self, ids: torch.Tensor, cache=None) -> torch.Tensor:
        return self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits

    def new_cache(self):
        from transformers import DynamicCache  # late: whoever has such a model has it
        return DynamicCache()


def reader(model):
    """What `stream` and `generate` read with: the model itself where it is the course's, else a `Reader` around it.

    Raises:
        TypeError: a model that neither makes a cache of its own nor comes from transformers.
    """
    if hasattr(model, "new_cache"):
        return model
    if hasattr(model, "get_output_embeddings") and hasattr(model, "config"):
        return Reader(model)
    raise TypeError(f"a {type(model).__name__} cannot write: give the course's Llama, "
                    "or a causal language model of transformers.")
