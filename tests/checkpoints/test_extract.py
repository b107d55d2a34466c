"""extract_lora: PEFT loads what it writes and gives the truncated model's logits; it streams, and leaves nothing
behind when it fails.
"""
import copy
import json
import os
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu.lora.factors import lora_layers
from lora_edu import load_pretrained
from lora_edu.checkpoints import extract
from lora_edu.checkpoints.deltas import deltas
from lora_edu.checkpoints.extract import extract_lora
from lora_edu.lora import adapter_file
from lora_edu.lora.adapter_file import load_adapter, target_modules
from lora_edu.lora.layer import is_conv1d
from tests.checkpoints.test_deltas import perturbed, saved
from tests.lora.tiny import gpt2, hf_llama, logits, our_llama


def changed_matrices(base, size=0.15, but=()):
    """A copy in which every linear layer, convolution and Conv1D changed, and nothing else."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(3)
    for name, module in tuned.named_modules():
        if (isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or is_conv1d(module)) and name not in ("lm_head",
                                                                                                         *but):
            module.weight.data += size * torch.randn(module.weight.shape, generator=generator)
    return tuned


@torch.no_grad()
def truncated(base, tuned, rank):
    """Oracle: W₀ plus the best rank-r part of each change by NumPy's SVD, in the places of a copy of the base."""
    cut = copy.deepcopy(base)
    for (name, place), after in zip(cut.named_parameters(), tuned.parameters(), strict=True):
        delta = (after - place).double().flatten(1).numpy() if place.ndim > 1 else np.zeros(0)
        if delta.any():
            U, S, Vh = np.linalg.svd(delta, full_matrices=False)
            place += torch.from_numpy(U[:, :rank] * S[:rank] @ Vh[:rank]).to(place.dtype).view_as(place)
    return cut


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("build", [our_llama, hf_llama, gpt2])
def test_peft_gives_the_truncated_models_logits(build, rank, tmp_path):
    """Through models and, with the same bytes, through files; GPT-2's Conv1D layers store their weights turned."""
    base = build().eval()
    tuned = changed_matrices(base)
    extract_lora(base, tuned, rank=rank, out=tmp_path / "a")
    files = saved(base, tmp_path / "a.safetensors"), saved(tuned, tmp_path / "b.safetensors")
    extract_lora(*files, rank=rank, out=tmp_path / "b")
    one, two = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (build is gpt2)
    want = logits(truncated(base, tuned, rank))
    assert (want - logits(base)).abs().max() > 0.01
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    torch.testing.assert_close(logits(adapted), want, rtol=0, atol=1e-4)
    load_adapter(ours := copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(logits(ours), want, rtol=0, atol=1e-4)


def test_fable_through_the_randomised_svd(tmp_path):
    """Matrices large enough for it; the spectrum falls as a fine-tune's does."""
    base, tuned = load_pretrained()[0], load_pretrained()[0]
    generator = torch.Generator().manual_seed(0)
    for name, _, delta in deltas(base, base):
        scale = (torch.arange(1, 257) + 2.0) ** -1.0 / 16
        left, right = (torch.randn(side, 256, generator=generator) for side in delta.shape)
        tuned.get_submodule(name).weight.data += 0.02 * (left * scale) @ right.T
    report = extract_lora(base, tuned, rank=8, out=tmp_path / "lora")
    cut = truncated(base, tuned, 8)
    adapted = peft.PeftModel.from_pretrained(load_pretrained()[0], tmp_path / "lora").eval()
    torch.testing.assert_close(logits(adapted), logits(cut), rtol=0, atol=1e-4)
    squares = [np.square(np.linalg.svd(delta.double().numpy(), compute_uv=False)) for _, _,
               delta in deltas(base, tuned)]
    assert report.energy == pytest.approx(sum(s[:8].sum() for s in squares) / sum(s.sum() for s in squares), abs=1e-5)
    assert list(report.kept.values()) == pytest.approx([s[:8].sum() / s.sum() for s in squares], abs=1e-5)
    assert report.targets == 28 and "rank 8 on 28 matrices keeps" in str(report) and "tied to" in report._repr_html_()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, (2, 3))
        self.line, self.out = nn.Conv1d(6, 7, 3), nn.Linear(7, 4)

    def forward(self, x):
        return self.out(self.line(self.two(self.one(x).relu()).relu().flatten(2)).mean(2))


