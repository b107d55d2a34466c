"""What is rehearsed on the dry device: every public function, and a short path through every notebook.

    python tests/dry_run.py functions [SCENE...] [--plant]    --plant: the layer makes a tensor without a device
    python tests/dry_run.py notebooks [NN...]                every cell, in little time (shortened.py)

The functions run on the CPU as well, and both find the same numbers. Ends with os._exit, because torch's own way out
does not know the device; the status is 1 where something failed.
"""
import inspect
import json
import math
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["LORA_EDU_DEVICE"] = "dry"
os.environ["LORA_EDU_CACHE"] = os.devnull       # transformers loads in its own ways: notebook 03 without its weights
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tests.dry_device import DryTensor  # noqa: E402  changes torch: before any model is made

import lora_edu  # noqa: E402
from lora_edu.course import lessons, planted, tasks  # noqa: E402
from lora_edu.course.labs import live_run, merge_lab  # noqa: E402
from lora_edu.lora import layer, targets  # noqa: E402
from lora_edu.lora.conv import LoRAConv  # noqa: E402
from lora_edu.measure import memory_measured, operators, rounding, spectra, timing  # noqa: E402
from lora_edu.rivals import methods  # noqa: E402
from lora_edu.training import bistro, corpora, loop, stacked  # noqa: E402
from tests.shortened import shorten_everything  # noqa: E402

BATCH_SIZE, STEPS = 2, 2
CPU_ONLY = "CPU is enough"           # in the header of a notebook that puts nothing on a device
for module in (layer, targets):      # the wrapper is a subclass of Tensor, as a quantised weight is; a GPU's is none
    module.type = lambda x, of=type: nn.Parameter if isinstance(x, DryTensor) else of(x)


def fable(device, rank=0):
    model, tokenizer = lora_edu.load_pretrained()
    model.to(device)
    if rank:
        torch.manual_seed(0)
        lora_edu.apply_lora(model, rank=rank)
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("lora_B"):
                generator = torch.Generator().manual_seed(number)
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


def ids_of(tokenizer, text="Once upon a time there was a king"):
    return torch.tensor([tokenizer.encode(text).ids])


def layers(device):
    x = torch.ones(2, 3, 6, device=device)
    torch.manual_seed(0)
    made = lora_edu.LoRALinear(6, 4, rank=2).to(device)
    nn.init.ones_(made.lora_B)
    apart, conv = made(x), LoRAConv.wrap(nn.Conv1d(3, 4, 1).to(device), 2, 4)
    made.eval().merge()
    merged = made(x)
    made.unmerge()
    assert lora_edu.best_device().type == "dry"
    return apart, merged, made.delta_weight(), conv(x).shape[1], len(lora_edu.Llama.__mro__)


def training(device):
    model, tokenizer = fable(device, rank=2)
    batches = bistro.batches(tokenizer, STEPS, BATCH_SIZE)
    steps = list(lora_edu.train(model, batches, STEPS, lr=1e-2))
    more = lora_edu.fit(model, bistro.batches(tokenizer, STEPS, BATCH_SIZE), STEPS, lr=1e-2)
    tuned = tasks.full_fine_tune(steps=1) if device == "dry" else None
    assert tuned is None or next(tuned.parameters()).device.type == "cpu"
    return ([step.loss for step in steps + more], lora_edu.evaluate(model, bistro.heldout(tokenizer, 4)),
            len(lora_edu.layers_without_gradient(model)))


