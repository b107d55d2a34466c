"""Tensors that do not fit their places, and the true reason why."""
import re
from collections.abc import Mapping

import torch

from lora_edu.lora.targets import shorten

# what else may lie in an adapter's file, by a mark in its name
KINDS = {
    r"lora_magnitude": "DoRA's magnitude, which is not computed here",
    r"lora_embedding_": "LoRA on an embedding, and here it goes beside linear layers",
    r"\.lora_[AB]\.bias$": "a bias of the factors, which is not computed here",
    r"\.lora_(?![AB]\.)": "of a variant of LoRA that is not computed here",
    r"\.bias$": "a bias that was trained, and the config's modules_to_save does not name its module",
    r"^(?!.*\.lora_)": "no factor but of a whole module, and the config's modules_to_save does not name that",
}


def misfit(tensors: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> str:
    """What keeps these tensors out of these places, in words; empty where every one fits."""
    missing, extra = [n for n in places if n not in tensors], [n for n in tensors if n not in places]
    both = [n for n in places if n in tensors]
    shapes = [n for n in both if tensors[n].shape != places[n].shape]
    strange = [n for n in both if places[n].is_floating_point() and not tensors[n].is_floating_point()
               or not all_finite(tensors[n])]
    said = [f"{len(names)} tensors {what} (first: {names[0]})" for names, what in
            ((missing, "are missing"), (extra, "have no place"), (shapes, "have another shape"),
             (strange, "hold numbers that are not finite, or no floating numbers")) if names]
    return "; ".join(said)


def all_finite(tensor: torch.Tensor) -> bool:
    """Also of numbers of eight bits, which torch cannot ask."""
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def explain_misfit(stored: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> str:
    """What keeps the tensors of a file out of the places of a model, and what to do; empty where every one fits."""
    wrong = misfit(stored, places)
    if not wrong:
        return ""
    missing, extra = [n for n in places if n not in stored], [n for n in stored if n not in places]
    prefix = matching_prefix(extra, missing)
    if prefix:
        return f"{wrong}. {prefix}"
    for mark, what in KINDS.items():
        those = [name for name in extra if re.search(mark, name)]
        if those:
            return f"{wrong}. {shorten(those, 2)} {'is' if len(those) == 1 else 'are'} {what}: load it with PEFT."
    return f"{wrong}. It was made for another base, other targets or another rank."


def matching_prefix(there: list[str], here: list[str]) -> str:
    """The prefix that makes two lists of names one, in a sentence; empty if there is none.

    >>> matching_prefix(["bert.pooler.weight"], ["pooler.weight"])
    "With 'bert.' taken from the front of the names they would fit."
    """
    for theirs, ours, said in ((there, here, "taken from"), (here, there, "put to")):
        name = next((name for name in theirs if ours and name.endswith("." + ours[0])), None)
        prefix = name.removesuffix(ours[0]) if name else ""
        if prefix and {prefix + own for own in ours} <= set(theirs):
            return f"With {prefix!r} {said} the front of the names they would fit."
    return ""
