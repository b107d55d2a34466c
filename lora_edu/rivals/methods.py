"""Every method of the course's comparisons by its name: what it changes in a model so that the model can learn; all
else is frozen.

On fable each trains about as many numbers as LoRA of rank 8 on all linear layers (156,160, within 2 %), but for three:
"full" trains exactly the matrices that LoRA adapts, "BitFit" has no more biases than there are (Ben Zaken et al. 2022,
arXiv:2106.10199), and a "prompt" of that many numbers would not fit the context, so it has as many positions as the
prefix.
"""
import copy

import torch
from torch import nn

from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inject import apply_lora, unfreeze_matrices
from lora_edu.lora.merge import merge_lora, remove_lora
from lora_edu.models.bridge import END, encode
from lora_edu.rivals.bottleneck import apply_adapters
from lora_edu.rivals.rival import refuse_adapted, trainable
from lora_edu.rivals.virtual_tokens import apply_prefix, apply_prompt
from lora_edu.training import bistro


def add_biases(model: nn.Module) -> int:
    """BitFit: freeze the model and train the biases of its linear layers, all but the output head; returns how many
    numbers train.

    A layer without a bias (LLaMA has none) gets one of zeros, which changes nothing; so here BitFit costs an addition a
    layer.
    """
    refuse_adapted(model)
    model.requires_grad_(False)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "lm_head":
            values = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(values)
    return trainable(model)


BOTTLENECK, POSITIONS = 38, 76      # of each of two adapters a block; of prefix and prompt

# name -> what it does to (model, targets, rank, start); LoRA and full fine-tuning change the same matrices
METHODS = {
    "full": lambda model, targets, rank, start: unfreeze_matrices(model, targets),
    "lora": lambda model, targets, rank, start: apply_lora(model, targets, rank=rank, alpha=2 * rank),
    "adapters (two a block)": lambda model, targets, rank, start: apply_adapters(model, BOTTLENECK, "houlsby"),
    "adapters (one a block)": lambda model, targets, rank, start: apply_adapters(model, 2 * BOTTLENECK, "lin"),
    "prefix": lambda model, targets, rank, start: apply_prefix(model, start),
    "prompt": lambda model, targets, rank, start: apply_prompt(model, start),
    "BitFit": lambda model, targets, rank, start: add_biases(model),
}


def prepare(model: nn.Module, method: str, targets="all-linear", rank: int = 8, seed: int = 0,
            start: torch.Tensor | None = None) -> int:
    """Change the model in place so that `method`, and nothing else, trains; returns how many numbers that is.

    Args:
        method: a key of `METHODS`.
        targets, rank: of LoRA (alpha = 2 rank); full trains the same targets.
        seed: of what starts at random.
        start: the tokens (1, P) that prefix and prompt start from, such as `solved_cards`.

    Raises:
        ValueError: no such method, a prefix or prompt without a start, a model that is adapted already.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    if method in ("prefix", "prompt") and start is None:
        raise ValueError(f"a {method} starts from tokens: pass start=solved_cards(tokenizer).")
    torch.manual_seed(seed)
    METHODS[method](model, targets, rank, start)
    return trainable(model)


def solved_cards(tokenizer, length: int = POSITIONS, seed: int = 0) -> torch.Tensor:
    """The first tokens, (1, length), of a text of restaurant cards with their sentences: what prefix and prompt
    start from.
    """
    pairs = bistro.examples("train", 1 + length // 20, seed)
    text = END.join(f"{bistro.prompt(record)} {sentence}" for record, sentence in pairs)
    return torch.tensor([encode(tokenizer, text)[:length]])


def variants(base: nn.Module, rank: int = 8, bottleneck: int = 38, prefix: int = 76,
             narrow: int = 38) -> dict[str, nn.Module]:
    """The base as it is and changed by each method, in eval mode; `base` itself is left alone.

    Every variant has weights of its own. With shared ones, whoever runs after a variant with the same weights finds
    them in the processor's cache: the base then looked up to 3 % faster than the same model merged and unloaded (fable,
    1 x 16).

    Args:
        base: a `Llama`.
        rank: of LoRA on all linear layers; lora_B is random, so that a merge has something to fold in.
        bottleneck: of the two adapters of a block (Houlsby); a single one (Lin) has twice as many, for about the same
            count.
        prefix: trainable keys and values a layer, counted in positions.
        narrow: the rank of a LoRA on queries and values alone. The defaults are equal budgets on fable, within 2 %.
    """
    made = {name: copy.deepcopy(base)
            for name in ("base", "LoRA", "LoRA merged", "merged and unloaded", "LoRA on q and v",
                         "adapters (two a block)", "adapters (one a block)", "prefix")}
    with torch.random.fork_rng():
        for name in list(made)[1:5]:
            torch.manual_seed(0)                       # the same factors three times
            targets, r = (["q_proj", "v_proj"], narrow) if name == "LoRA on q and v" else ("all-linear", rank)
            apply_lora(made[name], targets, r, 2 * r)
            for _, layer in lora_layers(made[name]):
                nn.init.normal_(layer.lora_B, std=0.02)
        merge_lora(made["LoRA merged"])
        remove_lora(made["merged and unloaded"], merge=True)
        apply_adapters(made["adapters (two a block)"], bottleneck, "houlsby")
        apply_adapters(made["adapters (one a block)"], 2 * bottleneck, "lin")
        apply_prefix(made["prefix"],
                     torch.randint(base.config.vocab_size, (1, prefix)).to(next(base.parameters()).device))
    return {name: model.eval() for name, model in made.items()}
