"""What the methods that LoRA is compared with have in common: they freeze the model and put something of their own
into it.
"""
from torch import nn


class Rival(nn.Module):
    """What a method other than LoRA puts into a model."""


def trainable(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def refuse_adapted(model: nn.Module) -> None:
    """One method at a time: the second would freeze the first. Raises ValueError and names the first."""
    found = [type(module).__name__ for module in model.modules() if isinstance(module, Rival)]
    found += ["LoRA" for name, _ in model.named_parameters() if "lora_" in name]
    if found:
        raise ValueError(f"the model carries a {found[0]} already, "
                         "and adding another method would freeze it: remove it first.")