def test_convolutions_through_peft(tmp_path):
    base = Net()
    tuned, x = changed_matrices(base), torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    extract_lora(base, tuned, rank=3, out=tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.two.lora_A.weight"].shape == (3, 8, 2, 3)
    assert stored["base_model.model.two.lora_B.weight"].shape == (6, 3, 1, 1)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(adapted(x), truncated(base, tuned, 3)(x), rtol=0, atol=1e-5)


def test_the_files_are_pefts(tmp_path):
    base = hf_llama()
    extract_lora(base, changed_matrices(base), rank=4, out=tmp_path / "new" / "lora")
    config = json.loads((tmp_path / "new" / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["bias"] == "none" and not config["fan_in_fan_out"]
    stored = load_file(tmp_path / "new" / "lora" / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.model.layers.0.mlp.up_proj.lora_{factor}.weight"] for factor in "AB")
    assert A.dtype == B.dtype == torch.float32 and A.shape == (4, 16) and B.shape == (24, 4)
    # the singular values, half on each side
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-5)
    assert sorted(f.name for f in (tmp_path / "new" / "lora").iterdir()) == ["adapter_config.json",
                                                                             "adapter_model.safetensors"]


@pytest.mark.parametrize("source", ["models", "files"])
def test_unchanged_matrices_are_left_out(source, tmp_path):
    """No ending chooses the changed ones alone, so the full names are written."""
    base = hf_llama()
    tuned = changed_matrices(base,
                             but=[name for name, _ in base.named_modules()
                                  if not name.endswith(("0.self_attn.q_proj", "up_proj"))])
    sides = (base, tuned) if source == "models" else [saved(m, tmp_path / f"{i}.safetensors")
                                                      for i, m in enumerate((base, tuned))]
    report = extract_lora(*sides, rank=2, out=tmp_path / "lora")
    want = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert set(report.kept) == set(report.shapes) == want and report.change.changed == 3
    assert report.change.matrices == 15
    adapted = peft.PeftModel.from_pretrained(hf_llama(), tmp_path / "lora")
    assert {name.removeprefix("base_model.model.") for name, m in adapted.named_modules()
            if hasattr(m, "lora_A")} == want


@pytest.mark.parametrize("names, modules, want", [
    (["a.q", "b.q"], ["a", "b", "a.q", "b.q", "a.k"], ["q"]),
    (["a.q"], ["a", "b", "a.q", "b.q"], ["a.q"]),
    (["a.q"], ["a", "a.q", "b", "b.a", "b.a.q"], "a\\.q"),
    (["a"], ["a", "b.a"], "a"),
])
def test_target_modules_choose_exactly_these(names, modules, want):
    """A full name may be the ending of another; a regular expression is not."""
    assert target_modules(names, modules) == want


def test_peft_and_we_understand_a_regular_expression(tmp_path):
    base = nn.ModuleDict({"q": nn.Linear(4, 5), "b": nn.ModuleDict({"q": nn.Linear(4, 5)})})
    extract_lora(base, changed_matrices(base, but=["b.q"]), rank=1, out=tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).base_model.model
    assert hasattr(theirs["q"], "lora_A") and isinstance(theirs["b"]["q"], nn.Linear)
    assert list(load_adapter(base, tmp_path).matched) == ["q"]


@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 1.0])
def test_energy_takes_for_each_matrix_the_smallest_rank_that_keeps_it(energy, tmp_path):
    """Oracle: NumPy's singular values in float64; PEFT's output of the file is that of W₀ plus what was kept."""
    base = Net()
    tuned = changed_matrices(base, size=0.3)
    tuned.out.weight.data += torch.eye(4, 7)
    for module in (tuned.line, tuned.two):
        module.weight.data += 0.1
    want = {}
    for name, _, delta in deltas(base, tuned):
        s = np.linalg.svd(delta.double().numpy(), compute_uv=False)
        want[name] = int(np.searchsorted((s**2).cumsum() / (s**2).sum(), energy - 1e-9)) + 1
    report = extract_lora(base, tuned, energy=energy, out=tmp_path / "lora")
    assert report.ranks == want and min(report.kept.values()) >= energy - 1e-6
    assert energy != 0.9 or len(set(want.values())) > 1
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    load_adapter(ours := copy.deepcopy(base), tmp_path / "lora")
    layers, cut = dict(lora_layers(ours.double())), copy.deepcopy(base).double()
    for name, _, delta in deltas(base, tuned):
        kept, delta = layers[name].delta_weight(), delta.double()
        rest = np.linalg.svd(delta.numpy(), compute_uv=False)[want[name]:]
        # as near as the best of that rank: a distance does not turn with the singular vectors, as float32's may
        assert abs((delta - kept).norm().item() - np.sqrt((rest**2).sum())) < 1e-6 * delta.norm().item()
        cut.get_submodule(name).weight.data += kept.view_as(cut.get_submodule(name).weight)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(adapted.double()(x), cut(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(x), cut(x), rtol=0, atol=1e-10)


def test_a_narrow_matrix_is_kept_whole_and_said_to_be(tmp_path):
    """Every scaling is 1: PEFT and we give the truncated model, in which the narrow matrices are the tuned ones."""
    base = Net()
    tuned, x = changed_matrices(base), torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    report = extract_lora(base, tuned, rank=7, out=tmp_path)
    assert report.ranks == {"one": 7, "two": 6, "line": 7, "out": 4} and report.capped == ["two", "out"]
    assert report.kept["out"] == pytest.approx(1) and "(capped)" in str(report) and "first: two" in str(report)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"two": 6, "out": 4}
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(adapted(x), truncated(base, tuned, 7)(x), rtol=0, atol=1e-5)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), adapted(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("conv", [nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2),
                                  nn.Conv2d(4, 6, 3, dilation=2)])
