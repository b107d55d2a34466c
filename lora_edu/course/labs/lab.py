"""What every lab is in Python: data that goes over to the page once, a state, and what the cell says without a kernel.

The picture is drawn in the page, by an ES module that stands beside the lab's Python file (`alpha_dial.js` beside
`alpha_dial.py`), with the helpers of `kit.js` before it. So a control answers while the kernel is busy, and the same
module serves a page that has no kernel: it is given a model with `get`, `set`, `save_changes`, `on` and `off`, and an
element to draw in.
"""
import functools
import os
from html import escape
from pathlib import Path

import anywidget
import traitlets
from matplotlib.figure import Figure

from lora_edu.course.page.show import picture_html

HERE = Path(__file__).parent
MOVE = "Run this cell to move it."
KEEP = "application/vnd.lora-edu.lab+json"    # what the web page keeps of a lab, where this variable is set
# what stands between the helpers and a lab's own module
NEEDS = {"alpha_dial": ("dial",), "fable_live": ("dial", "fable_model")}


@functools.cache
def module(name: str) -> str:
    """The source of a lab's module: one text without imports."""
    return "\n".join((HERE / f"{part}.js").read_text(encoding="utf-8") for part in ("kit", *NEEDS.get(name, ()), name))


def ranks_up_to(most: int, *also: int) -> list[int]:
    """The ranks of a slider: every one up to 16, then four to a doubling; the largest, and those asked for.

    >>> ranks_up_to(40)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 24, 28, 32, 40]
    """
    return [r for r in range(1, most + 1) if r <= 16 or r in (most, *also) or r % (1 << r.bit_length() - 3) == 0]


class Lab(anywidget.AnyWidget):
    """A lab in the page.

    Args:
        name: of the module.
        data: what is drawn; JSON, and sent once.
        state: what the controls say, by name; the page sets it, and a page that is loaded again starts from it.
        said: the state in words and numbers, for the stored cell.
        picture: the state as a figure, for the stored cell; None: words alone.

    What a cell stores is a picture and its numbers, in place of a widget that needs a kernel: as HTML, which JupyterLab
    (an untrusted notebook too), Colab, VS Code, GitHub and nbconvert show.
    """

    _esm = traitlets.Unicode().tag(sync=True)
    data = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    _ipython_display_ = None        # ipywidgets 7 would show the widget alone

    def __init__(self, name: str, data: dict, state: dict, said: str, picture: Figure | None = None):
        super().__init__(_esm=module(name), data=data, state=state)
        self.name, self.said, self.picture = name, said, picture

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        shown = super()._repr_mimebundle_(**kwargs)
        data, metadata = shown if isinstance(shown, tuple) else (shown, {})
        words = f"{self.said}\n{MOVE}"
        page = (f"<p>{escape(words)}</p>" if self.picture is None
                else picture_html(self.picture, caption=words)).replace("\n", "<br>")
        asked = {KEEP: {"module": self.name, "data": self.data, "state": self.state}} if KEEP in os.environ else {}
        return data | {"text/plain": words, "text/html": page} | asked, metadata
