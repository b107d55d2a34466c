"""compile=True: the same numbers, no graph break in what is compiled, and a sentence where there is no compiler."""
import pytest
import torch

from lora_edu import LoRALinear, LoRASettings, LoRAStack, apply_lora, lora_parameters, merge_lora, train
from lora_edu.training import compiled
from lora_edu.training.compiled import padded
from lora_edu.training.loop import loss_on
from tests.lora.tiny import our_llama

real_compile = torch.compile


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def strict(seen=None):
    """torch.compile that raises at a graph break and builds no C++; `seen` gets an entry for each graph."""
    def backend(graph, example_inputs):
        if seen is not None:
            seen.append(graph)
        return graph.forward
    return lambda what, **how: real_compile(what, fullgraph=True, backend=backend, **how)


def adapted(seed=0):
    torch.manual_seed(5)
    model = our_llama(vocab_size=64)
    torch.manual_seed(seed)
    apply_lora(model, rank=2)
    return model


def batches(lengths=(9, 12, 16, 25, 31, 9)):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(64, (3, length + 1), generator=generator) for length in lengths]
    return [(each[:, :-1], each[:, 1:]) for each in rows]


def both(monkeypatch, compile_with):
    """In float64, so that what differs is no rounding of this CPU's."""
    monkeypatch.setattr(torch, "compile", compile_with)
    plain, fast = adapted().double(), adapted().double()
    losses = [[step.loss for step in train(model, batches(), 6, 0.02, compile=compiled)]
              for model, compiled in ((plain, False), (fast, True))]
    return plain, fast, losses


def test_the_numbers_are_those_of_the_plain_loop_and_a_multiple_of_16_is_compiled_once(monkeypatch):
    graphs = []
    plain, fast, losses = both(monkeypatch, strict(graphs))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for one, other in zip(lora_parameters(plain), lora_parameters(fast), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2          # rows of 16 and of 32 tokens


@pytest.mark.full
def test_the_same_with_the_real_compiler(monkeypatch, recwarn):
    _, _, losses = both(monkeypatch, real_compile)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not [str(each.message) for each in recwarn if "does not work" in str(each.message)]


def test_rows_are_filled_up_where_no_loss_counts():
    inputs, targets = padded(*batches((17,))[0])
    assert inputs.shape == targets.shape == (3, 32) and (targets[:, 17:] == -100).all()
    model = adapted().eval()
    torch.testing.assert_close(loss_on(model, (inputs, targets)), loss_on(model, batches((17,))[0]))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_graph_break_in_a_layer_or_a_model_with_lora(merged, dtype):
    layer, model = LoRALinear(6, 4, rank=2), adapted()
    if merged:
        layer.eval().merge()
        merge_lora(model.eval())
    for module, x in ((layer, torch.randn(3, 6)), (model, batches()[0][0])):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            torch.testing.assert_close(strict()(module)(x), module(x))


def test_no_graph_break_in_a_stack():
    torch.manual_seed(0)
    model = our_llama(vocab_size=64)
    stack = LoRAStack(model, [LoRASettings(2), LoRASettings(3, seed=1)])
    ids = batches((8,))[0][0].repeat(2, 1)
    torch.testing.assert_close(strict()(stack.model)(ids), stack.model(ids))


def no_compiler(compute, **how):
    def called(*args):
        raise RuntimeError("Failed to find C++ compiler.\nmore")
    return called


def too_new(compute, **how):
    raise RuntimeError("torch.compile is not supported on Python 3.99+")


@pytest.mark.parametrize("broken, said", [(no_compiler, "Failed to find C\\+\\+ compiler"), (too_new, "Python 3.99")])
def test_without_a_compiler_one_sentence_and_the_plain_loop(broken, said, monkeypatch):
    with pytest.warns(UserWarning, match=f"torch.compile does not work here .*{said}") as warned:
        _, _, losses = both(monkeypatch, broken)
    assert losses[0] == losses[1] and len(warned) == 1


def test_the_readers_own_error_is_not_the_compilers(monkeypatch, recwarn):
    monkeypatch.setattr(torch, "compile", strict())
    with pytest.raises(ValueError, match="not in the model's vocabulary"):
        list(train(adapted(), [(torch.full((2, 4), 99), torch.zeros(2, 4, dtype=torch.long))], 1, 0.1, compile=True))
    with pytest.raises(ValueError, match="a batch is a pair"):
        list(train(adapted(), [{"input_ids": torch.zeros(2, 4), "labels": torch.zeros(2, 4)}], 1, 0.1, compile=True))
    assert not list(recwarn)
    assert compiled.MULTIPLE == 16
