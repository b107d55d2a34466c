"""The trainer without a browser: the page's state is set, its messages are answered, and `runs` says what happened."""
import gc
import math
import random
import re
import signal
import time

import pytest
import torch

from lora_edu import apply_lora, load_adapter, lora_state_dict, quantize_, train
from lora_edu.course import lessons as lessons_of
from lora_edu.course.labs import live_run, trainer
from lora_edu.course.labs.live_run import LiveRun, Plan
from lora_edu.course.labs.trainer import RATES, Trainer, live_trainer, setting_of
from lora_edu.course.records.real import recorded_paths
from lora_edu.course.records.stored import load_record
from lora_edu.lora.inject import share_weights
from lora_edu.lora.settings import RULES
from lora_edu.lora.targets import PLACEMENTS
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import sixteen_bits
from lora_edu.course.tasks import TASKS
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
    heldout, cards = bistro.heldout(tokenizer, 2, batch_size=2), bistro.cards("test", 4)

    def batches(steps, seed):
        return bistro.batches(tokenizer, steps, 1, seed)
    return {"bistro": Plan(tokenizer, "=>", batches, heldout, tales, [bistro.prompt(card) for card in cards],
                           lambda texts: bistro.slot_accuracy(texts, cards).slots),
            "python_docs": Plan(tokenizer, "The", batches, heldout, tales)}


@pytest.fixture
def tr(base, lessons, monkeypatch):
    """A trainer of 12 steps on a tiny model, of which a tick does one piece of work."""
    advance = LiveRun.advance
    monkeypatch.setattr(LiveRun, "advance", lambda run, target=None, seconds=0.0, stop=lambda: False:
                        advance(run, target, 0.0 if seconds == 0.2 else seconds, stop))
    return Trainer(base, lambda name, like: lessons[name], STEPS, "trained on a toy")


def ask(tr, what: str = "tick") -> dict:
    """A message of the page, and the answer."""
    said = []
    tr.send = said.append
    tr._handle_custom_msg({"do": what}, [])
    return said[0]


def play_to(tr, wanted: int):
    for _ in range(300):
        if tr.run and tr.run.done >= wanted:
            return
        ask(tr)
    raise AssertionError(f"300 ticks did not reach step {wanted}: {tr.runs}")


def play_out(tr):
    for _ in range(300):
        if tr.run and tr.run.complete:
            return
        ask(tr)
    raise AssertionError(f"the trainer did not end: {tr.runs}")


def move(tr, **values):
    tr.state = tr.state | values


def test_it_starts_with_nothing_done_and_says_what_would_be_trained(tr):
    assert setting_of(tr.state)[:6] == ("bistro", "all-linear", "2r", 8, 16, 8e-3) and not tr.state["like"]
    assert tr.runs == {"now": None, "earlier": [], "problem": "", "ended": False}
    count = 4 * (16 + 16) + 3 * (16 + 24)
    ask(tr)
    assert tr.data["counts"]["all-linear"] == count and tr.run.report.trainable == 8 * count
    assert tr._repr_mimebundle_()[0]["text/plain"].startswith("restaurants, r 8, alpha 16 (2r), lr 0.008: press Play")


def test_what_is_told_is_what_the_run_found(tr):
    play_out(tr)
    now, run = tr.runs["now"], tr.run
    assert now["losses"] == run.losses and now["losses"][0] > now["losses"][-1] and now["done"] == STEPS
    assert now["points"] == [[p.step, p.heldout, p.plain] for p in run.points]
    assert [step for step, *_ in now["points"]] == [0, 10, 12]
    assert now["sigma"] == run.sigma and max(run.sigma) > 0 and now["complete"] and now["score"] == 0
    assert now["sample"] == (12, run.samples[-1][1]) and now["prompt"] == "" and now["asked"] == 4


