"""Sliders that answer one question: controls, one picture, one text.

The figure is built once; a control's callback changes the data of its lines, and the redrawn PNG goes into an Image
widget. That is all the machinery: no ``Output``, no ``interact``, no pyplot (each fails on one of JupyterLab, Colab
and nbval), and only what ipywidgets 7.7 (Colab) and 8 share.
"""
import threading
from html import escape

import ipywidgets
from matplotlib.figure import Figure

from lora_edu.course.page.show import png


def picture_with_controls(fig: Figure, update, **controls) -> ipywidgets.VBox:
    """Put controls above a figure and a text; every change of a control redraws both.

    Args:
        fig: drawn once; its layout is computed here and then kept, which saves time in every redraw.
        update: ``update(name=value, ...)`` changes the figure's artists and returns the text, which says in words and
            numbers what the picture shows. An exception becomes the text: a callback has no other place to show it.
        controls: the widgets, by the names that ``update`` takes.

    Returns:
        A VBox of [box of the controls, Image, HTML].
    """
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    # its own size: stretched over the page it would push the text out of sight
    width = f"{round(fig.get_figwidth() * fig.dpi)}px"
    image, text = ipywidgets.Image(format="png",
                                   layout=ipywidgets.Layout(width=width, max_width="100%")), ipywidgets.HTML()
    one_at_a_time = threading.Lock()   # JupyterLab may run two controls' callbacks in two threads of its own

    def redraw(change=None):
        with one_at_a_time:
            try:
                said = update(**{name: control.value for name, control in controls.items()})
                image.value = png(fig)
            except Exception as error:
                said = (f"This setting cannot be drawn: {type(error).__name__}: "
                        f"{error} (The picture is of the setting before.)")
            text.value = f'<div role="status" style="white-space: pre-wrap; line-height: 1.5">{escape(said)}</div>'

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    return ipywidgets.VBox([row, image, text])
