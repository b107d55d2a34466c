"""How long a forward pass takes, and why: several variants of a model timed side by side, and the operators that each one runs.

Times vary from run to run and from machine to machine. So the variants take turns in one process, in a new order each round, and what
is compared is a ratio of two times of the same round: a machine that slows down slows both. The operators do not vary: what a variant
runs beyond the base is the cause of what it costs, and that is what can be claimed. Read `interleaved`, then `operators` and
`chained_products`.
"""
import copy
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_edu.lora.apply import apply_lora, lora_layers, merge_lora, remove_lora, share_weights
from lora_edu.models.baselines import apply_adapters, apply_prefix

PRODUCTS = ("MmBackward", "AddmmBackward", "BmmBackward", "LinearBackward")     # autograd's names for them


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another (no unit), with a 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, widest: float = 0.1) -> str:
        """Such as "1.03 (1.02 to 1.04)"; where the interval is wider than the share `widest` of the value: "too noisy (0.91 to 1.30)"."""
        interval = f"({self.low:.2f} to {self.high:.2f})"
        return f"too noisy {interval}" if self.high - self.low > widest * self.value else f"{self.value:.2f} {interval}"


@dataclass(frozen=True)
class Times:
    """`seconds`: variant -> one time a round. Medians, because a pause of the machine makes a few calls very long and none short.

    Raises:
        ValueError: no variants, rounds that do not match, or a time that is not a positive number.
    """

    seconds: dict[str, np.ndarray]

    def __post_init__(self):
        counts = {name: len(times) for name, times in self.seconds.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(f"times of {counts or 'no variant'} rounds: give at least one variant, and each of them one time a round.")
        for name, times in self.seconds.items():
            wrong = times[~(np.isfinite(times) & (times > 0))]
            if wrong.size:
                raise ValueError(f"a time of {name!r} is {wrong[0]} seconds, and times are finite and above zero: measure again.")

    def of(self, name: str) -> np.ndarray:
        if name not in self.seconds:
            raise ValueError(f"there is no variant {name!r}: choose one of {', '.join(map(repr, self.seconds))}.")
        return self.seconds[name]

    def median(self, name: str) -> float:
        """Seconds."""
        return float(np.median(self.of(name)))

    def quartiles(self, name: str) -> tuple[float, float]:
        """Seconds: half of the rounds lie between these two."""
        return tuple(np.quantile(self.of(name), [0.25, 0.75]).tolist())

    def ratio(self, name: str, to: str) -> Ratio:
        """Median over the rounds of `name` / `to`, paired: both times of one round, so that what slows the machine cancels.

        The interval is a bootstrap over rounds (2 000 draws, 2.5 to 97.5 %): where the median would lie if this machine, today,
        were asked again. It says nothing about other machines.
        """
        ratios = self.of(name) / self.of(to)
        draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
        return Ratio(float(np.median(ratios)), *np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975]).tolist())


def seconds_for(call: Callable[[], object]) -> float:
    """Seconds of one call. A GPU works on after the call has returned: there its own events are the clock, and it is waited for."""
    if torch.cuda.is_initialized():
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    wait = torch.mps.synchronize if torch.backends.mps.is_available() else (lambda: None)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, warmup: int = 2, threads: int | None = None) -> Times:
    """Time all variants once a round, in an order that a seed shuffles anew each round; no gradients.

    Args:
        warmup: rounds before the first that counts (caches fill, kernels are chosen).
        threads: of torch, for the time of the measurement; None leaves them as they are.

    Raises:
        ValueError: no variants, fewer than 5 rounds, or no thread.
    """
    if not variants:
        raise ValueError("there is nothing to time: give at least one variant, a name and a function to call.")
    if rounds < 5:
        raise ValueError(f"rounds={rounds} are too few for a median with an interval: choose at least 5.")
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: choose at least 1, or None for as many as torch has now ({before}).")
    order, seconds = np.random.default_rng(0), {name: [] for name in variants}
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            for _ in range(warmup + rounds):
                for name in order.permutation(list(variants)):
                    seconds[name].append(seconds_for(variants[name]))
    finally:
        torch.set_num_threads(before)
    return Times({name: np.array(times[warmup:]) for name, times in seconds.items()})


