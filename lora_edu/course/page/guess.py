"""Ask for the reader's number before a result, then draw it beside the truth.

In one cell ``bet = guess(None, "how many numbers …?")``, where the reader replaces None; after the result
``bet.reveal(truth)``; at the end of the notebook ``calibration()``. A notebook is stored with None everywhere, and
what is printed then holds no measured digit.
"""
import math
from statistics import median

from matplotlib.figure import Figure

from lora_edu.course.page.exercises import word
from lora_edu.course.page.show import BLACK, ORANGE, new_figure, show

from lora_edu.tables import printable

_guesses: dict[str, "Guess | Choice"] = {}   # question -> its guess; a cell run twice replaces its own
YOURS = dict(color=ORANGE, marker="D", markersize=9, linestyle="--", label="your guess")
TRUTH = dict(color=BLACK, marker="o", markersize=9, linestyle="-", label="the truth")


def guess(value, question: str, unit: str = "", x=None, xlabel: str = "", choices: tuple = ()) -> "Guess | Choice":
    """Note the reader's answer to ``question`` and print it ("no guess yet" for None).

    Args:
        value: None, a number, or, for a curve, as many numbers as ``x`` has; with ``choices``, one of them, or all of
            them in an order.
        question: what is asked, one sentence; it is also the guess's name in `calibration`.
        unit: printed after the number, for example "nats per token".
        x, xlabel: for a curve, where its values stand and what that is: (1, 2, 4, 8), "rank r".
        choices: what can be answered, in words.

    Raises:
        ValueError: if ``value`` is not a finite number, not one number for each ``x``, or none of the choices.
    """
    if choices:
        return _noted(Choice(value, question, tuple(choices)))
    made = Guess(None if value is None else _numbers(value, "your guess", x), question, unit, x, xlabel)
    return _noted(made)


def _noted(made):
    _guesses[made.question] = made
    print(printable(f"no guess yet: {made.question}" if made.value is None else f"your guess: {made.said()}"))
    return made


def calibration() -> None:
    """Sum up the guesses of this notebook: how many were made, how far off, and in which direction."""
    scored = [each for each in _guesses.values() if isinstance(each, Guess) and each.factor is not None]
    chosen = [each.right for each in _guesses.values() if isinstance(each, Choice) and each.right is not None]
    if chosen:
        print(printable(f"choices: {sum(chosen)} of {len(chosen)} right"))
    if chosen and not scored:
        return
    if not scored:
        print(printable(f"calibration: no guesses yet; this notebook asks for {len(_guesses)}"))
        return
    middle, low = median(each.factor for each in scored), sum(each.too_low for each in scored)
    print(printable(f"calibration: {len(scored)} of {len(_guesses)} guessed; half of them within a factor of "
                    f"{_factor(middle)}; {low} too low"))


class Guess:
    """The answer to one question; made by `guess`. ``factor`` is 1.0 for right, 2.0 for twice or half the truth."""

    def __init__(self, value, question: str, unit: str, x, xlabel: str):
        self.value, self.question, self.unit, self.x, self.xlabel = value, question, unit, x, xlabel
        self.factor: float | None = None
        self.too_low = False

    def said(self) -> str:
        return _say(self.value, self.unit)

    def reveal(self, truth) -> None:
        """Show the guess beside ``truth`` (a number, or one for each ``x``) and score it; without a guess, say so."""
        if self.value is None:
            print(printable("no guess to compare: put yours in place of None above, and run both cells again"))
            return
        truth = _numbers(truth, "the truth", self.x)
        self.factor = factor_off(self.value, truth)
        self.too_low = sum(_list(self.value)) < sum(_list(truth))
        show(self.draw(truth))
        print(printable(f"your guess: {_say(self.value, self.unit)}; the truth: {_say(truth, self.unit)}"))

    def draw(self, truth) -> Figure:
        """Guess and truth in one figure: two points on a line, or two curves over ``x``."""
        title = _finding(factor_off(self.value, truth))
        if self.x is not None:
            return self._draw_curve(truth, title)
        fig, ax = new_figure(height=1.6, title=title, yticks=[], ylim=(-1, 1))
        for value, style, up in ((self.value, YOURS, 14), (truth, TRUTH, -14)):
            ax.plot([value], [0], **style | {"linestyle": "none"})
            ax.annotate(f"{style['label']}: {_say(value, '')}", (value, 0), xytext=(0, up),
                        textcoords="offset points", ha="center", va="center")
        low, high = min(self.value, truth), max(self.value, truth)
        ax.set(xlabel=self.unit or "value", xlim=(low - 0.4 * (high - low or 1), high + 0.4 * (high - low or 1)))
        if low > 0:   # a ratio is a distance; a margin of 4 on both sides, so that close looks close
            ax.set(xscale="log", xlabel=(self.unit or "value") + ", log scale", xlim=(low / 4, high * 4))
        ax.set_xticks([], minor=True)
        ax.set_xticks([])
        ax.spines["left"].set_visible(False)
        return fig

    def _draw_curve(self, truth, title: str) -> Figure:
        fig, ax = new_figure(title=title, xlabel=self.xlabel, ylabel=self.unit or "value")
        ax.plot(self.x, self.value, **YOURS)
        ax.plot(self.x, truth, **TRUTH)
        if min(self.x) > 0 and max(self.x) >= 20 * min(self.x):   # ranks 1, 2, 4 ... stand evenly
            ax.set_xscale("log")
            ax.set_xticks([], minor=True)
        ax.set_xticks(self.x, labels=[f"{v:,g}" for v in self.x])
        ax.legend(frameon=False)
        return fig


