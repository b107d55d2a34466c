"""One LoRA training that moves forward in small pieces of work: what a page can play, pause and go through step by
step.

`LiveRun.advance` works for about a fifth of a second and returns. What it finds is a function of the steps done and of
nothing else: measuring belongs to fixed steps, and a step counts when all that belongs to it is done. So whoever calls,
and how often, decides when something is seen and never what.
"""
import asyncio
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from lora_edu.lora.inject import apply_lora, share_weights
from lora_edu.lora.layer import LoRALinear
from lora_edu.lora.settings import LoRASettings
from lora_edu.training.corpora import completions
from lora_edu.training.loop import Batch, Diverged, Step, evaluate, train

EVERY, SAMPLE_EVERY = 10, 25     # steps between two measurements, and between two samples
SAMPLE = 48                      # tokens of a sample
BETWEEN: list[float] = []        # when an interrupt came while the kernel rested
RECENT = 1.0                     # seconds: an older one was not meant for a training


@dataclass(frozen=True)
class Plan:
    """What a run learns from and is judged by.

    Args:
        tokenizer, prompt: a sample is what the model writes after the prompt.
        batches: ``batches(steps, seed)`` gives the training batches, the same ones each time.
        heldout, plain: small fixed batches of the task, and of text whose loss says what is forgotten; each batch is a
            piece of work, so let it be small.
        questions, judge: the prompts of the exam at the end, and the share from 0 to 1 that the texts written to them
            score; none for a task without answers. judged: what that share counts, in words. at_once: questions
            that are answered in one piece of work. shown: what the page shows of the prompt, if not all of it.
        every: steps between two measurements. autocast: what the products are computed in, torch.bfloat16 or
            torch.float16; None: as the model is. steps: length of a run, where the lesson fixes it.
    """

    tokenizer: object
    prompt: str
    batches: Callable[[int, int], Iterable[Batch]]
    heldout: list[Batch]
    plain: list[Batch]
    questions: list[str] = field(default_factory=list)
    judge: Callable[[list[str]], float] | None = None
    judged: str = "slots right"
    at_once: int = 4
    shown: str = ""
    every: int = EVERY
    autocast: torch.dtype | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Point:
    """Held-out loss on the task and loss on the plain text after `step` steps, in nats per token."""

    step: int
    heldout: float
    plain: float