def adapters(device):
    model, tokenizer = fable(device, rank=2)
    ids = ids_of(tokenizer)
    factors = {name: tensor.clone() for name, tensor in lora_edu.lora_state_dict(model).items()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        optimizer = loop.adamw(model)
        size = lora_edu.save_adapter(model, folder, optimizer=optimizer, step=3)
        assert lora_edu.load_training(model, folder, optimizer) == 3
        other = fable(device)[0]
        lora_edu.load_adapter(other, folder)
        lora_edu.load_lora_state_dict(other, factors)
        found = [model(ids), other(ids)]
        lora_edu.set_strength(other, 0.5)
        found.append(other(ids))
        with lora_edu.lora_off(other):
            found.append(other(ids))
        lora_edu.set_strength(other, 1.0)
        report = lora_edu.merge_lora(other)
        found += [other(ids), report.extra_bytes]
        lora_edu.unmerge_lora(other)
        lora_edu.remove_lora(other, merge=True)
        found.append(other(ids))
    return (*found, size, len(lora_edu.lora_parameters(model)))


def text(device):
    """Ids may lie on the CPU: a tokenizer's do."""
    model, tokenizer = fable(device)
    told = model.generate(ids_of(tokenizer), 4, temperature=0.0)
    sampled = model.generate(ids_of(tokenizer), 3, seed=1)
    return (told, sampled, corpora.completions(model, tokenizer, ["Once upon"], max_new_tokens=3)[0],
            corpora.tales_from(model, tokenizer, n=2, length=8, batch_size=2)[0][0],
            bistro.write(model, tokenizer, bistro.cards("test", 2), max_new_tokens=3)[0])


def stacks(device):
    model, tokenizer = fable(device)
    grid = [lora_edu.LoRASettings(rank=rank, lr=1e-2, seed=rank) for rank in (1, 3)]
    heldout = bistro.heldout(tokenizer, 4)
    table = lora_edu.sweep(model, grid, lambda seed: bistro.batches(tokenizer, STEPS, BATCH_SIZE, seed), STEPS, heldout)
    stack = lora_edu.LoRAStack(model, grid)
    alone = stack.unstack(1)
    with tempfile.TemporaryDirectory() as folder:
        lora_edu.save_adapter(alone, folder)
        stack.load(1, folder)
    with stack.rows([1, 0]), torch.no_grad():
        said = stack.model(ids_of(tokenizer).repeat(2, 1))
    return ([run["heldout"][-1][1] for run in table], said, stacked.evaluate_stack(stack, heldout),
            loop.evaluate(stack.unstack(0), heldout))


def changes(device):
    base, tokenizer = fable(device)
    tuned = fable(device, rank=2)[0]
    lora_edu.remove_lora(tuned, merge=True)
    found = lora_edu.deltas(base, tuned)
    name = "model.layers.0.mlp.up_proj"
    delta = tuned.get_submodule(name).weight.data - base.get_submodule(name).weight.data
    sigma = lora_edu.spectrum(delta)
    cut = lora_edu.truncate(base, found, 2, rest="tuned")
    with tempfile.TemporaryDirectory() as folder:
        report = lora_edu.extract_lora(base, tuned, rank=2, out=folder)
    return (sigma.values[:2], sigma.energy_kept()[:2], loop.evaluate(cut, bistro.heldout(tokenizer, 2)), report.energy,
            spectra.gaussian_like(delta).float().sum(), spectra.sign_flipped(delta).abs().sum())


def rivals(device):
    found, tokenizer = [], lora_edu.load_pretrained()[1]
    for name in methods.METHODS:
        model = fable(device)[0]
        found.append(methods.prepare(model, name, rank=2, start=methods.solved_cards(tokenizer, length=6)))
        found += [step.loss for step in loop.train(model, bistro.batches(tokenizer, 1, BATCH_SIZE), 1, lr=1e-3)]
        found.append(loop.evaluate(model.eval(), bistro.heldout(tokenizer, 2)))
        found.append(model.generate(ids_of(tokenizer), 2, temperature=0.0))
    methods.variants(fable(device)[0], rank=1, bottleneck=2, prefix=3, narrow=1)
    return found


def measures(device):
    model, tokenizer = fable(device, rank=2)
    batch, ids = bistro.heldout(tokenizer, 2)[0], ids_of(tokenizer)
    bytes_of = memory_measured.measure(model, lambda: loop.loss_on(model, batch), loop.adamw(model))
    timing.interleaved({"a": timing.prefill(model, ids), "b": timing.decode(model, ids, 2)}, 5)
    weight = fable(device)[0].get_submodule("model.layers.0.mlp.up_proj").weight.data
    rounding.numerics(weight.cpu(), 0.01 * torch.ones_like(weight).cpu(), torch.bfloat16, torch.ones(2, 256))
    teacher = planted.plant(fable(device)[0], "model.layers.3.mlp.down_proj", 2)
    assert operators.operators(model, ids) and operators.chained_products(model, ids)
    return (bytes_of.gradients, bytes_of.states,
            planted.heldout_divergence(fable(device)[0], [teacher], ids))


def labs(device):
    base, tokenizer = fable(device)
    plan = live_run.Plan(tokenizer, "Once upon", lambda steps, seed: bistro.batches(tokenizer, steps, 2, seed),
                         bistro.heldout(tokenizer, 2), corpora.tales_from(base, tokenizer, n=2, length=8),
                         [bistro.prompt(card) for card in bistro.cards("test", 2)], len)
    run = live_run.LiveRun(base, lora_edu.LoRASettings(rank=2, lr=1e-2), plan, steps=STEPS)
    run.advance(seconds=math.inf)
    model = fable(device, rank=2)[0]
    batches = bistro.heldout(tokenizer, 2)[0], plan.plain[0]
    lab = merge_lab.merge_lab(model, "model.layers.0.mlp.up_proj", *batches)
    assert lab.data["measured"]
    return run.losses, run.sigma, [point.heldout for point in run.points], run.samples[-1][1]


def four_bits(device):
    """Stored in few bits, taught a lesson beside them, and merged into plain layers."""
    found = []
    for kind in ("nf4", "int8"):
        model, tokenizer = fable(device)
        lora_edu.quantize_(model, kind)
        lesson = lessons.from_pairs([(f"{n} and 1?", f"It is {n + 1}.") for n in range(20)])
        heldout = lesson.heldout(tokenizer)
        found.append(loop.evaluate(model, heldout))
        torch.manual_seed(0)
        lora_edu.apply_lora(model, rank=2)
        found += [step.loss for step in loop.train(model, lesson.batches(tokenizer, STEPS, rows=2), STEPS, lr=1e-2)]
        found += lesson.answers(model, tokenizer, 1)
        lora_edu.remove_lora(model, merge=True)
        found.append(loop.evaluate(model, heldout))
    return found


SCENES = [layers, training, adapters, text, stacks, changes, rivals, measures, labs, four_bits]


def flat(found):
    """Numbers as lists, in their order; text as it is."""
    if isinstance(found, (list, tuple)):
        return [number for each in found for number in flat(each)]
    return found.detach().cpu().flatten().tolist() if isinstance(found, torch.Tensor) else [found]


def same(one, other):
    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(a == b if isinstance(a, str) else math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) for a, b in pairs)