def prefill(model: nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What to time: the model reads ids (B, T) at once -> logits."""
    return lambda: model(ids)


def decode(model: nn.Module, ids: torch.Tensor, tokens: int) -> Callable[[], torch.Tensor]:
    """What to time: after ids (B, T) and the token that follows, `tokens` more, one by one, the likeliest each -> (B, tokens).

    A `Llama` has read ids beforehand; every call goes on from the same cache.
    """
    with torch.no_grad():
        read = model.new_cache()
        first = model(ids, read)[:, -1:].argmax(-1)

    def write() -> torch.Tensor:
        cache, said = model.new_cache(), [first]
        cache.pairs = list(read.pairs)              # a shallow copy is enough: `KVCache.extend` puts new tensors in the list
        for _ in range(tokens):
            said.append(model(said[-1], cache)[:, -1:].argmax(-1))
        return torch.cat(said[1:], dim=1)
    return write


@torch.inference_mode()
def operators(model: nn.Module, ids: torch.Tensor) -> list[str]:
    """The torch operators ("aten::linear", "aten::mm", …) of one forward pass, in the order in which they began.

    An operator that calls others stands before them. The list is the same in every run.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")     # or the profiler (torch 2.13) writes two dated lines to stderr, into a notebook too
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

    Read off the graph that autograd would walk back, of a copy in which all weights train. Products that need nothing of each other
    (queries, keys and values) count once, those inside fused attention not at all.
    """
    twin = share_weights(model).requires_grad_(True)
    with torch.enable_grad():
        end = twin(ids).grad_fn
    depth, open_nodes = {None: 0}, [end]
    while open_nodes:                                  # no recursion: the graph of a deep model is deeper than Python's stack
        node = open_nodes[-1]
        before = [each for each, _ in node.next_functions]
        if missing := [each for each in before if each not in depth]:
            open_nodes += missing
        else:
            depth[node] = max((depth[each] for each in before), default=0) + node.name().startswith(PRODUCTS)
            open_nodes.pop()
    return depth[end]


def variants(base: nn.Module, rank: int = 8, bottleneck: int = 38, prefix: int = 76) -> dict[str, nn.Module]:
    """The base as it is and changed by each method, in eval mode; `base` itself is left alone.

    Every variant has weights of its own. With shared ones, whoever runs after a variant with the same weights finds them in the
    processor's cache: the base then looked up to 3 % faster than the same model merged and unloaded (fable, 1 x 16).

    Args:
        base: a `Llama`.
        rank: of LoRA on all linear layers; lora_B is random, so that a merge has something to fold in.
        bottleneck: of the two adapters of a block (Houlsby); a single one (Lin) has twice as many, for about the same count.
        prefix: trainable keys and values a layer, counted in positions. The defaults are equal budgets on fable, within 2 %.
    """
    made = {name: copy.deepcopy(base) for name in ("base", "LoRA", "LoRA merged", "merged and unloaded", "adapters (two a block)",
                                                   "adapters (one a block)", "prefix")}
    with torch.random.fork_rng():
        for name in list(made)[1:4]:
            torch.manual_seed(0)                       # the same factors three times
            apply_lora(made[name], "all-linear", rank, 2 * rank)
            for _, layer in lora_layers(made[name]):
                nn.init.normal_(layer.lora_B, std=0.02)
        merge_lora(made["LoRA merged"])
        remove_lora(made["merged and unloaded"], merge=True)
        apply_adapters(made["adapters (two a block)"], bottleneck, "houlsby")
        apply_adapters(made["adapters (one a block)"], 2 * bottleneck, "lin")
        apply_prefix(made["prefix"], torch.randint(base.config.vocab_size, (1, prefix)).to(next(base.parameters()).device))
    return {name: model.eval() for name, model in made.items()}
