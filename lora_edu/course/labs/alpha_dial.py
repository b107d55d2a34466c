"""The alpha dial: turn an adapter from off to beyond full, and see what the model writes there, and two losses.

What is turned was written and measured beforehand, so the dial answers while cells run. A prompt of the reader's own,
and "write on from here", are asked of the kernel: every word keeps the colour of the strength it was written at.
"""
from collections.abc import Callable

import numpy as np

from lora_edu.course.figures.curves import plot_two_losses
from lora_edu.course.labs.lab import Lab
from lora_edu.training.bistro import SLOTS, Card, slots_said


def alpha_dial(strengths, texts: dict[str, list[str]], losses: dict | None = None, cards: dict[str, Card] | None = None,
               write: Callable[[str, float], str] | None = None, title: str = "One dial, two voices",
               strength: float = 1.0, names: dict[str, str] | None = None) -> Lab:
    """A slider over the strength of an adapter: the text the model writes there, and two losses.

    Args:
        strengths: at least two settings in rising order, for example 0, 0.1, ..., 1.2.
        texts: ``{prompt: one text for each strength}``.
        losses: two of them, ``{"the new task": one loss for each strength, ...}``, in nats per token; or None.
        cards: the bistro card of those prompts that are made from one: its slots are coloured right or wrong.
        write: ``write(prompt, strength)`` gives what the model writes after a prompt of the reader's own; None: none.
        strength: where the dial starts. names: how a prompt is called where one is chosen.

    Raises:
        ValueError: the lengths differ, the strengths do not rise, or there are not two losses.
    """
    strengths, losses, cards = [float(each) for each in strengths], losses or {}, cards or {}
    series = {**texts, **losses}
    odd = [name for name, values in series.items() if len(values) != len(strengths)]
    if odd or not texts or len(strengths) < 2 or min(np.diff(strengths), default=0) <= 0 or len(losses) not in (0, 2):
        raise ValueError(f"alpha_dial got {len(strengths)} strengths, {len(losses)} losses and {len(texts)} prompts"
                         + (f", and {len(series[odd[0]])} values for {odd[0]!r}" if odd else "") +
                         ": give at least two rising strengths, as many texts for each prompt, and two losses or none.")
    called = {prompt: "a card" if prompt in cards else "a tale" for prompt in texts} | (names or {})
    prompts = [{"prompt": prompt, "name": called[prompt], "texts": list(written)}
               | ({"slots": [slots_of(text, cards[prompt]) for text in written]} if prompt in cards else {})
               for prompt, written in texts.items()]
    at = int(np.abs(np.array(strengths) - strength).argmin())
    data = {"title": title, "strengths": strengths, "prompts": prompts, "writes": write is not None,
            "losses": {name: [float(value) for value in values] for name, values in losses.items()}}
    state = {"strength": strengths[at], "prompt": prompts[0]["prompt"], "line": [], "written": {}}
    picture = plot_two_losses(strengths, *losses.values(), title, alpha=strengths[at]) if losses else None
    dial = Lab("alpha_dial", data, state, in_words(data, at), picture)
    if write is not None:
        dial.on_msg(lambda _, asked, buffers: dial.send({"key": asked["key"], "text": answer(write, asked, strengths)}))
    return dial


def slots_of(text: str, card: Card) -> list[tuple[str, str]]:
    """What a text says of a card: ("food: Greek", "right"), "wrong", "missing", or "added", which was not asked for."""
    said, found = slots_said(text), []
    for slot in SLOTS:
        if slot in card:
            verdict = "missing" if slot not in said else "right" if said[slot] == card[slot] else "wrong"
            found.append((f"{slot}: {card[slot]}", verdict))
        elif slot in said:
            found.append((f"{slot}: {said[slot]}, not on the card", "added"))
    return found


def answer(write: Callable[[str, float], str], asked: dict, strengths: list[float]) -> str:
    """A callback has no other place to show an error than the text."""
    try:
        return write(asked["prompt"], strengths[asked["index"]])
    except Exception as error:
        return f" (This could not be written: {type(error).__name__}: {error})"


def in_words(data: dict, at: int) -> str:
    """The dial at one of its strengths; where there are no losses to show, at its ends and in its middle, too."""
    strengths, first = data["strengths"], data["prompts"][0]
    losses = "; ".join(f"{name} {values[at]:.2f}" for name, values in data["losses"].items())
    places = [at] if losses else sorted({0, len(strengths) // 2, int(np.abs(np.array(strengths) - 1).argmin()), at})
    digits = 1 if all(round(each, 1) == each for each in strengths) else 2
    return "\n".join(f"strength {strengths[i]:.{digits}f}" + (f"; {losses} nats per token" if losses else "")
                     + f": {first['prompt']} {first['texts'][i].strip()}" for i in places)
