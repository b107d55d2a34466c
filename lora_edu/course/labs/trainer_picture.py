"""What the live trainer shows: one picture and one text, both functions of the settings and the runs alone.

The figure is built once; `TrainerPicture.draw` changes its data. `words` says everything in it for those who do not see
it.
"""
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_edu.course.labs.live_run import LiveRun
from lora_edu.course.page.show import BLACK, BLUE, COLORS, DASHES, LABELS, MARKERS, new_figure

EARLIER = 5       # earlier runs that stay in the picture


def words(setting, run: LiveRun | None, earlier: list, steps: int, count: int, where: str) -> list[str]:
    """Lines of text: the step, the settings (a `trainer.Setting`), what was measured, and a line for each earlier run.

    Args:
        run: the run of now; None before its first tick.
        earlier: (its place in the picture, settings, run), oldest first.
        count: how many numbers train. where: a sentence on the device.
    """
    scaling = f"scaling = alpha / {'√r' if setting.rule == 'rslora' else 'r'} = {setting.adapter.scaling:.2f}"
    lines = [f"step {run.done if run else 0} of {steps}" + _ending(run), str(setting),
             f"{scaling}; {count:,} trainable parameters, {4 * count:,} bytes in float32; {where}"]
    return lines + (_measured(run) if run
                    and run.done else []) + [f"earlier: {said}: {_summary(each)}" for _, said, each in earlier]


def _ending(run: LiveRun | None) -> str:
    if run is None:
        return ": press play, or one step"
    if run.diverged:
        return (f": diverged at step {run.diverged}, the loss is no finite number any more; "
                "choose a smaller learning rate or alpha")
    if run.complete:
        return ": complete; move a slider, or press reset"
    return ": now the exam" if run.done == run.steps else ""


def _measured(run: LiveRun) -> list[str]:
    first, last, sigma = run.points[0], run.points[-1], [f"{value:.3g}" for value in run.sigma]
    lines = [f"loss of the step's batch {run.losses[-1]:.3f} nats per token; measured at step {last.step}: held-out "
             f"{last.heldout:.3f} (before {first.heldout:.3f}), tales {last.tales:.3f} (before {first.tales:.3f})",
             f"singular values of scaling · BA in {run.watched}: " + ", ".join(sigma[:8])
             + (f", … {sigma[-1]}" if len(sigma) > 8 else "")]
    if run.skipped:
        lines.append(f"{run.skipped} steps overflowed in float16 and were skipped")
    if run.samples:
        lines.append(f"{run.lesson.prompt.rstrip('=>').strip()} → “{run.samples[-1][1]}” (written at step "
                     f"{run.samples[-1][0]})")
    if run.slots is not None:
        lines.append(f"slots right: {run.slots:.0%} on {len(run.lesson.cards)} test prompts")
    return lines


def _summary(run: LiveRun) -> str:
    last = run.points[-1]
    return (f"{run.done} of {run.steps} steps, batch {run.losses[-1]:.3f}; at step {last.step} held-out "
            f"{last.heldout:.3f}, tales {last.tales:.3f}"
            + (f"; slots {run.slots:.0%}" if run.slots is not None else "")
            + (f"; diverged at step {run.diverged}" if run.diverged else ""))


