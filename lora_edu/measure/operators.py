"""The operators that a forward pass runs, and how many matrix products stand in its longest chain.

Times vary; operators do not. What a variant runs beyond the base is the cause of what it costs, and that is what can be
claimed.
"""
import os
import warnings

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_edu.lora.inject import share_weights

PRODUCTS = ("MmBackward", "AddmmBackward", "BmmBackward", "LinearBackward")     # autograd's names for them


@torch.inference_mode()
def operators(model: nn.Module, ids: torch.Tensor) -> list[str]:
    """The torch operators ("aten::linear", "aten::mm", …) of one forward pass, in the order in which they began.

    An operator that calls others stands before them. The list is the same in every run.
    """
    # or the profiler (torch 2.13) writes two dated lines to stderr, into a notebook too
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    model(ids)                                         # what only a first call does is left out
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")     # torch 2.11 says so at every use
        with profile(activities=[ProfilerActivity.CPU]) as taken:
            model(ids)
    events = [event for event in taken.events() if event.name.startswith("aten::")]
    return [event.name for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))]


def matrix_products(names: list[str]) -> int:
    """How many of them multiply matrices (mm, addmm, bmm); those inside fused attention do not show."""
    return sum(name in ("aten::mm", "aten::addmm", "aten::bmm") for name in names)


def chained_products(model: nn.Module, ids: torch.Tensor) -> int:
    """How many matrix products stand in the longest chain in which each needs the one before it: the depth of the work.

    Read off the graph that autograd would walk back, of a copy in which all weights train. Products that need nothing
    of each other (queries, keys and values) count once, those inside fused attention not at all.
    """
    twin = share_weights(model).requires_grad_(True)
    with torch.enable_grad():
        end = twin(ids).grad_fn
    depth, open_nodes = {None: 0}, [end]
    # no recursion: the graph of a deep model is deeper than Python's stack
    while open_nodes:
        node = open_nodes[-1]
        before = [each for each, _ in node.next_functions]
        if missing := [each for each in before if each not in depth]:
            open_nodes += missing
        else:
            depth[node] = max((depth[each] for each in before), default=0) + node.name().startswith(PRODUCTS)
            open_nodes.pop()
    return depth[end]