def test_a_convolution_in_a_bare_file_is_left_out_and_counted(conv, tmp_path):
    base = nn.ModuleDict({"conv": conv, "plain": nn.Conv2d(3, 5, 3), "fc": nn.Linear(4, 3)})
    tuned = perturbed(base)
    sides = [saved(model, tmp_path / f"{i}.safetensors") for i, model in enumerate((base, tuned))]
    report = extract_lora(*sides, rank=2, out=tmp_path / "bare")
    assert list(report.shapes) == ["fc"] and "bare file" in str(report)
    squares = {name: (tuned.state_dict()[name] - t).square().sum().item() for name, t in base.state_dict().items()}
    assert report.change.others_share == pytest.approx(1 - squares["fc.weight"] / sum(squares.values()), rel=1e-4)
    told = extract_lora(*sides, rank=2, out=tmp_path / "told", kinds={"plain": "conv2d"})
    assert set(told.shapes) == {"plain", "fc"}
    assert set(extract_lora(base, tuned, rank=2, out=tmp_path / "models").shapes) == {"plain", "fc"}
    load_adapter(base, tmp_path / "told")
    for kinds, message in (({"plain": "conv1d"}, "has 4 axes"), ({"fc": "conv2d"}, "fc.weight has 2 axes"),
                           ({"plan": "conv2d"}, "no tensor is called 'plan'")):
        with pytest.raises(ValueError, match=message):
            extract_lora(*sides, rank=2, out=tmp_path / "new", kinds=kinds)