@pytest.mark.parametrize("by", [0.3, 0.7])
def test_how_often_is_asked_does_not_matter(tr, base, lessons, by):
    """What is shown at a step is a function of the step, whether by ticks or by single steps."""
    seen, rng = [], random.Random(1)
    for chance in (1.0, by):
        each, its = Trainer(base, lambda name, like: lessons[name], STEPS, "a toy"), {}
        while not each.run or not each.run.complete:
            ask(each, "tick" if rng.random() < chance else "step")
            its.setdefault((each.run.done, each.run.complete), each.runs["now"])
        seen.append(its)
    assert set(seen[1]) <= set(seen[0]) and len(seen[1]) > 5
    assert all(seen[0][key] == value for key, value in seen[1].items())


def test_one_step_is_one_step_then_the_exam_goes_on_in_slices(tr):
    for wanted in range(1, STEPS + 1):
        assert ask(tr, "step") == {"done": "step", "stop": False} and tr.run.done == wanted
    assert not tr.run.complete
    for _ in range(3):
        ask(tr, "step")
    assert tr.run.complete


def test_a_moved_control_leaves_the_old_curve_and_starts_a_new_one(tr):
    play_to(tr, 5)
    old, kept = tr.run, [*tr.run.losses]
    move(tr, lr=0.064)
    assert tr.run is None and tr.runs["now"] is None and old.model is None, "its model is freed"
    play_out(tr)
    (earlier,), now = tr.runs["earlier"], tr.runs["now"]
    assert earlier["losses"] == kept and now["losses"][4] != kept[4]
    assert (earlier["name"], now["name"]) == ("r 8, alpha 16 (2r), lr 0.008", "r 8, alpha 16 (2r), lr 0.064")
    assert earlier["look"] != now["look"], "another setting, another colour"


def test_a_new_run_keeps_the_finished_curve_and_its_colour(tr):
    play_out(tr)
    first = tr.runs["now"]
    ask(tr, "new")
    assert tr.runs["now"] is None and tr.runs["earlier"] == [first]
    play_to(tr, 3)
    assert tr.runs["now"]["look"] == first["look"] and tr.runs["now"]["losses"] == first["losses"][:tr.run.done]


def test_five_earlier_runs_stay_and_another_task_clears_them(tr):
    for lr in RATES[:8]:
        move(tr, lr=lr)
        play_to(tr, 1)
    assert [run["name"].rpartition(" ")[2] for run in tr.runs["earlier"]] == [f"{lr:g}" for lr in RATES[2:7]]
    move(tr, task="python_docs")
    assert tr.runs["earlier"] == [] and tr.runs["now"] is None
    play_to(tr, 1)
    assert tr.runs["now"]["look"] == 0 and tr.runs["now"]["score"] is None


def test_a_guess_is_no_setting(tr):
    play_to(tr, 2)
    run = tr.run
    move(tr, guess=0.5, hide=True, drawn=[[0, 4], [12, 1]])
    assert tr.run is run


def test_a_drag_makes_no_model(tr, monkeypatch):
    made = []
    monkeypatch.setattr(trainer, "LiveRun", lambda *how: made.append(how) or LiveRun(*how))
    for rank in range(1, 16):
        move(tr, rank=rank, alpha=2 * rank)
    assert made == []
    ask(tr)
    assert len(made) == 1 and made[0][1].rank == 15


def test_fifty_moves_during_play_leave_a_consistent_state(tr):
    rng = random.Random(0)
    offered = {"task": [*TASKS], "rule": [*RULES], "targets": [*PLACEMENTS], "lr": RATES, "rank": range(1, 17)}
    for _ in range(50):
        name = rng.choice(list(offered))
        move(tr, **{name: rng.choice(offered[name])})
        for _ in range(rng.choice((0, 1, 3))):
            ask(tr)
        assert tr.setting == setting_of(tr.state) and len(tr.earlier) <= 5 and tr.runs["problem"] == ""
    play_out(tr)
    fresh = LiveRun(tr.base, tr.setting.adapter, tr.plan(tr.setting.task, False), STEPS)
    fresh.advance(seconds=math.inf)
    assert (fresh.losses, fresh.points, fresh.sigma) == (tr.run.losses, tr.run.points, tr.run.sigma)


