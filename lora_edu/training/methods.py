"""Every method of the course's comparisons by its name: what it changes in a model so that the model can learn; all else is frozen.

On fable each trains about as many numbers as LoRA of rank 8 on all linear layers (156,160, within 2 %), but for three: "full" trains
exactly the matrices that LoRA adapts, "BitFit" has no more biases than there are, and a "prompt" of that many numbers would not fit
the context, so it has as many positions as the prefix.
"""
import torch
from torch import nn

from lora_edu.lora.apply import apply_lora, unfreeze_matrices
from lora_edu.models.baselines import add_biases, apply_adapters, apply_prefix, apply_prompt, trainable
from lora_edu.training import bistro
from lora_edu.training.corpora import END

METHODS = ("full", "lora", "adapters (two a block)", "adapters (one a block)", "prefix", "prompt", "BitFit")
BOTTLENECK, POSITIONS = 38, 76      # of each of two adapters a block; of prefix and prompt


def prepare(model: nn.Module, method: str, targets="all-linear", rank: int = 8, seed: int = 0, start: torch.Tensor | None = None) -> int:
    """Change the model in place so that `method`, and nothing else, trains; returns how many numbers that is.

    Args:
        targets, rank: of LoRA (alpha = 2 rank); full trains the same targets.
        seed: of what starts at random.
        start: the tokens (1, P) that prefix and prompt start from, such as `solved_cards`.
    """
    torch.manual_seed(seed)
    if method == "lora":
        apply_lora(model, targets, rank=rank, alpha=2 * rank)
    elif method == "full":
        unfreeze_matrices(model, targets)
    elif method == "adapters (two a block)":
        apply_adapters(model, BOTTLENECK, "houlsby")
    elif method == "adapters (one a block)":
        apply_adapters(model, 2 * BOTTLENECK, "lin")
    elif method in ("prefix", "prompt"):
        if start is None:
            raise ValueError(f"a {method} starts from tokens: pass start=solved_cards(tokenizer).")
        (apply_prefix if method == "prefix" else apply_prompt)(model, start)
    elif method == "BitFit":
        add_biases(model)
    else:
        raise ValueError(f"method={method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    return trainable(model)


def solved_cards(tokenizer, length: int = POSITIONS, seed: int = 0) -> torch.Tensor:
    """The first tokens, (1, length), of a text of restaurant cards with their sentences: what prefix and prompt start from."""
    pairs = bistro.examples("train", 1 + length // 20, seed)
    text = END.join(f"{bistro.prompt(record)} {sentence}" for record, sentence in pairs)
    return torch.tensor([tokenizer.encode(text).ids[:length]])
