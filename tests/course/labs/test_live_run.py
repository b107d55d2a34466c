"""A live run against the plain loop; and what it finds depends on the steps done alone, however it is advanced."""
import copy
import math
import time

import numpy as np
import pytest
import torch

from lora_edu.course.labs import live_run
from lora_edu.course.labs.live_run import LiveRun, Plan, Point, middle, singular_values
from lora_edu.lora.factors import lora_layers
from lora_edu.lora.inject import apply_lora
from lora_edu.lora.settings import LoRASettings
from lora_edu.models.pretrained import load_pretrained
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import evaluate, train
from lora_edu.training.loss_scale import LossScale
from tests.lora.tiny import our_llama

pytestmark = pytest.mark.slow

ADAPTER = LoRASettings(rank=3, alpha=6.0, lr=0.05, seed=4)
STEPS = 27      # measured at 10, 20, 27; sampled at 25, 27


@pytest.fixture(scope="module")
def base():
    return our_llama(vocab_size=2048, positions=256).eval()      # fable's vocabulary


@pytest.fixture(scope="module")
def lesson(base):
    tokenizer = load_pretrained()[1]
    cards = bistro.cards("test", 6)
    return Plan(tokenizer, bistro.prompt(bistro.cards("valid", 1)[0]),
                lambda steps, seed: bistro.batches(tokenizer, steps, 2, seed),
                bistro.heldout(tokenizer, 7, batch_size=3),
                corpora.tales_from(base, tokenizer, n=3, length=8, batch_size=2),
                [bistro.prompt(card) for card in cards], lambda texts: bistro.slot_accuracy(texts, cards).slots)


def found(run) -> tuple:
    return (
        run.done,
        tuple(run.losses),
        tuple(run.points),
        tuple(run.samples),
        tuple(run.sigma),
        run.score,
        run.diverged,
        run.complete,
    )


def finished(run):
    run.advance(seconds=math.inf)
    return run


@pytest.fixture(scope="module")
def whole(base, lesson):
    return finished(LiveRun(base, ADAPTER, lesson, STEPS))


def test_the_losses_are_those_of_the_plain_loop(base, lesson, whole):
    """Oracle: `train` on a model wrapped by hand, measured by `evaluate` on all batches at once."""
    model = copy.deepcopy(base)
    torch.manual_seed(4)
    apply_lora(model, "all-linear", rank=3, alpha=6.0)
    points = [Point(0, evaluate(model, lesson.heldout), evaluate(model, lesson.plain))]
    losses = []
    for step in train(model, bistro.batches(lesson.tokenizer, STEPS, 2, 4), STEPS, 0.05):
        losses.append(step.loss)
        if step.step in (10, 20, 27):
            points.append(Point(step.step, evaluate(model, lesson.heldout), evaluate(model, lesson.plain)))
    assert whole.losses == losses and len(set(losses)) == STEPS and losses[-1] < losses[0]
    assert [p.step for p in whole.points] == [0, 10, 20, 27]
    assert np.allclose([(p.heldout, p.plain) for p in whole.points], [(p.heldout, p.plain) for p in points], rtol=1e-6)
    text = corpora.completions(model, lesson.tokenizer, [lesson.prompt], max_new_tokens=live_run.SAMPLE)[0]
    assert [step for step, _ in whole.samples] == [25, 27] and whole.samples[-1][1] == text
    update = dict(lora_layers(model))["model.layers.1.self_attn.o_proj"].delta_weight().detach().numpy()
    assert whole.watched == "model.layers.1.self_attn.o_proj"
    assert np.allclose(whole.sigma, np.linalg.svd(update, compute_uv=False)[:3], rtol=1e-4)


def piece_by_piece(run):
    while not run.complete:
        run.advance(seconds=0)
        yield


def step_by_step(run):
    for target in range(1, STEPS + 1):
        run.advance(target, seconds=math.inf)
        assert run.done == target
        yield
    run.advance(seconds=math.inf)
    yield


def odd_portions(run):
    for target in (4, 4, 3, 11, 24, 99):
        run.advance(target, seconds=math.inf)
        yield
    while not run.complete:
        run.advance(seconds=0.003)
        yield


