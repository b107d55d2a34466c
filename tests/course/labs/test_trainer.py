"""The trainer without a browser: controls and clock are moved by their values, and the text says what happened."""
import ast
import functools
import random
import re
from pathlib import Path

import pytest

from lora_edu.course.labs import trainer
from lora_edu.course.labs.live_run import Lesson, LiveRun
from lora_edu.course.labs.trainer import CLOCK, RATES, Trainer, live_trainer
from lora_edu.course.records.stored import load_record
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro, corpora
from tests.lora.tiny import our_llama

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.fixture(scope="module")
def base():
    return our_llama(vocab_size=2048, positions=256, layers=1, kv_heads=2).eval()      # fable's vocabulary


@pytest.fixture(scope="module")
def lessons(base):
    tokenizer = load_pretrained()[1]
    tales = corpora.tales_from(base, tokenizer, n=2, length=8)
    heldout, records = bistro.heldout(tokenizer, 2, batch_size=2), bistro.cards("test", 4)

    def batches(steps, seed):
        return bistro.batches(tokenizer, steps, 1, seed)
    return {"bistro": Lesson(tokenizer, "=>", batches, heldout, tales, records),
            "python_docs": Lesson(tokenizer, "The", batches, heldout, tales, [])}


@pytest.fixture
def tr(base, lessons, monkeypatch):
    """A trainer of 12 steps on a tiny model, of which a tick does one piece of work."""
    advance = LiveRun.advance
    monkeypatch.setattr(LiveRun, "advance", lambda run, target=None, seconds=0.0: advance(run, target, seconds))
    monkeypatch.setattr(trainer, "TrainerPicture", picture)
    monkeypatch.setattr(trainer, "png", what_is_drawn)
    return Trainer(base, lessons.__getitem__, STEPS, "trained on a toy")


picture = functools.cache(trainer.TrainerPicture)     # building one takes long, and each draw sets all of its data


def what_is_drawn(fig) -> bytes:
    """In place of a PNG, which takes long: the data, limits and texts that one would show."""
    lines = [(ax.get_xlim(), ax.get_ylim(), [line.get_xydata().tolist() for line in ax.lines]) for ax in fig.axes]
    return repr((lines, [text.get_text() for text in fig.texts])).encode()


def said(tr) -> str:
    return re.sub("<[^>]*>", "", tr.text.value)


def step(tr) -> int:
    return int(re.search(r"^step (\d+) of \d+", said(tr), re.M)[1])


def tick(tr, count: int = 1, by: int = 1):
    for _ in range(count):
        tr.play.value += by


def play_to(tr, wanted: int):
    for _ in range(200):
        if step(tr) >= wanted:
            return
        tick(tr)
    raise AssertionError(f"200 ticks did not reach step {wanted}: {said(tr)}")


def play_out(tr):
    for _ in range(200):
        if tr.play.max == tr.play.value:
            return
        tick(tr)
    raise AssertionError("the trainer did not end: " + said(tr))


def state(tr):
    return bytes(tr.image.value), tr.text.value


def settings(tr) -> tuple:
    return tuple(control.value for control in tr.controls.values())


def test_it_starts_at_step_0_and_says_what_would_be_trained(tr):
    assert settings(tr) == ("bistro", "all-linear", "2r", 8, 16, 8e-3)
    count = 8 * (4 * (16 + 16) + 3 * (16 + 24))
    assert said(tr) == ("step 0 of 12: press play, or one step\nrestaurants, all-linear, r 8, alpha 16 (2r), lr "
                        f"0.008\nscaling = alpha / r = 2.00; {count:,} trainable parameters, {4 * count:,} bytes in "
                        "float32; trained on a toy")
    tick(tr)
    assert tr.run.report.trainable == count and tr.run.report.adapter_bytes == 4 * count


def test_playing_trains_and_pausing_stops(tr):
    pictures = set()
    for wanted in (1, 5, 10):
        play_to(tr, wanted)
        pictures.add(bytes(tr.image.value))
    assert len(pictures) == 3 and tr.run.losses[0] > tr.run.losses[-1]
    last, first = tr.run.points[-1], tr.run.points[0]
    assert (f"loss of the step's batch {tr.run.losses[-1]:.3f} nats per token; measured at step 10: held-out "
            f"{last.heldout:.3f} (before {first.heldout:.3f}), tales {last.tales:.3f} (before "
            f"{first.tales:.3f})") in said(tr).replace("&#x27;", "'")
    before = state(tr)
    assert state(tr) == before, "no tick, no step"