class LiveRun:
    """A LoRA training of `steps` steps (the schedule of `train`) that waits between two pieces of work.

    Args:
        base: the untouched model, on the device to train on. Its weights are shared, frozen, by all runs on it.
        adapter: rank, scaling, targets, learning rate and seed (of the random start and of the data).

    Attributes:
        done, steps, complete: steps done, of how many; complete is True when there is nothing left to do, the exam
            included.
        losses: one for each step done, that of the step's batch before its update, nats per token.
        points: held-out and plain loss before the first step (known from step 1 on), at every
            `plan.every`-th and at the last step.
        samples: (step, text) at every 25th and at the last step.
        sigma: singular values of scaling * B A of the matrix `watched`, largest first, after the steps done.
        skipped: how many of the steps done overflowed in float16 and moved nothing.
        score: what the exam at the end gave, or None. diverged: the step whose loss was not a finite number, or
            None.
        report: what `apply_lora` said: trainable numbers, bytes.

    Raises:
        ValueError: settings that do not fit the model, as in `apply_lora`; more steps than batches, when they are
            reached.
    """

    def __init__(self, base: nn.Module, adapter: LoRASettings, plan: Plan, steps: int = 100):
        if steps < 1:
            raise ValueError(f"steps={steps}: a run needs at least 1 step.")
        self.plan, self.steps, self.done, self.skipped, self.complete = plan, steps, 0, 0, False
        self.losses: list[float] = []
        self.points: list[Point] = []
        self.samples: list[tuple[int, str]] = []
        self.score = self.diverged = None
        self.device = next(base.parameters()).device
        self.model = share_weights(base)
        # other cells' random numbers stay theirs
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(adapter.seed)
            self.report = apply_lora(self.model, adapter.target_modules, adapter.rank, adapter.scaling * adapter.rank)
        self.watched = middle(list(self.report.matched))
        self.sigma = [0.0] * adapter.rank
        self._work = self._pieces(adapter)

    def advance(self, target: int | None = None, seconds: float = 0.2,
                stop: Callable[[], bool] = lambda: False) -> int:
        """Work until `target` steps are done (None: to the end, the exam included), for about `seconds`, or until
        `stop()` says so after a piece; returns the steps done.

        At least one piece of work is done, if there is any. After an exception the run cannot go on: build another.
        """
        began = now = time.perf_counter()
        while not self.complete and (target is None or self.done < min(target, self.steps)):
            last = now
            next(self._work)
            now = time.perf_counter()
            # another such piece would end further from the mark than this one
            if now - began + (now - last) / 2 > seconds or stop():
                break
        return self.done

    def close(self) -> None:
        """End the run and free its model; what it found stays."""
        self.complete = True
        self.model = self._work = None

    def _pieces(self, adapter: LoRASettings) -> Generator[None, None, None]:
        """All the work, a pause after each piece; what belongs to a step is published together."""
        before = yield from self._measure(0)
        batches, autocast = self.plan.batches(self.steps, adapter.seed), self.plan.autocast
        for step in self._until_diverged(train(self.model, batches, self.steps, adapter.lr, autocast=autocast)):
            last, found, sample = step.step == self.steps, [] if self.points else [before], []
            sigma = singular_values(self.model.get_submodule(self.watched))
            if last or step.step % self.plan.every == 0:
                yield
                found.append((yield from self._measure(step.step)))
            if last or step.step % SAMPLE_EVERY == 0:
                yield
                sample = [(step.step,
                           completions(self.model, self.plan.tokenizer, [self.plan.prompt],
                                       max_new_tokens=SAMPLE)[0])]
            if not all(map(math.isfinite, (step.loss, *sigma, *(point.heldout + point.plain for point in found)))):
                self.diverged, self.complete = step.step, True
                yield
            self.losses.append(step.loss)
            self.points += found
            self.samples += sample
            self.sigma, self.done, self.skipped = sigma, step.step, self.skipped + step.skipped
            yield
        if not self.complete:
            yield from self._exam()
        self.complete = True
        yield

    def _until_diverged(self, steps: Iterator[Step]) -> Iterator[Step]:
        try:
            yield from steps
        except Diverged:
            self.diverged, self.complete = self.done + 1, True

    def _measure(self, step: int) -> Generator[None, None, Point]:
        heldout = yield from self._loss(self.plan.heldout)
        plain = yield from self._loss(self.plan.plain)
        return Point(step, heldout, plain)

    def _loss(self, batches: list[Batch]) -> Generator[None, None, float]:
        """`evaluate`, with a pause after each batch."""
        counts, losses = [(targets != -100).sum().item() for _, targets in batches], []
        for batch in batches:
            losses.append(evaluate(self.model, [batch]))
            yield
        return sum(count * loss for count, loss in zip(counts, losses)) / sum(counts)

    def _exam(self) -> Generator[None, None, None]:
        questions, texts = self.plan.questions, []
        for i in range(0, len(questions), self.plan.at_once):
            texts += completions(self.model, self.plan.tokenizer, questions[i:i + self.plan.at_once])
            yield
        if questions:
            self.score = self.plan.judge(texts)


@contextmanager
def waiting_interrupt() -> Iterator[Callable[[], bool]]:
    """While it lasts, an interrupt of the kernel is noted and not raised, so that no piece of work is torn; yields a
    function that says whether one came. Outside the main thread, which is the only one that is interrupted, it never
    does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = [at for at in BETWEEN if time.monotonic() - at < RECENT]
    BETWEEN.clear()
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(time.monotonic()))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
        _note_between()


def _note_between() -> None:
    """Note an interrupt between two ticks, too: a kernel that rests ignores it, and the reader meant the training. Set
    when the kernel has put its own handler back, which it does after each message.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:                       # no kernel: a script, a test
        return
    loop.call_later(0.005, signal.signal, signal.SIGINT, lambda number, frame: BETWEEN.append(time.monotonic()))


def middle(names: list[str]) -> str:
    """The matrix to watch: o_proj of the middle layer, else its v_proj, else whatever comes first there."""
    ending = next((e for e in ("o_proj", "v_proj") if any(name.endswith(e) for name in names)),
                  names[0].rpartition(".")[2])
    kind = [name for name in names if name.endswith(ending)]
    return kind[len(kind) // 2]


@torch.no_grad()
def singular_values(layer: LoRALinear) -> list[float]:
    """The singular values of scaling * B A, largest first, (rank,); all nan if a factor is not finite.

    With B = Q R and A.T = P S they are those of the small R S.T: the (out, in) product is never made.
    """
    B, A = (factor.detach().cpu().double() for factor in (layer.lora_B, layer.lora_A))
    if not (B.isfinite().all() and A.isfinite().all()):
        return [math.nan] * layer.rank
    R, S = (torch.linalg.qr(factor).R for factor in (B, A.T))                # (rank, rank) each
    return (layer.scaling * torch.linalg.svdvals(R @ S.T)).tolist()