def test_what_no_adapter_can_carry_is_in_the_report(tmp_path):
    """Recurrent weights have no place in an adapter: they are yielded by `deltas` and reported here, with their
    share.
    """
    base = nn.ModuleDict({"lstm": nn.LSTM(4, 5), "fc": nn.Linear(5, 3), "wte": nn.Embedding(7, 4)})
    tuned = perturbed(base)
    report = extract_lora(base, tuned, rank=2, out=tmp_path)
    assert list(report.shapes) == ["fc"]
    others = {o.name: o.squared for o in report.change.others}
    assert others.keys() == set(base.state_dict()) - {"fc.weight"}
    squares = {name: (tuned.state_dict()[name] - t).square().sum().item() for name, t in base.state_dict().items()}
    assert others["lstm.weight_hh_l0"] == pytest.approx(squares["lstm.weight_hh_l0"], rel=1e-4)
    assert report.change.others_share == pytest.approx(1 - squares["fc.weight"] / sum(squares.values()), rel=1e-4)
    for text in (str(report), report._repr_html_()):
        assert all(word in text for word in ("lstm.weight_ih_l0", "embedding", "bias", "matrix outside a linear layer"))


@pytest.mark.parametrize("wishes, message", [
    ({}, "rank=None, energy=None: give exactly one"),
    ({"rank": 2, "energy": 0.5}, "rank=2, energy=0.5: give exactly one"),
    ({"rank": 0}, "rank=0 is no rank"), ({"rank": 2.0}, "rank=2.0 is no rank"),
    ({"rank": True}, "rank=True is no rank"),
    ({"energy": 0.0}, "energy=0.0 is no share"), ({"energy": 90}, "energy=90 is no share"),
    ({"energy": float("nan")}, "energy=nan is no share"),
    ({"rank": "4"}, "rank='4' is no rank"), ({"energy": "0.9"}, "energy='0.9' is no share"),
])
def test_wishes_that_do_not_fit_are_refused(wishes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        extract_lora(Net(), changed_matrices(Net()), **wishes, out=tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_two_equal_models_have_nothing_to_extract(tmp_path):
    for wish in ({"rank": 2}, {"energy": 0.5}):
        with pytest.raises(ValueError, match="no matrix of Net changed .* are the two sides the same"):
            extract_lora(Net(), Net(), **wish, out=tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_pair_without_a_linear_layer_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="no matrix of LSTM changed .*none is a linear layer's weight"):
        extract_lora(nn.LSTM(3, 4), nn.LSTM(3, 4), rank=1, out=tmp_path / "lora")


def test_a_full_folder_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "mine").write_text("a file")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(FileExistsError, match="is there already and is no empty folder"):
            extract_lora("no such folder", "nor this", rank=2, out=out)
    assert (tmp_path / "mine").read_text() == "a file"


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("step", ["svd", "tensors", "config", "move"])
def test_nothing_is_left_behind(step, there, error, monkeypatch, tmp_path):
    out = tmp_path / "deep" / "lora"
    if there:
        out.mkdir(parents=True)

    def fail(*args, **kwargs):
        raise error

    def write_half_then_fail(tensors, file, **kwargs):
        file.write_bytes(b"half")
        raise error

    spot, name, replacement = {"svd": (extract, "best_part", fail),
                               "tensors": (adapter_file, "save_file", write_half_then_fail),
                               "config": (adapter_file.json, "dumps", fail),
                               "move": (adapter_file.Path, "replace", fail)}[step]
    monkeypatch.setattr(spot, name, replacement)
    with pytest.raises(type(error)):
        extract_lora(Net(), changed_matrices(Net()), rank=2, out=out)
    assert list(tmp_path.iterdir()) == ([tmp_path / "deep"] if there else [])
    assert not there or not list(out.iterdir())


def test_a_broken_tensor_anywhere_stops_it(tmp_path):
    """Also in a bias, which the adapter would not hold."""
    tuned = changed_matrices(Net())
    tuned.line.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="line.bias of Net has NaN"):
        extract_lora(Net(), tuned, rank=2, out=tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_progress_bar_counts_the_matrices(tmp_path, capsys):
    extract_lora(Net(), changed_matrices(Net()), rank=2, out=tmp_path)
    assert "/4 [" in capsys.readouterr().err


PEAK = """
import sys, torch
from pathlib import Path
from lora_edu.checkpoints.deltas import deltas
from lora_edu.checkpoints.extract import extract_lora
torch.set_num_threads(1)

def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if
    line.startswith("VmHWM"))

def walk(folder):
    for name, weight, delta in deltas(folder / "a", folder / "b"):
        weight.norm(), delta.norm()
        del weight, delta

def cut(folder):
    extract_lora(folder / "a", folder / "b", rank=16, out=folder / "lora")

run = {"walk": walk, "extract": cut}[sys.argv[1]]
run(Path(sys.argv[2]))                  # a small pair: what is loaded once is loaded now
before = peak()
run(Path(sys.argv[3]))
print(peak() - before)
"""


def write_pair(folder, side, count, dtype, shards):
    """Two folders; with shards, each tensor in a file of its own."""
    generator = torch.Generator().manual_seed(0)
    for name, size in (("a", 0.0), ("b", 0.1)):
        (folder / name).mkdir(parents=True)
        tensors = {f"layers.{i}.weight": torch.randn(side, side, generator=torch.Generator().manual_seed(i))
                   for i in range(count)}
        tensors = {n: (t + size * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in tensors.items()}
        files = {n: f"model-{i}.safetensors" if shards else "model.safetensors" for i, n in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / name / file)
        if shards:
            (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process's memory is read from Linux's "
                                                                 "/proc")
@pytest.mark.parametrize("what, dtype, shards", [("walk", torch.float32, False), ("walk", torch.bfloat16, True),
                                                 ("extract", torch.float32, False)])
def test_a_pair_is_streamed(what, dtype, shards, tmp_path):
    """Less than three float32 copies of the largest matrix, however many there are, besides what is written."""
    side, count, rank = 2048, 5, 16        # large, so that what Python itself allocates does not matter
    write_pair(tmp_path / "small", 256, 2, dtype, shards)
    write_pair(tmp_path / "large", side, count, dtype, shards)
    # glibc would keep what was freed, up to two matrices, for the next one: here it gives large blocks back at once
    done = subprocess.run([sys.executable, "-c", PEAK, what, str(tmp_path / "small"), str(tmp_path / "large")],
                          capture_output=True, text=True, timeout=120,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    # the factors, and the serialised copy of them
    output = 2 * count * rank * 2 * side * 4 if what == "extract" else 0
    grown = int(done.stdout)
    assert grown < 3 * 4 * side * side + output
    # the measure sees the two that it must hold
    assert grown > 0.9 * 2 * 4 * side * side


@pytest.mark.real
def test_an_adapter_cut_out_of_a_published_fine_tune_gives_the_cut_models_vectors(published_weights, tmp_path):
    """MiniLM to SRE at rank 16, loaded by PEFT on the base. Oracle: numpy's best rank-16 parts in float64."""
    from transformers import AutoModel

    from lora_edu.course.page.real_model import real_copy
    from lora_edu.course.published import SRE, Judge, operations
    base, tuned = real_copy("all-MiniLM-L6-v2"), real_copy("sre-embedding-model")
    report = extract_lora(base, tuned, rank=16, out=tmp_path / "lora")
    assert report.targets == 36 and not report.change.not_compared
    oracle, after = AutoModel.from_pretrained(base).eval(), load_file(tuned / "model.safetensors")
    with torch.no_grad():
        for name, place in oracle.named_parameters():
            if place.ndim == 2 and "embeddings" not in name:
                before = place.double().numpy()
                U, S, Vh = np.linalg.svd(after[name].double().numpy() - before, full_matrices=False)
                place.copy_(torch.from_numpy(before + U[:, :16] * S[:16] @ Vh[:16]))
    adapted = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "lora").eval()
    judge = Judge(SRE, 20)
    texts = [text for pair in operations()[:20] for text in pair]
    assert (judge.embed(adapted, texts) - judge.embed(oracle, texts)).abs().max() < 1e-4
    assert (judge.embed(adapted, texts) - judge.embed(judge.full, texts)).abs().max() > 1e-3