def test_what_is_found_is_a_function_of_the_steps_done(base, lesson, whole):
    """Equal to the last bit, at every step and at the end, for every way of getting there."""
    seen: dict = {}
    for way in (step_by_step, piece_by_piece, odd_portions):
        run = LiveRun(base, ADAPTER, lesson, STEPS)
        for _ in way(run):
            state = seen.setdefault((run.done, run.complete), found(run))
            assert state == found(run)
        assert found(run) == found(whole)
    assert set(seen) >= {(step, False) for step in range(STEPS + 1)} | {(STEPS, True)}


def test_the_exam_is_written_a_few_prompts_at_a_time_and_scored(base, lesson, monkeypatch):
    """Oracle: texts of which 4 of 6 are a right sentence, and the others say nothing."""
    asked = []

    def write(model, tokenizer, prompts, max_new_tokens=None):
        if max_new_tokens == live_run.SAMPLE:          # a sample, and no part of the exam
            return [""]
        asked.append(len(prompts))
        return [right[prompt] for prompt in prompts]
    right = {bistro.prompt(record): text if i < 4 else ""
             for i, (record, text) in enumerate(bistro.examples("test", 6))}
    monkeypatch.setattr(live_run, "completions", write)
    run = LiveRun(base, ADAPTER, lesson, 2)
    run.advance(2, seconds=math.inf)
    assert (run.done, run.complete, run.score, asked) == (2, False, None, [])
    assert finished(run).score == pytest.approx(4 / 6) and asked == [4, 2]


def test_a_task_without_records_has_no_exam(base, lesson):
    run = finished(LiveRun(base, ADAPTER, Plan(**vars(lesson) | {"questions": []}), 2))
    assert run.score is None and run.complete and run.done == 2


