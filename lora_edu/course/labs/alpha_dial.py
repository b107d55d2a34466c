"""The alpha dial: turn an adapter from off to full, and watch what the model writes and two losses."""
import ipywidgets
import numpy as np

from lora_edu.course.figures.curves import plot_two_losses
from lora_edu.course.page.widgets import picture_with_controls


def alpha_dial(alphas, task_loss, tales_loss, texts, title: str = "One dial, two losses",
               alpha: float | None = None) -> ipywidgets.VBox:
    """A slider over the strength of an adapter: the text the model writes there, and the two losses with a marker.

    Args:
        alphas: evenly spaced settings, in rising order, for example 0, 0.05, ..., 1.
        task_loss, tales_loss: one loss for each setting, in nats per token.
        texts: one text for each setting, or a function ``texts(alpha) -> str``.
        alpha: where the dial starts; the largest setting if it is not given.

    Raises:
        ValueError: if the lengths differ, or ``alphas`` is not a rising, evenly spaced list of at least two settings.
    """
    alphas = np.asarray(alphas, dtype=float)
    lengths = {len(alphas), len(task_loss), len(tales_loss), len(alphas) if callable(texts) else len(texts)}
    steps = np.diff(alphas)
    if len(lengths) > 1 or len(alphas) < 2 or not np.allclose(steps, steps[0]) or steps[0] <= 0:
        raise ValueError(f"alpha_dial got {len(alphas)} alphas, {len(task_loss)} and {len(tales_loss)} losses"
                         + ("" if callable(texts) else f" and {len(texts)} texts") +
                         ": give at least two evenly spaced rising alphas, and as many of each other.")
    start = alphas[-1] if alpha is None else alpha
    fig = plot_two_losses(alphas, task_loss, tales_loss, title, alpha=start)
    line, markers = (artist for artist in fig.axes[0].lines if artist.get_gid() == "here")

    def update(alpha):
        i = int(np.abs(alphas - alpha).argmin())
        line.set_xdata([alphas[i]] * 2)
        markers.set_data([alphas[i]] * 2, [task_loss[i], tales_loss[i]])
        written = texts(float(alphas[i])) if callable(texts) else texts[i]
        return (f"strength {alphas[i]:.2f}: new task {task_loss[i]:.2f}, "
                f"tales {tales_loss[i]:.2f} nats per token\n{written}")

    dial = ipywidgets.FloatSlider(value=float(start), min=float(alphas[0]), max=float(alphas[-1]),
                                  step=float(round(alphas[1] - alphas[0], 9)), description="strength")
    return picture_with_controls(fig, update, alpha=dial)
