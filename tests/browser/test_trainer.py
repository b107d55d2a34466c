"""The live trainer: its module in a page whose kernel is the test, and the whole of it in a real JupyterLab."""
import re
import time

import pytest

from lora_edu.course import lessons
from lora_edu.course.labs.trainer import live_trainer
from lora_edu.course.records.real import recorded_paths
from lora_edu.models.pretrained import load_pretrained
from tests.browser.conftest import FASTEST, TOO_WIDE

pytestmark = pytest.mark.browser

TRAINER = """
from IPython.display import display
from lora_edu.course import live_trainer
box = live_trainer()
"""


@pytest.fixture(scope="module")
def trainer():
    return live_trainer()


@pytest.fixture
def page(trainer, open_lab):
    return open_lab(trainer, width=1024, height=700)


def said(page) -> str:
    return page.locator(".say").inner_text()


def run(done=10, complete=False, name="r 8", **more) -> dict:
    points = [[0, 4.15, 3.1], [10, 1.5, 3.6]][:1 + (done >= 10)]
    return {"name": name, "look": 0, "done": done, "steps": 100, "losses": [4.0 - 0.1 * i for i in range(done)],
            "points": points, "sigma": [2.0, 1.0], "watched": "model.layers.2.self_attn.o_proj", "sample": None,
            "prompt": "name: Clover", "score": None, "judged": "slots right", "asked": 40, "diverged": None,
            "complete": complete, "skipped": 0} | more


def tell(page, now=None, earlier=(), problem="", ended=False):
    page.evaluate("(runs) => window.tell('runs', runs)", {"now": now, "earlier": list(earlier), "problem": problem,
                                                          "ended": ended})


def sent(page) -> list:
    return [message["do"] for message in page.evaluate("() => window.sent")]


def answer(page, done="tick", stop=False):
    page.evaluate("(message) => window.tell('message', message)", {"done": done, "stop": stop})


def test_play_sends_a_tick_only_after_the_answer_and_pause_stops(page):
    play = page.get_by_role("button", name="Play")
    play.click()
    assert sent(page) == ["tick"] and page.get_by_role("button", name="Pause").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Step").click()
    page.get_by_role("button", name="Play").click()
    page.wait_for_timeout(200)
    assert sent(page) == ["tick"], "nothing else before the answer"
    tell(page, run(3))
    answer(page)
    page.wait_for_function("() => window.sent.length === 2")
    page.get_by_role("button", name="Pause").click()
    answer(page)
    page.wait_for_timeout(200)
    assert sent(page) == ["tick", "tick"] and "step 3 of 100" in said(page)


def test_a_kernel_that_is_busy_is_named_and_one_that_was_interrupted_pauses(page):
    page.get_by_role("button", name="Play").click()
    page.get_by_text("waiting for the kernel: it measures, or runs another cell").wait_for()
    tell(page, run(12), problem="interrupted at step 12; press Play to go on")
    answer(page, stop=True)
    assert said(page).startswith("interrupted at step 12; press Play to go on")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => window.sent.length === 2")
    assert page.get_by_role("button", name="Pause").count(), "though the page still says that it was interrupted"
    answer(page)
    page.wait_for_function("() => window.sent.length === 3")


def test_the_end_of_a_run_stops_the_clock_and_an_ended_trainer_says_so(page):
    page.get_by_role("button", name="Play").click()
    tell(page, run(100, complete=True, score=0.5, sample=[100, "Clover is cheap."]))
    answer(page)
    page.wait_for_timeout(150)
    assert sent(page) == ["tick"] and page.get_by_role("button", name="Play").count()
    assert "Clover is cheap." in page.locator(".lora-lab").inner_text() and "slots right 50%" in said(page)
    tell(page, ended=True)
    assert said(page).startswith("this trainer has ended: its cell was run again")
    assert page.locator("[data-name=play]").get_attribute("aria-disabled") == "true"


def test_a_page_that_goes_away_stops_its_clock(page):
    page.get_by_role("button", name="Play").click()
    page.evaluate("() => window.end()")
    answer(page)
    page.wait_for_timeout(150)
    assert sent(page) == ["tick"]


def test_alpha_follows_the_rank_under_2r_and_is_locked(page):
    rank, alpha = page.get_by_role("slider", name="rank r"), page.get_by_role("slider", name="alpha")
    rank.press("End")
    assert alpha.get_attribute("aria-valuetext") == "alpha 128" and alpha.is_disabled()
    page.get_by_role("button", name="alpha fixed").click()
    assert alpha.is_enabled()
    alpha.press("Home")
    assert "scaling = alpha / r = 0.02" in said(page)
    assert page.evaluate("""() => { const { record } = window.model.get('data'), state = window.model.get('state');
        return [16, 8].map((alpha) => Boolean(window.lab.recorded(record, { ...state, alpha }))); }""") == [True, False]
    page.get_by_role("button", name="rsLoRA").click()
    assert "alpha 5.66" in said(page) and "scaling = alpha / √r = 0.71" in said(page), "the one of the record"


def test_the_record_is_drawn_pale_unless_the_reader_guesses_first(page, trainer):
    assert page.get_by_text("the record", exact=True).count() == 1
    cell = next(each for each in trainer.data["record"]["grid"] if (each["rule"], each["rank"], each["lr"]) ==
                ("2r", 8, 0.008) and each["task"] == "bistro")
    found = page.evaluate("() => window.lab.recorded(window.model.get('data').record, window.model.get('state')).path")
    assert found == cell["path"]
    page.get_by_role("slider", name="rank r").press("ArrowLeft")
    assert "the record has no run of this setting" in said(page)
    assert page.get_by_text("the record", exact=True).count() == 0
    page.get_by_role("slider", name="rank r").press("ArrowRight")
    page.get_by_role("button", name="guess first").click()
    assert page.get_by_text("the record", exact=True).count() == 0
    page.get_by_role("slider", name="my guess of the end").press("Home")
    tell(page, run(100, complete=True))
    assert "you guessed 0.00 at the end, it is 1.50" in said(page)
    assert page.get_by_text("the record", exact=True).count() == 1, "after the run it is shown"