@pytest.mark.parametrize("by", [1, 3, 1000])
def test_which_ticks_arrive_does_not_matter(tr, base, lessons, by):
    """What the text and picture are at a step is a function of the step, whichever values the clock skips."""
    other = Trainer(base, lessons.__getitem__, STEPS, "trained on a toy")
    rng = random.Random(by)
    for each, moves in ((tr, lambda: tick(tr)),
                        (other, lambda: tick(other, by=by) if rng.random() < 0.7 else other.step_button.click())):
        each.seen = {}
        while not each.run or not each.run.complete:
            moves()
            each.seen.setdefault((step(each), each.run.complete), state(each))
    assert set(other.seen) <= set(tr.seen) and len(other.seen) > 5
    assert all(tr.seen[key] == value for key, value in other.seen.items())


def test_one_step_is_one_step_then_the_exam_goes_on_in_slices(tr):
    for wanted in range(1, STEPS + 1):
        tr.step_button.click()
        assert step(tr) == wanted
    assert "now the exam" in said(tr) and not tr.run.complete
    for _ in range(3):
        tr.step_button.click()
    assert "complete" in said(tr) and "slots right: 0% on 4 test prompts" in said(tr)


def test_at_the_end_the_clock_is_at_its_end_and_new_settings_wind_it_up(tr):
    play_out(tr)
    assert step(tr) == STEPS and tr.play.max == tr.play.value < CLOCK
    assert "complete; move a slider, or press reset" in said(tr)
    assert f"(written at step {STEPS})" in said(tr)
    tr.controls["rank"].value = 2
    assert tr.play.max == CLOCK and step(tr) == 0
    play_to(tr, 1)


def test_a_moved_slider_leaves_the_old_curve_and_starts_a_new_one(tr):
    play_to(tr, 5)
    old, kept = tr.run, [*tr.run.losses]
    tr.controls["lr"].value = 0.064
    assert step(tr) == 0 and "earlier: restaurants, all-linear, r 8, alpha 16 (2r), lr 0.008: 5 of 12 steps" in said(tr)
    play_out(tr)
    assert old.losses == kept and tr.run is not old and tr.run.losses[4] != kept[4]
    labels = [text.get_text() for _, text in tr.picture.names]
    assert labels[:3] == ["now: restaurants, all-linear, r 8, alpha 16 (2r), lr 0.064",
                          "restaurants, all-linear, r 8, alpha 16 (2r), lr 0.008", ""]
    assert list(tr.picture.batches[1].get_ydata()) == kept and list(tr.picture.batches[0].get_ydata()) == tr.run.losses


def test_the_picture_shows_what_the_run_found(tr):
    play_out(tr)
    points, picture = tr.run.points, tr.picture
    assert list(picture.heldout[0].get_xdata()) == [0, 10, 12]
    assert list(picture.heldout[0].get_ydata()) == [p.heldout for p in points]
    assert list(picture.paths[0].get_xdata()) == [p.tales for p in points] == list(tr.run.points[i].tales
                                                                                   for i in range(3))
    assert list(picture.sigma.get_ydata()) == tr.run.sigma and max(tr.run.sigma) > 0
    assert f"{tr.run.watched}: {tr.run.sigma[0]:.3g}, " in said(tr)
    assert (list(picture.star.get_xdata()), list(picture.star.get_ydata())) == ([points[0].tales], [points[0].heldout])
    looks = {(line.get_marker(), str(line.get_linestyle()), line.get_color()) for line in picture.heldout}
    assert len(looks) == len({marker for marker, *_ in looks}) == 6, "runs differ by more than colour"


def test_five_earlier_runs_stay_each_with_its_look(tr):
    for i, lr in enumerate(RATES[:8]):
        tr.controls["lr"].value = lr
        play_to(tr, 1)
    assert [said.lr for _, said, _ in tr.earlier] == RATES[2:7] and said(tr).count("earlier: ") == 5
    places = {said.lr: place for place, said, _ in tr.earlier}
    assert sorted(places.values()) == [1, 2, 3, 4, 5]
    tr.controls["lr"].value = RATES[8]
    assert all(places[said.lr] == place for place, said, _ in tr.earlier if said.lr in places)


@pytest.mark.parametrize("back", ["clock", "button"])
def test_going_back_resets_the_run_of_now(tr, back):
    play_to(tr, 3)
    first = state(tr)
    if back == "clock":
        tr.play.value = 0
    else:
        tr.reset_button.click()
    assert step(tr) == 0 and not tr.earlier
    play_to(tr, 3)
    assert state(tr) == first


def test_after_the_end_the_clock_can_be_started_again(tr):
    play_out(tr)
    tr.play.value = 0     # what pressing play at the end does in ipywidgets 8
    assert step(tr) == 0 and tr.play.max == CLOCK
    play_to(tr, 2)


