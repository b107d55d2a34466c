"""How long a forward pass takes: several variants of a model timed side by side.

Times vary from run to run and from machine to machine. So the variants take turns in one process, in a new order each
round, and what is compared is a ratio of two times of the same round: a machine that slows down slows both. Read
`interleaved`, then `Times.ratio`.
"""
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another (no unit), with a 95 % interval."""

    value: float
    low: float
    high: float

    def noisy(self, widest: float = 0.1) -> bool:
        """Is the interval wider than this share of the value?"""
        return self.high - self.low > widest * self.value

    def text(self, widest: float = 0.1) -> str:
        """Such as "1.03 (1.02 to 1.04)", or "too noisy (0.91 to 1.30)"."""
        return ("too noisy" if self.noisy(widest) else f"{self.value:.2f}") + f" ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Times:
    """`seconds`: variant -> one time a round. Medians, because a pause of the machine makes a few calls very long and
    none short.

    Raises:
        ValueError: no variants, rounds that do not match, or a time that is not a positive number.
    """

    seconds: dict[str, np.ndarray]

    def __post_init__(self):
        counts = {name: len(times) for name, times in self.seconds.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(f"times of {counts or 'no variant'} rounds: give at least one variant, "
                             "and each of them one time a round.")
        for name, times in self.seconds.items():
            wrong = times[~(np.isfinite(times) & (times > 0))]
            if wrong.size:
                raise ValueError(f"a time of {name!r} is {wrong[0]} seconds, "
                                 "and times are finite and above zero: measure again.")

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
        """Median over the rounds of `name` / `to`, paired: both times of one round, so that what slows the machine
        cancels.

        The interval is a bootstrap over rounds (2 000 draws, 2.5 to 97.5 %): where the median would lie if this
        machine, today, were asked again. It says nothing about other machines.
        """
        ratios = self.of(name) / self.of(to)
        draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
        return Ratio(float(np.median(ratios)), *np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975]).tolist())


def seconds_for(call: Callable[[], object]) -> float:
    """Seconds of one call.

    A GPU works on after the call has returned: there its own events are the clock, and it is waited for.
    """
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


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, warmup: int = 2,
                threads: int | None = None, gradients: bool = False) -> Times:
    """Time all variants once a round, in an order that a seed shuffles anew each round.

    Args:
        gradients: the variants are training steps; else nothing is recorded for a backward pass.
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
        with contextlib.nullcontext() if gradients else torch.inference_mode():
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
    """What to time: after ids (B, T) and the token that follows, `tokens` more, one by one, the likeliest each -> (B,
    tokens).

    A `Llama` has read ids beforehand; every call goes on from the same cache.
    """
    with torch.no_grad():
        read = model.new_cache()
        first = model(ids, read)[:, -1:].argmax(-1)

    def write() -> torch.Tensor:
        cache, said = model.new_cache(), [first]
        # a shallow copy is enough: `KVCache.extend` puts new tensors in the list
        cache.pairs = list(read.pairs)
        for _ in range(tokens):
            said.append(model(said[-1], cache)[:, -1:].argmax(-1))
        return torch.cat(said[1:], dim=1)
    return write