def functions(names: list[str], plant: bool) -> None:
    source = inspect.getsource(sys.modules[__name__])
    left = [name for name in lora_edu.__all__ if f"lora_edu.{name}" not in source]
    assert not left, f"not rehearsed on a device: {left}; add them to a scene"
    if plant:
        whole = layer.LoRALinear.forward
        layer.LoRALinear.forward = lambda self, x: whole(self, x) + torch.zeros(self.out_features)
    failed = []
    for scene in (scene for scene in SCENES if not names or scene.__name__ in names):
        try:
            dry, cpu = scene("dry"), scene("cpu")
            assert same(dry, cpu), f"other numbers than on the CPU: {dry}\n{cpu}"
            print(f"\n{scene.__name__} ok", flush=True)
        except Exception:
            failed.append(scene.__name__)
            traceback.print_exc()
    assert not failed, f"failed: {', '.join(failed)}"


def notebooks(names: list[str]) -> None:
    """All cells but the setup of the notebooks that use a device, in order, each in a namespace of its own."""
    import IPython
    shorten_everything()
    shell = IPython.InteractiveShell.instance()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if names and path.name[:2] not in names or CPU_ONLY in "".join(cells[0]["source"]):
            continue
        shell.reset()
        for cell in cells:
            if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", []):
                shell.run_cell("".join(cell["source"])).raise_error()
        print(f"\n{path.stem} ok", flush=True)


def main(what: str, *options: str) -> int:
    try:
        names = [option for option in options if option != "--plant"]
        notebooks(names) if what == "notebooks" else functions(names, "--plant" in options)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