def test_alpha_is_locked_to_twice_the_rank_and_the_lock_is_said(tr):
    alpha, rank, rule = (tr.controls[name] for name in ("alpha", "rank", "rule"))
    for value in (1, 16, 5):
        rank.value = value
        assert alpha.value == 2 * value and alpha.disabled and "scaling = alpha / r = 2.00" in said(tr)
    assert tr.lock_text.value == "<b>locked</b> to 2r"
    alpha.value = 7
    assert alpha.value == 10, "a locked alpha goes back"
    rule.value = "fixed"
    assert not alpha.disabled and tr.lock_text.value == "<b>free</b>"
    alpha.value, rank.value = 7, 4
    assert alpha.value == 7 and "scaling = alpha / r = 1.75" in said(tr)
    rule.value = "rslora"
    assert not alpha.disabled and "scaling = alpha / √r = 3.50" in said(tr)
    tick(tr)
    assert tr.run.sigma == [0.0] * 4
    assert {layer.scaling for layer in tr.run.model.modules() if hasattr(layer, "lora_A")} == {3.5}
    rule.value = "2r"
    assert alpha.value == 8 and alpha.disabled


def test_fifty_moves_during_play_leave_a_consistent_state(tr):
    rng = random.Random(0)
    choices = {"task": [*trainer.TASKS], "rule": [*trainer.RULES], "targets": [*PLACEMENTS], "lr": RATES,
               "rank": range(1, 17), "alpha": range(1, 33)}
    for _ in range(50):
        name = rng.choice(list(tr.controls))
        tr.controls[name].value = rng.choice(choices[name])
        if rng.random() < 0.5:
            tick(tr, rng.randint(1, 4))
        assert tr.setting == tr._read() and len(tr.earlier) <= 5 and "Error" not in said(tr)
        assert tr.controls["rule"].value != "2r" or tr.controls["alpha"].value == 2 * tr.controls["rank"].value
        assert str(tr.setting) in said(tr) and step(tr) == (tr.run.done if tr.run else 0)
    play_out(tr)
    fresh = LiveRun(tr.base, tr.setting.adapter, tr.lesson(tr.setting.task), STEPS)
    fresh.advance(seconds=float("inf"))
    assert (fresh.losses, fresh.points, fresh.sigma) == (tr.run.losses, tr.run.points, tr.run.sigma)


def test_a_drag_makes_no_model(tr, monkeypatch):
    made = []
    monkeypatch.setattr(trainer, "LiveRun", lambda *how: made.append(how) or LiveRun(*how))
    for rank in range(1, 16):
        tr.controls["rank"].value = rank
    assert made == []
    tick(tr)
    assert len(made) == 1 and made[0][1].rank == 15


def test_each_callback_draws_once(tr, monkeypatch):
    drawn = []
    monkeypatch.setattr(trainer, "png", lambda fig: drawn.append(fig) or b"")
    for act in (lambda: tick(tr), lambda: setattr(tr.controls["rank"], "value", 3), tr.step_button.click,
                tr.reset_button.click,
                lambda: tr.open("python_docs", "2r", 4, 8, 0.016)):
        drawn.clear()
        act()
        assert len(drawn) == 1


def test_divergence_is_said_in_words(tr, monkeypatch):
    monkeypatch.setattr(trainer.Setting, "adapter", property(lambda self: trainer.LoRASettings(8, 16.0, lr=1e30)))
    play_out(tr)
    assert re.search(r"^step (\d+) of 12: diverged at step \d+, the loss is no finite number any more; choose a "
                     r"smaller", said(tr))
    assert tr.play.max == tr.play.value and "nan" not in said(tr)
    tr.controls["lr"].value = 0.001
    assert step(tr) == 0 and tr.play.max == CLOCK


def test_an_error_is_the_text_and_ends_the_playing_until_a_reset(tr, monkeypatch):
    play_to(tr, 2)
    good = trainer.LiveRun.advance
    monkeypatch.setattr(LiveRun, "advance", lambda *_, **__: 1 / 0)
    tick(tr)
    assert said(tr).startswith("This run ended with an error: ZeroDivisionError: division by zero Press reset")
    assert tr.play.max == tr.play.value
    monkeypatch.setattr(LiveRun, "advance", good)
    tr.step_button.click()
    assert "ZeroDivisionError" in said(tr), "a run that broke off is not gone on with"
    tr.reset_button.click()
    assert "Error" not in said(tr) and tr.play.max == CLOCK
    play_to(tr, 2)


def test_a_picture_that_fails_is_said(tr, monkeypatch):
    monkeypatch.setattr(trainer, "png", lambda fig: 1 / 0)
    tick(tr)
    assert said(tr) == "This cannot be drawn: ZeroDivisionError: division by zero"


