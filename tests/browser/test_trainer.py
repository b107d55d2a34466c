"""The live trainer in a real browser: play, pause, keys during play, reset, a kernel that was restarted; and
controls cut off.
"""
import re
import time

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.full]

TRAINER = """
from IPython.display import display
from lora_edu.course import live_trainer
trainer = live_trainer()
box = trainer.box
"""
DISCONNECTED = TRAINER + "trainer.play.unobserve_all()\ntrainer.controls['rank'].unobserve_all()\n"


def step(page) -> int:
    return int(re.search(r"^step (\d+) of 100", page.text(), re.MULTILINE)[1])


def batch_loss(page) -> float | None:
    found = re.search(r"loss of the step's batch ([\d.]+)", page.text())
    return float(found[1]) if found else None


def wait_until(page, true, what: str, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"{what}. The page says: {page.text()}"
        page.page.wait_for_timeout(50)


def press_play(page) -> None:
    """Play, or pause: one button."""
    page.page.locator(".widget-play button").first.click()


def check_play(page, timeout: float = 60) -> None:
    """Play trains: steps are done, the loss in the text falls, the picture changes."""
    pictures = page.settle()
    press_play(page)
    wait_until(page, lambda: batch_loss(page), "play: no step was done", timeout)
    first = batch_loss(page)
    wait_until(page, lambda: batch_loss(page) < first - 0.5, f"play: the loss did not fall from {first}", timeout)
    assert page.pictures() != pictures


def check_pause(page, timeout: float = 30) -> None:
    """After pause the tick under way may end; then nothing moves, and the kernel rests."""
    press_play(page)
    seen, end, busy = [step(page)], time.monotonic() + timeout, time.monotonic()
    while time.monotonic() < busy + 1:
        if step(page) != seen[-1]:
            seen.append(step(page))
        if not page.idle():
            busy = time.monotonic()
        assert len(seen) <= 2 and busy < end, f"pause: the steps shown afterwards were {seen}"
        page.page.wait_for_timeout(20)


def check_what_is_said(page) -> None:
    """The text's settings are those beside the sliders, and nothing went wrong."""
    rank, alpha, lr = page.page.locator(".jp-OutputArea-output .widget-readout").all_inner_texts()
    assert f", r {rank}, alpha {alpha} (2r), lr {lr}" in page.text().splitlines()[1] and int(alpha) == 2 * int(rank)
    assert page.errors() == [] and not re.search("ended with an error|cannot be drawn", page.text()), page.text()


def check_keys_during_play(page, timeout: float = 60) -> None:
    """Fifty keys on the rank while it trains: the last setting is the one that is trained."""
    press_play(page)
    page.handle(0).focus()
    before = page.handle(0).get_attribute("aria-valuenow")
    for key in 5 * (7 * ["ArrowRight"] + 3 * ["ArrowLeft"]):
        page.page.keyboard.press(key)
    wait_until(page, lambda: step(page) >= 2, "keys during play: the last setting was not trained", timeout)
    assert page.handle(0).get_attribute("aria-valuenow") != before
    check_pause(page)
    check_what_is_said(page)


def test_the_trainer_trains_pauses_follows_its_sliders_and_survives_a_restart(open_cell):
    with open_cell(TRAINER) as page:
        page.run_all()
        assert step(page) == 0
        check_play(page)
        check_pause(page)
        check_what_is_said(page)
        done = step(page)
        page.click("one step")
        wait_until(page, lambda: step(page) == done + 1, "one step: not one step further", timeout=30)

        done, loss = step(page), batch_loss(page)
        page.check_slider(0)     # a new setting: the run so far stays, as it was
        assert f"r 8, alpha 16 (2r), lr 0.008: {done} of 100 steps, batch {loss:.3f};" in page.text()
        assert step(page) == 0
        check_keys_during_play(page)
        assert f"r 8, alpha 16 (2r), lr 0.008: {done} of 100 steps, batch {loss:.3f};" in page.text()

        page.click("reset")
        wait_until(page, lambda: step(page) == 0, "reset: not back at step 0", timeout=30)
        check_what_is_said(page)
        page.restart_kernel()
        page.run_all()
        assert step(page) == 0 and "earlier" not in page.text()
        check_play(page)


def test_a_trainer_whose_controls_are_cut_off_fails_the_same_checks(open_cell):
    """The proof that the checks can fail: the handle moves and the clock runs, and nothing answers them."""
    with open_cell(DISCONNECTED) as page:
        page.run_all()
        with pytest.raises(AssertionError, match="press: no picture changed"):
            page.check_slider(0, timeout=2)
        with pytest.raises(AssertionError, match="play: no step was done"):
            check_play(page, timeout=4)