def test_runs_on_one_base_leave_it_and_each_other_alone(base, lesson, whole):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    runs = [LiveRun(base, LoRASettings(**vars(ADAPTER) | {"lr": lr}), lesson, STEPS) for lr in (0.05, 0.2)]
    while not all(run.complete for run in runs):
        for run in runs:
            run.advance(seconds=0)
    assert found(runs[0]) == found(whole) != found(runs[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not list(lora_layers(base))
    shared, own = runs[0].model.model.embed_tokens.weight, base.model.embed_tokens.weight
    assert shared.data_ptr() == own.data_ptr(), "the base is shared, not copied"
    assert own.requires_grad and not shared.requires_grad, "a run freezes its own model, not the base"


def test_the_random_numbers_of_others_are_left_alone(base, lesson):
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    finished(LiveRun(base, ADAPTER, lesson, 1))
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("rslora, scaling", [(False, 12 / 4), (True, 12 / 2)])
def test_the_scaling_is_the_adapters(base, lesson, rslora, scaling):
    run = LiveRun(base, LoRASettings(rank=4, alpha=12.0, target_modules=("q_proj", "v_proj"), rslora=rslora), lesson)
    assert {name.rpartition(".")[2] for name, _ in lora_layers(run.model)} == {"q_proj", "v_proj"}
    assert {layer.scaling for _, layer in lora_layers(run.model)} == {scaling} and run.sigma == [0.0] * 4
    assert run.report.trainable == 2 * 4 * (16 + 16 + 16 + 8) and run.watched == "model.layers.1.self_attn.v_proj"


def test_an_absurd_rate_ends_the_run_in_a_step_that_is_named(base, lesson):
    run = LiveRun(base, LoRASettings(**vars(ADAPTER) | {"lr": 1e30}), lesson, STEPS)
    run.advance(seconds=math.inf)
    assert run.complete and run.diverged == run.done + 1 <= STEPS and run.score is None
    assert all(map(math.isfinite, (*run.losses, *run.sigma, *(p.heldout for p in run.points))))
    assert run.advance(seconds=math.inf) == run.done


def test_a_gpu_without_bfloat16_trains_in_float16_and_counts_the_steps_it_skipped(base, lesson, monkeypatch):
    """The arithmetic is a CPU's; the first two scales are too large for it."""
    monkeypatch.setattr(live_run, "train", lambda *args, **how: train(*args, **how | {"autocast": torch.float16}))
    monkeypatch.setattr(LossScale, "first", 2.0**40)
    run = LiveRun(base, ADAPTER, lesson, STEPS)
    run.advance(12, seconds=math.inf)
    assert run.done == 12 and 0 < run.skipped <= 12 and run.diverged is None


def test_a_slice_ends_near_its_time(base, lesson, monkeypatch):
    """A clock by hand: pieces of 0.06 s fit three times into 0.2 s (0.18 is nearer than 0.24), and one of 0.5 s
    once.
    """
    run, pieces = LiveRun(base, ADAPTER, lesson, STEPS), []
    for length, count in ((0.06, 3), (0.09, 2), (0.5, 1)):
        run._work = (pieces.append(length) for _ in range(99))
        monkeypatch.setattr(time, "perf_counter", lambda: sum(pieces))
        pieces.clear()
        run.advance()
        assert len(pieces) == count


def test_it_stops_after_the_piece_that_is_under_way(base, lesson, monkeypatch):
    run, pieces = LiveRun(base, ADAPTER, lesson, STEPS), []
    run._work = (pieces.append(1) for _ in range(99))
    run.advance(seconds=math.inf, stop=lambda: len(pieces) == 3)
    assert len(pieces) == 3


def test_a_lesson_may_say_how_often_is_measured_and_in_which_type(base, lesson, monkeypatch):
    seen = []
    monkeypatch.setattr(live_run, "train", lambda *args, **how: seen.append(how["autocast"]) or train(*args, **how))
    own = Plan(**vars(lesson) | {"every": 4, "autocast": torch.bfloat16})
    run = LiveRun(base, ADAPTER, own, 9)
    run.advance(seconds=math.inf)
    assert [point.step for point in run.points] == [0, 4, 8, 9] and seen == [torch.bfloat16]


def test_a_closed_run_keeps_what_it_found_and_does_no_more(base, lesson):
    run = LiveRun(base, ADAPTER, lesson, STEPS)
    run.advance(12, seconds=math.inf)
    before = found(run)
    run.close()
    assert run.advance(seconds=math.inf) == 12 and found(run)[:-1] == before[:-1] and run.model is None


@pytest.mark.parametrize("names, wanted", [
    ([f"layers.{i}.{kind}" for i in range(4) for kind in ("q_proj", "v_proj", "o_proj")], "layers.2.o_proj"),
    ([f"layers.{i}.{kind}" for i in range(4) for kind in ("q_proj", "v_proj")], "layers.2.v_proj"),
    ([f"layers.{i}.{kind}" for i in range(3) for kind in ("gate_proj", "up_proj")], "layers.1.gate_proj")])
def test_the_matrix_to_watch_is_in_the_middle(names, wanted):
    assert middle(names) == wanted


def test_the_singular_values_are_numpys(base):
    model = copy.deepcopy(base)
    apply_lora(model, ("up_proj",), rank=5, alpha=3.0)
    layer = dict(lora_layers(model))["model.layers.0.mlp.up_proj"]
    torch.nn.init.normal_(layer.lora_B)
    assert np.allclose(singular_values(layer),
                       np.linalg.svd(layer.delta_weight().detach().numpy(), compute_uv=False)[:5], rtol=1e-5)
    layer.lora_A.data[0, 0] = math.inf
    assert np.isnan(singular_values(layer)).all()


def test_what_does_not_fit_is_refused_in_a_sentence(base, lesson):
    with pytest.raises(ValueError, match="steps=0: a run needs at least 1 step"):
        LiveRun(base, ADAPTER, lesson, 0)
    with pytest.raises(ValueError, match="rank=99 does not fit"):
        LiveRun(base, LoRASettings(rank=99), lesson)
    short = Plan(**vars(lesson) | {"batches": lambda steps, seed: lesson.batches(3, seed)})
    with pytest.raises(ValueError, match="the batches ended after 3 steps"):
        finished(LiveRun(base, ADAPTER, short, STEPS))
