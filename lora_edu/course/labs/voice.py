"""One line of text that a model goes on writing while the hand turns its adapter: every word keeps the colour of the
strength at which it was written.
"""
from html import escape

import ipywidgets
import torch
from torch import nn

from lora_edu.course.page.show import BLUE
from lora_edu.lora.merge import merge_lora, set_strength, unmerge_lora
from lora_edu.models.bridge import end_token

PIECE, ROOM = 14, 260                            # tokens written at a turn of the slider, and in all
STORY, WAITER = bytes.fromhex(BLUE[1:]), bytes.fromhex("B34A00")     # a vermillion that is dark enough for text
FULL, LOUDEST = 1.0, 1.2                         # beyond it words break


def colour(strength: float) -> str:
    """Between the two as the strength is between 0 and 1."""
    share = min(max(strength, 0.0), FULL)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(STORY, WAITER))


class Line:
    """What has been written so far: [(text, strength or None for the prompt)]. Each piece is drawn with the seed and
    its place alone, so the same turns give the same line.
    """

    def __init__(self, model: nn.Module, tokenizer, prompt: str, seed: int = 1):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.ids = torch.tensor([tokenizer.encode(prompt).ids])
        self.pieces: list[tuple[str, float | None]] = [(prompt, None)]
        self.ended = not self.ids.numel()

    def write(self, strength: float, tokens: int = PIECE) -> None:
        """Go on for so many tokens, or to the end token; nothing more after that."""
        if self.ended:
            return
        before, end = self.ids.shape[1], end_token(self.tokenizer)
        if before >= ROOM:
            self.pieces.append((f" (A prompt of {before} tokens: shorten it to under {ROOM}.)", None))
            self.ended = True
            return
        self.ids = self.model.generate(self.ids, min(tokens, ROOM - before), temperature=0.6, top_k=20,
                                       seed=self.seed + before, stop_token=end).cpu()
        said = self.tokenizer.decode(self.ids[0, :before].tolist())
        whole = self.tokenizer.decode(self.ids[0].tolist())
        self.pieces.append((whole[len(said):], strength))
        self.ended = end in self.ids[0, before:].tolist() or self.ids.shape[1] >= ROOM

    def html(self) -> str:
        """The line, large; underlined the thicker the stronger, for who does not see the colours."""
        spans = [f'<span title="prompt" style="color:#555">{escape(text)}</span>' if strength is None else
                 f'<span title="strength {strength:.1f}" style="color:{colour(strength)};border-bottom:'
                 f'{round(3 * strength)}px solid {colour(strength)}">{escape(text)}</span>'
                 for text, strength in self.pieces]
        return (f'<div role="status" style="font-size:1.5em;line-height:1.6;max-width:42em">{"".join(spans)}'
                f'{" ∎" if self.ended else " …"}</div>')


def controls(prompt: str, start: float) -> tuple[ipywidgets.Widget, ...]:
    """Slider, prompt, write on, begin again, merge."""
    slider = ipywidgets.FloatSlider(value=start, min=0.0, max=LOUDEST, step=0.1, description="storyteller",
                                    continuous_update=False, readout_format=".1f",
                                    layout=ipywidgets.Layout(width="28em"),
                                    style={"description_width": "initial"})
    own = ipywidgets.Text(value=prompt, description="prompt", continuous_update=False,
                          layout=ipywidgets.Layout(width="38em"))
    on, again = (ipywidgets.Button(description=text) for text in ("write on", "begin again"))
    merge = ipywidgets.ToggleButton(value=False, description="merge", icon="compress")
    return slider, own, on, again, merge


def voice(model: nn.Module, tokenizer, prompt: str = "Once upon a time there was a king who",
          start: float = 0.0, size: str = "") -> ipywidgets.VBox:
    """A slider from storyteller to waiter: where it is let go, the model writes on at that strength, and begins anew
    after an end. Buttons to write on, to begin again and to merge (the slider goes, the voice stays), and a field for a
    prompt of one's own.

    Args:
        model: carries an adapter of strength 1. The lab turns it, and gives it back unmerged only when asked to.
        size: of the adapter, in words, to stand beside the slider.
    """
    slider, own, on, again, merge = controls(prompt, start)
    page, note = ipywidgets.HTML(), ipywidgets.HTML()
    state: dict[str, Line] = {}

    def write(_=None):
        if "line" not in state or state["line"].ended:          # after an end, the next turn begins anew
            state["line"] = Line(model, tokenizer, own.value.strip() or prompt)
        state["line"].write(slider.value)
        page.value = state["line"].html()

    def begin(_=None):
        state.clear()
        write()

    def turn(_=None):
        set_strength(model, slider.value)
        write()

    def fold(change):
        (merge_lora if change["new"] else unmerge_lora)(model)
        slider.disabled = change["new"]
        merge.description = "unmerge" if change["new"] else "merge"
        note.value = (f"Merged at strength {slider.value:.1f}: there is nothing left to turn, and the voice stays."
                      if change["new"] else "Apart again, to the bit: turn it.")
        write()

    for widget, do, what in ((slider, turn, "value"), (merge, fold, "value"), (own, begin, "value")):
        widget.observe(do, what)
    on.on_click(write)
    again.on_click(begin)
    set_strength(model, start)
    begin()
    right = ipywidgets.HTML(f"waiter{f' &nbsp; (an adapter of {escape(size)})' if size else ''}")
    return ipywidgets.VBox([ipywidgets.HBox([slider, right]), page,
                            ipywidgets.HBox([on, again, merge], layout=ipywidgets.Layout(flex_flow="row wrap")),
                            own, note])
