"""The adapter mixer: three adapters of one base, a slider each, and what the mixture says and costs.

The mixtures were made and measured beforehand (record adapter_mixer), so every setting of the sliders is there.
"""
from lora_edu.course.figures.curves import plot_bars
from lora_edu.course.labs.lab import Lab
from lora_edu.course.records.stored import Record, load_record


def adapter_mixer(record: Record | None = None, weights: tuple[float, ...] = (1.0, 0.0, 0.0),
                  title: str = "Losses of the mixture, and of fable alone") -> Lab:
    """Three sliders, one text, and a loss for each trade and for the tales, in nats per token.

    Args:
        record: of mixtures on a grid; the stored one by default.
        weights: where the sliders start; the nearest setting that was measured is taken.

    Raises:
        ValueError: not one weight for each adapter.
    """
    record = record or load_record("adapter_mixer")
    settings, runs = record["settings"], record["runs"]
    names, steps = settings["adapters"], settings["weights"]
    if len(weights) != len(names):
        raise ValueError(f"weights={tuple(weights)}: give one for each of {', '.join(names)}.")
    start = [min(steps, key=lambda step: abs(step - weight)) for weight in weights]
    losses = [key for key in runs[0] if key not in ("weights", "text")]
    data = {"title": title, "names": names, "steps": steps, "prompt": settings["prompt"], "losses": losses,
            "points": {key(run["weights"]): {"text": run["text"], "losses": [run[name] for name in losses]}
                       for run in runs}}
    state = dict(zip(names, start))
    now, base = (data["points"][key(each)]["losses"] for each in (start, [0.0] * len(names)))
    bars = {f"{name}, {where}": loss for name, *both in zip(losses, now, base)
            for where, loss in zip(("mixed", "fable alone"), both)}
    return Lab("adapter_mixer", data, state, in_words(data, start), plot_bars(bars, title))


def key(weights: list[float]) -> str:
    """How a setting is called in the data: "1,0.25,0"."""
    return ",".join(f"{weight:g}" for weight in weights)


def in_words(data: dict, weights: list[float]) -> str:
    point = data["points"][key(weights)]
    turned = ", ".join(f"{name} {weight:g}" for name, weight in zip(data["names"], weights))
    losses = ", ".join(f"{name} {loss:.2f}" for name, loss in zip(data["losses"], point["losses"]))
    return f"{turned}; losses in nats per token: {losses}. {data['prompt']} {point['text'].strip()}"
