"""A planted teacher is what it says, its lessons are its probabilities, and the loss of its students bends at its
rank.
"""
import copy

import numpy as np
import pytest
import torch

from lora_edu.lora.settings import LoRASettings
from lora_edu.lora.stack import LoRAStack
from lora_edu.course.planted import divergences, heldout_divergence, lessons, plant, told
from lora_edu.training.stacked import train_stack
from tests.lora.tiny import our_llama

MATRIX = "model.layers.1.mlp.down_proj"          # 16 x 24
TEXTS = torch.randint(50, (40, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base():
    """Louder than a new model: the matrix counts for what the model says."""
    model = our_llama().eval().requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        model.get_submodule(MATRIX.replace("down_proj", name)).weight.mul_(15)
    model.lm_head.weight.mul_(10)
    return model


def numpy_divergence(teacher, student, ids):
    """Mean over all positions of sum p (log p - log q), in float64."""
    with torch.no_grad():
        p, q = (model(ids).double().softmax(-1).numpy() for model in (teacher, student))
    return float(np.mean(np.sum(p * (np.log(p) - np.log(q)), -1)))


@pytest.mark.parametrize("rank", [1, 2, 6, 16])
def test_the_update_has_the_planted_rank_and_the_matrix_s_norm(rank, base):
    before = copy.deepcopy(base.state_dict())
    teacher = plant(base, MATRIX, rank, seed=3)
    W, planted = (model.get_submodule(MATRIX).weight.double().numpy() for model in (base, teacher))
    sigma = np.linalg.svd(planted - W, compute_uv=False)
    assert sigma[rank - 1] > 0.01 * sigma[0] and (sigma[rank:] < 1e-5 * sigma[0]).all()
    assert np.linalg.norm(planted - W) == pytest.approx(np.linalg.norm(W), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for (name, ours), theirs in zip(teacher.named_parameters(), base.parameters(), strict=True):
        # one storage: shared, not copied
        assert (ours.data_ptr() == theirs.data_ptr()) == (name != f"{MATRIX}.weight"), name


def test_the_seed_chooses_the_update(base):
    one, same, other = (plant(base, MATRIX, 2, seed).get_submodule(MATRIX).weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_the_matrix_cannot_have(rank, base):
    with pytest.raises(ValueError, match=f"rank={rank} does not fit the 16 x 24 matrix .*choose 1 to 16"):
        plant(base, MATRIX, rank)


def test_divergence_is_zero_for_the_teacher_and_numpys_otherwise(base):
    teachers = [plant(base, MATRIX, k, seed=k) for k in (1, 3)]
    assert heldout_divergence(teachers[0], [teachers[0]], TEXTS) == pytest.approx([0.0], abs=1e-7)
    want = [numpy_divergence(teacher, base, TEXTS) for teacher in teachers]
    assert min(want) > 0.02 and abs(want[0] - want[1]) > 1e-3
    assert heldout_divergence(base.train(), teachers, TEXTS, students=2) == pytest.approx(np.repeat(want, 2), rel=1e-4)
    assert base.training
    answers = torch.cat([told(teacher, TEXTS[:3]) for teacher in teachers])
    sums, counts = divergences(base, (TEXTS[:3].repeat(2, 1), answers), 2)
    assert counts.tolist() == [18, 18]
    assert (sums
            / counts).tolist() == pytest.approx([numpy_divergence(teacher, base, TEXTS[:3]) for teacher in teachers],
                                                rel=1e-4)


def test_a_lesson_is_the_same_rows_for_every_student_and_each_teachers_answers(base):
    teachers = [plant(base, MATRIX, k) for k in (1, 2)]
    made = list(lessons(teachers, TEXTS, steps=4, students=3, rows=5, seed=8))
    assert len(made) == 4 and not torch.equal(made[0][0], made[1][0])
    for ids, answers in made:
        assert ids.shape == (2 * 3 * 5, 6) and answers.shape == (30, 6, 50)
        groups = ids.view(6, 5, 6)
        assert all(torch.equal(group, groups[0]) for group in groups)
        assert all((row == TEXTS).all(1).any() for row in groups[0])
        for group, answer in enumerate(answers.view(6, 5, 6, 50)):
            torch.testing.assert_close(answer, told(teachers[group // 3], groups[0]))
        assert torch.allclose(answers.exp().sum(-1), torch.ones(30, 6))
    again = lessons(teachers, TEXTS, steps=4, students=3, rows=5, seed=8)
    assert all(torch.equal(a, b) for one, two in zip(made, again, strict=True) for a, b in zip(one, two))
    assert not torch.equal(next(lessons(teachers, TEXTS, 1, 3, 5, seed=9))[0], made[0][0])


def test_from_the_planted_rank_on_the_loss_is_far_lower(base):
    """Rank 3 is planted; ranks 1 to 4 learn it side by side. The known answer that the record shows on fable."""
    teacher, ranks = plant(base, MATRIX, 3, seed=1), (1, 2, 3, 4)
    stack = LoRAStack(base, [LoRASettings(rank, 2 * rank, (MATRIX,), lr=0.05) for rank in ranks])
    list(train_stack(stack, lessons([teacher], TEXTS[8:], 300, len(ranks), rows=8), 300, losses_of=divergences))
    found = dict(zip(ranks, heldout_divergence(base, [teacher], TEXTS[:8], len(ranks)), strict=True))
    print(found)
    assert found[1] > found[2] > 20 * found[3] and found[4] < found[2] / 20
    alone = numpy_divergence(teacher, stack.unstack(2), TEXTS[:8])
    assert found[3] == pytest.approx(alone, rel=0.05, abs=1e-6)