def test_an_interrupt_waits_for_the_piece_and_play_goes_on(tr, base, lessons):
    """Today's kernel sends SIGINT to the main thread while the tick is at work."""
    plain = LiveRun(base, tr.setting.adapter, lessons["bistro"], STEPS)
    plain.advance(seconds=math.inf)
    play_to(tr, 3)
    advance, before = LiveRun.advance, signal.getsignal(signal.SIGINT)

    def interrupted(run, *how):
        signal.raise_signal(signal.SIGINT)
        return advance(run, *how)
    LiveRun.advance = interrupted
    try:
        answer = ask(tr)
    finally:
        LiveRun.advance = advance
    assert answer == {"done": "tick", "stop": True}
    assert tr.runs["problem"] == f"interrupted at step {tr.run.done}; press Play to go on"
    assert signal.getsignal(signal.SIGINT) is before, "the kernel's own handler is back"
    play_out(tr)
    assert tr.runs["now"]["losses"] == plain.losses and tr.runs["problem"] == ""


def test_an_interrupt_between_two_ticks_pauses_too(tr, monkeypatch):
    """A resting kernel ignores it, and a fifth of the time it rests."""
    class Loop:
        def call_later(self, seconds, act, *what):
            act(*what)
    monkeypatch.setattr(live_run.asyncio, "get_running_loop", Loop)
    before = signal.getsignal(signal.SIGINT)
    try:
        ask(tr)
        signal.raise_signal(signal.SIGINT)
        assert (ask(tr)["stop"], ask(tr)["stop"]) == (True, False), "and the next Play goes on"
        live_run.BETWEEN.append(time.monotonic() - 5)
        assert not ask(tr)["stop"], "one of long ago was not meant for the training"
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_is_said_and_a_new_run_goes_on(tr, monkeypatch):
    play_to(tr, 2)
    good = LiveRun.advance
    monkeypatch.setattr(LiveRun, "advance", lambda *_, **__: 1 / 0)
    assert ask(tr) == {"done": "tick", "stop": True}
    assert tr.runs["problem"].startswith("This run ended with an error: ZeroDivisionError: division by zero Press New")
    monkeypatch.setattr(LiveRun, "advance", good)
    ask(tr, "new")
    assert tr.runs["problem"] == ""
    play_to(tr, 2)


def test_divergence_is_told(tr, monkeypatch):
    monkeypatch.setattr(trainer.Setting, "adapter", property(lambda self: trainer.LoRASettings(8, 16.0, lr=1e30)))
    play_out(tr)
    assert tr.runs["now"]["diverged"] and all(map(math.isfinite, tr.runs["now"]["losses"]))


def test_a_trainer_made_again_ends_the_former_one(tr, base, lessons):
    play_to(tr, 2)
    model = tr.run.model
    other = Trainer(base, lambda name, like: lessons[name], STEPS, "a toy")
    assert tr.ended and tr.runs["ended"] and model is not None and tr.base is None and len(tr.runs["earlier"]) == 1
    assert ask(tr) == {"done": "tick", "stop": True} and tr.run is None
    with pytest.raises(ValueError, match="this trainer has ended"):
        tr.put_to("bistro", "2r", 4, 8, 0.008)
    play_to(other, 1)
    del other
    gc.collect()
    Trainer(base, lambda name, like: lessons[name], STEPS, "one more, though the last one is gone")


def test_put_to_sets_every_control_in_one_move(tr):
    play_to(tr, 2)
    tr.put_to(task="bistro", rule="fixed", rank=4, alpha=16, lr=0.032)
    assert setting_of(tr.state)[:6] == ("bistro", "all-linear", "fixed", 4, 16, 0.032) and len(tr.runs["earlier"]) == 1
    ask(tr)
    assert {layer.scaling for layer in tr.run.model.modules() if hasattr(layer, "lora_A")} == {4.0}