class Choice:
    """The answer in words to one question: one of the choices, or all of them in an order. ``right``: was it?"""

    def __init__(self, value, question: str, choices: tuple):
        self.question, self.choices, self.right = question, choices, None
        self.value = None if value is None or value is ... else self._known(value, "your guess")

    def said(self) -> str:
        return ", ".join(self.value) if isinstance(self.value, tuple) else self.value

    def reveal(self, truth) -> None:
        """Say whether the guess is ``truth``, a choice or an order; without a guess, say so."""
        if self.value is None:
            print(printable("no guess to compare: put yours in place of None above, and run both cells again"))
            return
        truth, mine = self._known(truth, "the truth"), self.said()
        self.right = self.value == truth
        if isinstance(truth, tuple) and isinstance(self.value, tuple) and not self.right:
            places = sum(one == other for one, other in zip(self.value, truth))
            print(printable(f"your order: {mine}; the truth: {', '.join(truth)} ({places} of {len(truth)} in place)"))
            return
        truth = ", ".join(truth) if isinstance(truth, tuple) else truth
        print(printable(f"your guess, {mine}, is right" if self.right else f"your guess: {mine}; the truth: {truth}"))

    def _known(self, value, name: str):
        names = {word(choice): choice for choice in self.choices}
        several = isinstance(value, (list, tuple))
        found = tuple(names.get(word(each)) for each in (value if several else [value]))
        if None in found or several and sorted(found) != sorted(self.choices):
            raise ValueError(f"{name} is {value!r}: give one of {', '.join(map(repr, self.choices))}, all of them in "
                             "an order, or None for no guess.")
        return found if several else found[0]


def factor_off(value, truth) -> float:
    """How many times too large or too small, at least 1.0; for curves the geometric mean over the points.

    The ratio, not the difference: guessing 500 for 1,000 is as good as guessing 2,000. Where one of the two is zero or
    the signs differ there is no ratio, and the answer is infinity.
    """
    logs = []
    for one, other in zip(_list(value), _list(truth), strict=True):
        if one == other:
            logs.append(0.0)
        elif one * other <= 0:
            return math.inf
        else:
            logs.append(abs(math.log(abs(one)) - math.log(abs(other))))
    return math.exp(sum(logs) / len(logs))


def _list(value) -> list:
    return value if isinstance(value, list) else [value]


def _numbers(value, name: str, x):
    """``value`` as a float, or as a list of them where the question has an ``x``."""
    value = value.tolist() if hasattr(value, "tolist") else value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise ValueError(f"{name} is {value!r}: give a finite number, for example 1000, or None for no guess.")
    if (x is None) != (not isinstance(value, (list, tuple))) or x is not None and len(values) != len(x):
        wanted = "one number" if x is None else f"a list of {len(x)} numbers, one for each of {', '.join(map(str, x))}"
        raise ValueError(f"{name} is {value!r}: this question asks for {wanted}.")
    return value if x is None else values


def _say(value, unit: str) -> str:
    return (", ".join(f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" for v in _list(value)) + f" {unit}").strip()


def _factor(factor: float) -> str:
    return f"{factor:.2g}" if factor < 100 else f"{factor:,.0f}"


def _finding(factor: float) -> str:
    if math.isinf(factor):
        return "One is zero, or the signs differ: no ratio"
    return "Your guess is within 5 %" if factor < 1.05 else f"Your guess is off by a factor of {_factor(factor)}"
