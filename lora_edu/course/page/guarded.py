"""Run a reader's function so that it can neither hang the page nor leave torch otherwise than it was."""
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SECONDS = 10


class TooSlow(BaseException):
    """No Exception: a reader's own ``except Exception`` must not swallow it."""


@contextmanager
def guarded(seconds: float = SECONDS) -> Iterator[None]:
    """Within the block a function has so many seconds, where the system has SIGALRM (not Windows, nor a second thread).

    Afterwards grad mode, default dtype and device, and torch's random numbers are as they were.

    Raises:
        TooSlow: the time is over.

    >>> with guarded():
    ...     torch.set_default_dtype(torch.float64)
    >>> torch.get_default_dtype()
    torch.float32
    """
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        with _time_limit(seconds), torch.random.fork_rng():
            yield
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        if torch.get_default_device() != before[2]:
            # None, not "cpu": a set default device is a mode, under which torch leaves some of its fast paths
            torch.set_default_device(None if before[2].type == "cpu" else before[2])


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_):
        raise TooSlow
    handler = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