def test_what_a_sample_says_is_escaped(tr, monkeypatch):
    monkeypatch.setattr("lora_edu.course.labs.live_run.completions", lambda *_, **__: ["<script>"])
    play_to(tr, STEPS)
    assert "→ “&lt;script&gt;” (written at step 12)" in tr.text.value


def test_open_sets_every_control_in_one_move(tr):
    play_to(tr, 2)
    tr.open(task="python_docs", rule="fixed", rank=4, alpha=16.0, lr=0.032)
    assert settings(tr) == ("python_docs", "all-linear", "fixed", 4, 16, 0.032)
    assert len(tr.earlier) == 1 and step(tr) == 0 and "scaling = alpha / r = 4.00" in said(tr)
    assert not tr.controls["alpha"].disabled
    play_out(tr)
    assert "slots right" not in said(tr) and "The → “" in said(tr)
    tr.open("bistro", "2r", 16, 32, 0.002)
    assert settings(tr) == ("bistro", "all-linear", "2r", 16, 32, 0.002) and tr.controls["alpha"].disabled
    assert len(tr.earlier) == 2


def test_the_button_of_the_map_can_open_every_corner_of_the_record():
    record, real = load_record("rank_alpha"), live_trainer(steps=1)
    rates = record["settings"]["rates"]
    corners = [run for run in record["grid"] if run["rank"] in (1, 64) and run["lr"] in (rates[0], rates[-1])]
    for run in corners:
        setting = {name: run[name] for name in ("task", "rule", "rank", "alpha", "lr")}
        real.open(**setting)
        assert {name: real.controls[name].value for name in setting} == setting
        assert real.setting.adapter.scaling == run["scaling"] and f"{run['trainable']:,} trainable" in real.text.value
    assert len(corners) == 16


@pytest.mark.parametrize("change, says", [
    ({"task": "poems"}, "the trainer has no task='poems': choose bistro or python_docs."),
    ({"rule": "half"}, "no rule='half': choose 2r or fixed or rslora."), ({"rank": 99}, "no rank=99: choose 1 to 16."),
    ({"lr": 0.003}, "no lr=0.003: choose 0.0005 or 0.001"),
    ({"rule": "fixed", "alpha": 0.5}, "no alpha=0.5: choose 1 to 32."),
    ({"alpha": 9}, "alpha=9 at rank 4 is not 2r: give alpha=8, or another rule."),
    ({"targets": "head"}, "no targets='head': choose all-linear or MLP or")])
def test_a_setting_that_does_not_exist_is_refused_and_changes_nothing(tr, change, says):
    play_to(tr, 1)
    before = state(tr), settings(tr)
    with pytest.raises(ValueError, match=re.escape(says)):
        tr.open(**{"task": "bistro", "rule": "2r", "rank": 4, "alpha": 8, "lr": 0.008} | change)
    assert (state(tr), settings(tr)) == before


def test_the_rates_are_factors_of_two():
    assert RATES == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128]


def test_on_fable_the_loss_falls():
    """The real thing, for two steps and their measurement."""
    fable = live_trainer(steps=2)
    while fable.play.max != fable.play.value and not (fable.run and fable.run.done == 2):
        tick(fable)
    assert bytes(fable.image.value)[:4] == b"\x89PNG"
    before, after = fable.run.points
    assert 3 < after.heldout < before.heldout - 0.1 and "of 2" in said(fable) and "name: " in said(fable)
    assert "156,160 trainable parameters, 624,640 bytes" in said(fable) and "8 rows a step" in said(fable)
    assert next(iter(fable.run.lesson.batches(1, 0)))[0].shape[0] == 8


def test_the_text_form_that_is_stored_holds_nothing_measured(tr):
    stored = repr(tr.box)[:110]     # what ipywidgets 7 and 8 store
    play_out(tr)
    assert repr(tr.box)[:110] == stored and "IntSlider" in stored


def test_only_widgets_that_both_versions_share_are_used():
    """Names and keywords of ipywidgets 7.7 and 8 alike: a wrong one fails silently in 7.7.

    No Dropdown, which an arrow key leaves.
    """
    tree = ast.parse(Path(trainer.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func).startswith("ipywidgets.")]
    allowed = {"Play": {"value", "min", "max", "step", "interval"}, "Image": {"format", "layout"},
               "Button": {"description", "layout"},
               "Layout": {"width", "max_width", "flex_flow"}, "HTML": set(), "HBox": {"layout"}, "VBox": set(),
               "ToggleButtons": {"options", "description", "style"},
               "SelectionSlider": {"options", "value", "description", "style"},
               "IntSlider": {"value", "min", "max", "description", "disabled"}}
    for call in calls:
        assert {keyword.arg for keyword in call.keywords} <= allowed[call.func.attr], ast.unparse(call)