@pytest.mark.parametrize("change, says", [
    ({"task": "poems"}, "the trainer has no task='poems': choose bistro or python_docs."),
    ({"rule": "half"}, "no rule='half': choose 2r or fixed or rslora."), ({"rank": 99}, "no rank=99: choose 1 or 2 or"),
    ({"lr": 0.003}, "no lr=0.003: choose 0.0005 or 0.001"), ({"rule": "fixed", "alpha": 0.5}, "no alpha=0.5: choose 1"),
    ({"alpha": 10}, "alpha=10 at rank 4 is not 2r: give alpha=8, or another rule."),
    ({"targets": "head"}, "no targets='head': choose all-linear or MLP or")])
def test_a_setting_that_does_not_exist_is_refused_and_changes_nothing(tr, change, says):
    play_to(tr, 1)
    before = tr.state, tr.runs
    with pytest.raises(ValueError, match=re.escape(says)):
        tr.put_to(**{"task": "bistro", "rule": "2r", "rank": 4, "alpha": 8, "lr": 0.008} | change)
    assert (tr.state, tr.runs) == before


def test_the_rates_are_factors_of_two_and_every_cell_of_the_map_can_be_put_to():
    assert RATES == [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128]
    record, real = load_record("rank_alpha"), live_trainer(steps=1)
    for run in record["grid"]:
        real.put_to(**{name: run[name] for name in ("task", "rule", "rank", "alpha", "lr")})
        assert real.setting.adapter.scaling == pytest.approx(run["scaling"])
        assert real.setting.rank * real.data["counts"]["all-linear"] == run["trainable"]


def test_as_in_the_record_the_live_run_is_the_recorded_one():
    """Ten steps on fable against the path of the record, made on another day: its rows, its precision, its cards."""
    record, real = load_record("rank_alpha"), live_trainer()
    cell = next(run for run in record["grid"] if [run[name] for name in ("task", "rule", "rank", "lr")] ==
                ["bistro", "2r", 8, 0.008])
    assert real.state["like"] and real.data["record"]["grid"][0]["path"] == record["grid"][0]["path"]
    while not real.run or real.run.done < 10:
        real.work()
    step, train, valid = cell["path"][0]
    assert step == 10 and real.run.losses[9] == pytest.approx(train, abs=0.02)
    assert real.run.points[1].heldout == pytest.approx(valid, abs=0.02) and real.run.steps == 100
    assert real.run.plan.autocast is torch.bfloat16
    move(real, task="python_docs")
    real.work(1)
    assert real.run.steps == 50 and real.run.plan.every == 5
    assert real.run.points[0].heldout == pytest.approx(record["before"]["task"]["python_docs"]["valid"], abs=0.02)


def test_on_its_own_it_is_8_rows_on_a_cpu_in_float32():
    real = live_trainer(steps=2)
    move(real, like=False)
    while not real.run or real.run.done < 2:
        real.work()
    before, after = real.run.points
    assert 3 < after.heldout < before.heldout - 0.1 and real.run.plan.autocast is None
    assert next(iter(real.run.plan.batches(1, 0)))[0].shape[0] == 8
    assert "8 rows a step" in real.data["place"]["own"]


SUMS = lessons_of.from_pairs([(f"What is {n} and 1?", f"It is {n + 1}.") for n in range(40)], "sums")


def of_a_reader(model, tokenizer, record=None, **how):
    return live_trainer(model, tokenizer, [SUMS, lessons_of.restaurants(40)], record=record, **how)