def test_a_guess_can_be_drawn(page):
    page.get_by_role("button", name="guess first").click()
    box = page.locator("svg[role=img]").first.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    for share in (0.3, 0.6, 0.9):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 60 + 80 * share)
    page.mouse.up()
    drawn = page.evaluate("() => window.saved.at(-1).drawn")
    assert len(drawn) >= 3 and [step for step, _ in drawn] == sorted(step for step, _ in drawn)
    assert drawn[0][1] > drawn[-1][1], "down is a smaller loss"
    page.get_by_role("slider", name="my guess of the end").press("Home")
    assert page.evaluate("() => window.saved.at(-1).drawn") is None, "the slider takes over"
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 90)
    page.mouse.up()
    assert page.evaluate("() => window.saved.at(-1).drawn.length") > 0
    page.get_by_role("button", name="guess first").hover()
    tell(page, run(10, steps=200))                           # the axis is as long as the longest run
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 46 + (box["width"] - 58) / 4, box["y"] + 90)
    page.mouse.up()
    assert abs(page.evaluate("() => window.saved.at(-1).drawn.at(-1)[0]") - 50) <= 1
    page.get_by_role("button", name="documentation").click()
    assert page.evaluate("() => window.saved.at(-1).drawn") is None, "another task is another guess"


def test_controls_and_samples_are_above_the_fold(page):
    tell(page, run(25, name="r 64", look=1, sample=[25, "Clover is a house."]), [run(100, complete=True, score=0.5,
                                                                                 sample=[100, "Clover is cheap."])])
    for text in ("Clover is a house.", "Clover is cheap."):
        box = page.get_by_text(text).bounding_box()
        assert box["y"] + box["height"] < 500
    assert page.locator("svg[role=img]").first.bounding_box()["y"] < 500
    assert page.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_lesson_of_the_readers_is_in_no_record(open_lab):
    """A model's record knows restaurants; the page's other lesson runs by itself, and says so."""
    model, tokenizer = load_pretrained()
    page = open_lab(live_trainer(model, tokenizer, [lessons.orders(), lessons.restaurants(40)],
                                 record=recorded_paths("fable")), width=1024)
    assert "step 0 of 60: press Play, or Step" in said(page) and "1 row a step" in said(page)
    assert page.locator("path[opacity='0.45']").count() == 0
    page.get_by_role("button", name="restaurants").click()
    assert "the record has no run of this setting: it has rank 1, 16 with alpha 2r, rates" in said(page)
    assert "4 rows a step" in said(page)
    page.evaluate("() => window.tell('state', {...window.model.get('state'), rank: 16, alpha: 32, lr: 0.008})")
    assert "the record has no run" not in said(page) and page.locator("path[opacity='0.45']").count() == 2
    tell(page, run(10, judged="fields right", score=0.5, complete=True, steps=60))
    assert "plain text 3.600; fields right 50%" in said(page)


@pytest.mark.parametrize("width, dark", [(1440, False), (390, True)])
def test_it_fits_and_axe_finds_nothing_serious_and_a_move_is_answered_at_once(width, dark, trainer, open_lab):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_lab(trainer, width=width, dark=dark)
    page.get_by_role("button", name="guess first").click()
    tell(page, run(25), [run(100, complete=True, score=0.5)])
    found = axe.Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    assert page.evaluate(TOO_WIDE) == [] and page.evaluate(FASTEST) < 50


# -- in JupyterLab -----------------------------------------------------------------------------------------------------

def step(page) -> int:
    found = re.search(r"^(?:interrupted at )?step (\d+)", page.lab(0).locator(".say").inner_text())
    return int(found[1]) if found else -1


def wait_until(page, true, what: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"{what}. The page says: {page.lab(0).locator('.say').inner_text()}"
        page.page.wait_for_timeout(50)


@pytest.mark.full
def test_the_trainer_trains_is_interrupted_goes_on_and_survives_its_cell(open_cell):
    with open_cell(TRAINER) as page:
        page.run_all()
        play = page.lab(0).locator("[data-name=play]")
        play.click()
        wait_until(page, lambda: step(page) >= 3, "play: no steps")
        page.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt()")
        wait_until(page, lambda: "interrupted at step" in page.lab(0).locator(".say").inner_text(), "not interrupted")
        at = step(page)
        play.click()
        wait_until(page, lambda: step(page) > at, "play after an interrupt: it does not go on")
        page.lab(0).get_by_role("slider", name="rank r").press("ArrowLeft")
        old = "r 8, alpha 16 (2r), lr 0.008: "
        wait_until(page, lambda: old in page.lab(0).inner_text(), "no old curve")
        play.click()                                         # pause
        page.page.wait_for_timeout(500)
        now = step(page)
        page.page.wait_for_timeout(1000)
        assert step(page) == now, "after pause nothing moves"
        page.run_all()                                       # the cell again: another trainer, and no ghost
        assert step(page) == 0
        page.lab(0).locator("[data-name=step]").click()
        wait_until(page, lambda: step(page) == 1, "one step of the new trainer")
        assert page.errors() == []
        page.restart_kernel()
        page.run_all()
        page.lab(0).locator("[data-name=play]").click()
        wait_until(page, lambda: step(page) >= 2, "after a restart: no steps")