class TrainerPicture:
    """One figure, and the artists whose data a redraw sets; the run of now is place 0, earlier ones are places 1 to
    5.
    """

    def __init__(self, steps: int):
        self.fig, (loss, self.spectrum, self.plane) = new_figure(width=9.2, height=3.7, columns=3)
        self.fig.set_dpi(90)
        self.width = f"{round(self.fig.get_figwidth() * self.fig.dpi)}px"
        loss.set(title="thin: batches; marked: held-out", xlabel=LABELS["step"], ylabel=LABELS["loss"],
                 xlim=(0, 1.02 * steps))
        self.spectrum.set(title="scaling · BA of one matrix", xlabel=LABELS["index"], ylabel=LABELS["sigma"],
                          ylim=(0, 99))
        self.plane.set(title="learned ↓   forgotten →", xlabel="loss on the tales", ylabel="held-out loss")
        self.loss, looks = loss, [_look(place) for place in range(EARLIER + 1)]
        self.batches = [loss.plot([], [], **look | {"linewidth": 0.7, "marker": None, "linestyle": "-"})[0]
                        for look in looks]
        self.heldout = [loss.plot([], [], **look)[0] for look in looks]
        self.paths = [self.plane.plot([], [], markevery=[-1], **look)[0] for look in looks]
        self.star, = self.plane.plot([], [], color=BLACK, marker="*", markersize=12, linestyle="none")
        self.sigma, = self.spectrum.plot([], [], color=BLUE, marker="o", markersize=4, linewidth=0.8)
        self._limits([8], [8], [99])
        # ticks are most of what a redraw costs
        for axis in (axis for ax in self.fig.axes for axis in (ax.xaxis, ax.yaxis)):
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter("{x:g}")
        self.fig.get_layout_engine().set(rect=(0, 0.2, 1, 0.8))
        self.fig.draw_without_rendering()
        self.fig.set_layout_engine("none")     # the places stay: a redraw takes half the time
        self.names = [self._name(place, look) for place, look in enumerate(looks)]

    def draw(self, setting, run: LiveRun | None, earlier: list) -> None:
        """Show the run of now and the earlier ones."""
        shown = {place: (str(said), each) for place, said, each in earlier} | {0: (f"now: {setting}", run)}
        for place, (handle, text) in enumerate(self.names):
            said, each = shown.get(place, ("", None))
            losses, points = (each.losses, each.points) if each else ([], [])
            self.batches[place].set_data(range(1, len(losses) + 1), losses)
            self.heldout[place].set_data([p.step for p in points], [p.heldout for p in points])
            self.paths[place].set_data([p.tales for p in points], [p.heldout for p in points])
            text.set_text(said)
            handle.set_visible(bool(said))
        starts = [each.points[0] for _, each in shown.values() if each and each.points]
        self.star.set_data([p.tales for p in starts], [p.heldout for p in starts])
        sigma = run.sigma if run else [0.0] * setting.rank
        self.sigma.set_data(range(1, len(sigma) + 1), sigma)
        runs = [each for _, each in shown.values() if each]
        self._limits([p.tales for each in runs for p in each.points],
                     [loss for each in runs for loss in (*each.losses, *(p.heldout for p in each.points))], sigma)

    def _name(self, place: int, look: dict) -> tuple:
        """A line of the legend under the panels, in two columns; a matplotlib legend lays itself out anew in every
        redraw.
        """
        x, y = 0.015 + 0.5 * (place % 2), 0.15 - 0.055 * (place // 2)
        handle = Line2D([x, x + 0.02, x + 0.04], [y] * 3, transform=self.fig.transFigure, markevery=[1], **look)
        return self.fig.add_artist(handle), self.fig.text(x + 0.05, y, "", va="center", fontsize=8)

    def _limits(self, tales: list, losses: list, sigma: list) -> None:
        """Axes that hold what is drawn, in whole numbers; a loss over 12 is off the picture, and in the text."""
        top, right = (min(12, int(max(values, default=4)) + 1) for values in (losses, tales))
        self.loss.set_ylim(0, top)
        self.plane.set(ylim=(0, top), xlim=(int(min(tales, default=2)) - 0.2, max(right, 5) + 0.2))
        self.spectrum.set(xlim=(0, len(sigma) + 1), ylim=(0, 1.1 * max(sigma) or 1))


def _look(place: int) -> dict:
    """Now: thick, blue, round. Earlier: thinner, each with its own colour, marker and dash."""
    return dict(color=COLORS[place], marker=MARKERS[place], linestyle=DASHES[place], markersize=6 if place == 0 else 4,
                linewidth=2 if place == 0 else 1.2, zorder=3 if place == 0 else 2)