def test_it_teaches_a_readers_model_a_readers_lesson(base, tmp_path):
    """The losses are those of the plain loop on the lesson's own batches; what is saved is what was learned."""
    tokenizer = load_pretrained()[1]
    tr = of_a_reader(base, tokenizer, steps=6)
    tr.put_to("sums", "2r", 4, 8, 0.004)
    with pytest.raises(ValueError, match="there is no run to save: press Play or Step first"):
        tr.save(tmp_path / "mine")
    for _ in range(6):
        tr.work(1)
    model = share_weights(base)
    torch.manual_seed(0)
    apply_lora(model, rank=4, alpha=8)
    own = [step.loss for step in train(model, SUMS.batches(tokenizer, 6, 0, rows=1), 6, 0.004,
                                       autocast=sixteen_bits(torch.device("cpu")))]
    assert tr.run.losses == own and tr.data["plain"] == "plain text"
    tr.save(tmp_path / "mine")
    again = share_weights(base)
    load_adapter(again, tmp_path / "mine")
    assert all(torch.equal(tensor, lora_state_dict(model)[name]) for name, tensor in lora_state_dict(again).items())
    while not tr.run.complete:
        tr.work()
    now = tr.runs["now"]
    assert now["judged"] == "answers right" and now["asked"] == 4 and now["score"] is not None
    assert now["prompt"] == SUMS.valid[0][0] and "1 row a step" in tr.data["place"]["own"]


def test_as_in_the_real_models_record_the_live_run_is_the_recorded_one():
    """Ten steps on fable against the path that the record's own code took, made on another day; measured there in 16
    bits.
    """
    model, tokenizer = load_pretrained()
    tr = live_trainer(model, tokenizer, [lessons_of.restaurants()], record=recorded_paths("fable"))
    cell = next(run for run in tr.data["record"]["grid"] if (run["rank"], run["lr"]) == (16, 0.008))
    tr.put_to("restaurants", "2r", 16, 32, 0.008)
    while not tr.run or tr.run.done < 10:
        tr.work()
    step, train_loss, valid = cell["path"][0]
    assert step == 10 and tr.run.steps == 60 and tr.run.losses[9] == pytest.approx(train_loss, abs=0.03)
    assert tr.run.points[1].heldout == pytest.approx(valid, abs=0.03)


def test_two_lessons_of_one_name_are_refused(base):
    with pytest.raises(ValueError, match=r"two of these lessons have one name \(sums, sums\)"):
        live_trainer(base, "a tokenizer", [SUMS, SUMS])


def test_another_architecture_offers_what_it_has():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=2, n_positions=256)).eval()
    tr = of_a_reader(model, load_pretrained()[1], steps=2)
    assert list(tr.data["counts"]) == ["all-linear"] and tr.data["ranks"][-1] == 16
    tr.work(1)
    assert tr.run.done == 1 and tr.runs["problem"] == "" and tr.run.report.trainable == 8 * tr.data["counts"][
        "all-linear"]


def test_a_models_record_is_drawn_and_its_own_protocol_kept(base):
    path = [[2, 3.0, 3.1], [4, 2.0, 2.2]]
    record = {"settings": {"rows": 3, "tasks": {"restaurants": {"steps": 4}}}, "ranks": [1], "rates": [0.002],
              "before": {"restaurants": 4.0}, "grid": [{"task": "restaurants", "rule": "2r", "rank": 1, "alpha": 2,
                                                        "lr": 0.002, "path": path}]}
    tr = of_a_reader(base, load_pretrained()[1], record)
    assert tr.state["like"] and tr.data["record"]["grid"][0]["path"] == path
    tr.put_to("restaurants", "2r", 1, 2, 0.002)
    tr.work(1)
    assert tr.run.steps == 4 and next(iter(tr.run.plan.batches(1, 0)))[0].shape[0] == 3
    tr.put_to("sums", "2r", 1, 2, 0.002)
    tr.work(1)
    assert tr.run.steps == 60 and next(iter(tr.run.plan.batches(1, 0)))[0].shape[0] == 1, "no record of this lesson"


def test_four_bits_are_taught_too(base):
    model = quantize_(share_weights(base), "nf4")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tr = of_a_reader(model, load_pretrained()[1], steps=2)
    tr.work(2)
    assert tr.run.done == 2 and tr.run.losses[0] != tr.run.losses[1]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("how", [{"tokenizer": None, "lessons": [SUMS]}, {"tokenizer": "x", "lessons": []}])
def test_a_model_without_a_tokenizer_or_a_lesson_is_a_sentence(base, how):
    with pytest.raises(ValueError, match="a model of yours needs its tokenizer and at least one lesson"):
        live_trainer(base, **how)
