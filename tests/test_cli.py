"""The command lora-edu: its verbs give the library's numbers, and errors are one line."""
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edu import cli, load_pretrained
from lora_edu.checkpoints.deltas import deltas
from lora_edu.measure.memory import bill
from lora_edu.models.pretrained import FABLE

PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_version_is_the_one_in_pyproject(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lora-edu {PROJECT['version']}\n"


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_the_command_and_the_way_to_the_notebooks(arguments, capsys):
    if arguments:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
    else:
        assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: lora-edu") and "python dev.py lab" in " ".join(out.split())


def test_an_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["frobnicate"])
    assert end.value.code == 2
    assert "frobnicate" in capsys.readouterr().err


def test_pyproject_points_to_it():
    assert PROJECT["scripts"] == {"lora-edu": "lora_edu.cli:main"}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Fable with one layer changed: rank 3 in one matrix, noise in another, and a norm."""
    model, generator = load_pretrained()[0], torch.Generator().manual_seed(0)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.q_proj.weight += 0.03 * torch.randn(256, 3, generator=generator) @ torch.randn(3, 256,
                                                                                                       generator=generator)
        layer.mlp.down_proj.weight += 0.01 * torch.randn(256, 688, generator=generator)
        layer.input_layernorm.weight += 0.5
    folder = tmp_path_factory.mktemp("tuned")
    model.save_folder(folder)
    return folder


def test_spectrum_prints_a_row_for_every_matrix_and_the_rest(tuned, capsys):
    assert cli.main(["spectrum", "fable", str(tuned)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:29]}
    assert rows["model.layers.1.self_attn.q_proj"][:3] == ["256", "x", "256"]
    q, down, same = (rows[f"model.layers.{name}"]
                     for name in ("1.self_attn.q_proj", "1.mlp.down_proj", "0.mlp.up_proj"))
    assert q[4] == "3" and float(q[5]) == pytest.approx(3, abs=0.5)
    assert int(down[4]) > 150 and int(down[-1]) < 5
    assert same[3:] == ["0.00%", "0", "0.0", "0.0", "0"]
    change = (load_file(tuned / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
              - load_file(FABLE / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float())
    before = load_file(FABLE / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    assert down[3] == f"{change.norm() / before.norm():.2%}"
    assert any(line.startswith("norm ") for line in lines[29:]) and lines[-1].startswith("2 of 28 matrices changed")
    assert "28/28" in err or "spectrum" in err


def test_spectrum_writes_singular_values_sources_and_checksums(tuned, tmp_path, capsys):
    assert cli.main(["spectrum", "fable", str(tuned), "--json", str(tmp_path / "s.json"), "--plot",
                     str(tmp_path / "s.png")]) == 0
    said = json.loads((tmp_path / "s.json").read_text())
    assert said["base"] == {"source": "fable", "sha256": {
        "model.safetensors": hashlib.sha256((FABLE / "model.safetensors").read_bytes()).hexdigest()}}
    assert said["tuned"]["source"] == str(tuned)
    name, _, delta = next(d for d in deltas(FABLE, tuned) if d.name.endswith("1.mlp.down_proj"))
    assert said["matrices"][name]["shape"] == [256, 688] and len(said["matrices"]) == 28
    np.testing.assert_allclose(said["matrices"][name]["singular_values"],
                               np.linalg.svd(delta.numpy(), compute_uv=False), rtol=1e-3)
    assert {"name": "model.layers.1.input_layernorm.weight", "kind": "norm", "squared": 64.0} in said["others"]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["s.json", "s.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "s.json").write_text("old")

    def half(file):
        file.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        cli.write_whole(tmp_path / "s.json", half)
    assert [f.name for f in tmp_path.iterdir()] == ["s.json"] and (tmp_path / "s.json").read_text() == "old"


@pytest.mark.parametrize("size, rank", [(["--rank", "3"], 3), (["--energy", "0.5"], None)])
def test_extract_writes_an_adapter(size, rank, tuned, tmp_path, capsys):
    assert cli.main(["extract", "fable", str(tuned), *size, "--out", str(tmp_path / "lora")]) == 0
    out = capsys.readouterr().out
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == (rank or config["r"]) and "q_proj  " in out and "norm" in out
    assert re.search(rf"rank (\d+ to )?{config['r']} on 2 matrices keeps", out)
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == 4


@pytest.mark.parametrize("arguments, message", [
    (["spectrum", "fable", "TMP/nowhere"], "there is no folder or file"),
    (["spectrum", "fable", "TUNED", "--plot", "TMP/s.jpg"], "is no .png file"),
    (["spectrum", "fable", "TUNED", "--json", "TMP/no/s.json"], "there is no folder TMP/no to write s.json in"),
    (["spectrum", "fable", "TUNED", "--json", "TMP/two\nlines/s.json"], "there is no folder TMP/two lines to write "
                                                                        "s.json in"),
    (["extract", "fable", "fable", "--rank", "3", "--out", "TMP/lora"], "no matrix of"),
    (["extract", "fable", "TUNED", "--rank", "3", "--out", "TUNED"], "is no empty folder"),
    (["extract", "fable", "TMP/bad.bin", "--rank", "3", "--out", "TMP/lora"], "is damaged, or a pickle"),
    (["extract", "fable", "TMP/no-such/model", "--energy", "2", "--out", "TMP/lora"], "energy=2.0 is no share"),
])
def test_errors_are_one_line_and_status_1(arguments, message, tuned, tmp_path, capsys):
    (tmp_path / "bad.bin").write_bytes(b"nonsense")
    fill = {"TMP": str(tmp_path), "TUNED": str(tuned)}
    for word, value in fill.items():
        arguments, message = [a.replace(word, value) for a in arguments], message.replace(word, value)
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("lora-edu: ")]
    assert len(said) == 1 and message in said[0] and "Traceback" not in err and not out
    assert [f.name for f in tmp_path.iterdir()] == ["bad.bin"]


@pytest.mark.parametrize("arguments, word",
                         [(["extract", "a", "b", "--out", "c"], "--rank --energy"), (["spectrum", "a"], "TUNED"),
                                             (["extract", "a", "b", "--rank", "2", "--energy", "0.5", "--out", "c"],
                                              "not allowed with")])
def test_arguments_that_are_missing_or_too_many(arguments, word, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and word in capsys.readouterr().err


def test_unrelated_models_are_warned_about_in_one_line(tmp_path, capsys):
    for seed in (0, 1):
        save_file({"a.weight": torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))},
                  tmp_path / f"{seed}.safetensors")
    assert cli.main(["spectrum", *(str(tmp_path / f"{seed}.safetensors") for seed in (0, 1))]) == 0
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("lora-edu: ")]
    assert len(said) == 1 and "look unrelated" in said[0]


def test_it_runs_as_a_module_without_matplotlib_or_ipywidgets():
    """Pictures are drawn by what is imported when they are asked for."""
    code = ("import sys; sys.modules.update(matplotlib=None, ipywidgets=None); from lora_edu import cli; "
            "sys.exit(cli.main([]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "spectrum" in done.stdout and "extract" in done.stdout, done.stderr


def test_memory_prints_the_parameters_and_every_sum(capsys):
    assert cli.main(["memory", "llama-7b", "--rank", "4", "--targets", "q_proj,v_proj", "--length", "512",
                     "--checkpointing"]) == 0
    said = capsys.readouterr().out
    assert "6,738,415,616 parameters; 2,097,152 numbers train" in said and "LoRA rank 4 on q_proj,v_proj" in said
    want = bill("llama-7b", rank=4, targets=("q_proj", "v_proj"), length=512, checkpointing=True)
    assert f"{want.total:,.0f}" in said and all(f"{value:,.0f}" in said for value in want.parts.values())


def test_memory_of_a_folder_in_full_at_its_own_context(capsys):
    assert cli.main(["memory", str(FABLE), "--method", "full", "--recipe", "fp32", "--optimizer", "sgd", "--batch",
                     "3"]) == 0
    said = capsys.readouterr().out
    assert "3 x 512 tokens" in said
    assert f"{bill('fable', 'full', recipe='fp32', optimizer='sgd', batch=3, length=512).total:,.0f}" in said


def test_memory_of_one_process_among_several(capsys):
    assert cli.main(["memory", "llama-7b", "--strategy", "fsdp", "--processes", "8"]) == 0
    said = capsys.readouterr().out
    assert "one of 8 processes (fsdp)" in said
    assert f"{bill('llama-7b', strategy='fsdp', processes=8).total:,.0f}" in said


@pytest.mark.parametrize("arguments, message", [
    (["lama-7b"], "did you mean 'llama-7b'"), (["llama-7b", "--rank", "5000"], "rank <= 4096"),
    (["llama-7b", "--batch", "-1"], "batch=-1"),
    (["llama-7b", "--length", "0"], "length=0"), (["llama-7b", "--targets", "wq"], "named 'wq'"),
    (["llama-7b", "--method", "full", "--recipe", "nf4"], "four bits")])
def test_memory_refuses_in_one_line(arguments, message, capsys):
    assert cli.main(["memory", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.fixture
def grown(tmp_path):
    """A pair with a quantised matrix and a grown vocabulary: one matrix of three can be compared."""
    t = {"a.weight": torch.randn(6, 5), "b.weight": torch.ones(4, 4).char(), "wte.weight": torch.randn(9, 5)}
    other = {"a.weight": t["a.weight"] + 0.1, "b.weight": -t["b.weight"], "wte.weight": torch.randn(11, 5)}
    for name, tensors in (("base", t), ("tuned", other)):
        save_file(tensors | {"mask": torch.ones(3, dtype=torch.int64)}, tmp_path / f"{name}.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]


def test_what_could_not_be_compared_has_a_line_no_share_and_a_status(grown, tmp_path, capsys):
    for arguments in (["spectrum", *grown], ["extract", *grown, "--rank", "2", "--out", str(tmp_path / "lora")]):
        assert cli.main(arguments) == 3
        out = capsys.readouterr().out
        assert "1 of 1 matrices changed; 2 tensors could not be compared (first: " in out and "no share" in out
        assert "% of the squared" not in out and "unchanged" in out, "the mask is the same, and said to be"
    assert cli.main(["spectrum", grown[0], grown[0]]) == 0


def test_nothing_to_write_writes_nothing_and_says_so_before_the_work(grown, tmp_path, capsys):
    for name, tensor in (("base", torch.zeros(2)), ("tuned", torch.ones(2))):
        save_file({"bias": tensor}, tmp_path / f"{name}.safetensors")
    picture = tmp_path / "s.png"
    assert cli.main(["spectrum", *grown, "--plot", str(picture)]) == 1 and not picture.exists()
    assert "no matrix of the two can be compared, so nothing is written" in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    assert cli.main(["spectrum", "no such", "thing", "--plot", str(tmp_path / "folder.png")]) == 1
    assert "folder.png is a folder: give another name" in capsys.readouterr().err


def test_a_kind_is_told(tmp_path, capsys):
    for name, size in (("base", 0.0), ("tuned", 1.0)):
        weight = torch.zeros(6, 4, 3, 3) + size * torch.randn(6, 4, 3, 3)
        save_file({"c.weight": weight, "fc.weight": torch.eye(5) * (1 + size)}, tmp_path / f"{name}.safetensors")
    sides = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    assert cli.main(["extract", *sides, "--rank", "2", "--out", str(tmp_path / "a")]) == 0
    assert "bare file" in capsys.readouterr().out and len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2
    assert cli.main(["extract", *sides, "--rank", "2", "--kind", "c=conv2d", "--out", str(tmp_path / "b")]) == 0
    assert load_file(tmp_path / "b" / "adapter_model.safetensors")["base_model.model.c.lora_A.weight"].ndim == 4
    with pytest.raises(SystemExit):
        cli.main(["extract", *sides, "--rank", "2", "--kind", "c", "--out", str(tmp_path / "c")])
    assert "write NAME=conv1d" in capsys.readouterr().err


def run(*arguments, **how):
    command = [sys.executable, "-m", "lora_edu.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_it_prints_in_any_encoding(encoding, tuned, tmp_path):
    done = run("spectrum", "fable", str(tuned), env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0 and b"q_proj" in out and b"Traceback" not in err


def test_a_reader_that_has_enough_is_no_error(tuned):
    process = run("spectrum", "fable", str(tuned))
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait(60) == 0


def test_ctrl_c_is_one_line(tuned, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "measure", stop)
    assert cli.main(["spectrum", "fable", str(tuned)]) == 130
    assert capsys.readouterr().err.splitlines() == ["lora-edu: stopped; no file is half-written."]


def test_a_picture_of_many_matrices_has_no_jump_and_its_title_fits(tmp_path):
    """Titles of long paths are cut at their start, and stand inside the picture."""
    from lora_edu.course.figures.spectra import plot_spectra
    long = str(tmp_path / ("a-very-long-name-of-a-model-" * 4))
    figure = plot_spectra({str(i): np.arange(5 + 3 * (i % 3), 0, -1.0) for i in range(12)},
                          f"{cli.ending(long)} to {cli.ending(long)}")
    figure.canvas.draw()
    box = figure.axes[0].title.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
    assert len([line for line in figure.axes[0].lines if line.get_linewidth() > 2]) == 3


def test_a_prefix_on_one_side_and_a_pickle_beside_the_safetensors(tmp_path, capsys):
    """As published BERTs lie: a head on one side, and beside its weights a .bin of them and other pickles."""
    torch.manual_seed(0)
    body = {"encoder.query.weight": torch.randn(6, 6), "encoder.query.bias": torch.zeros(6)}
    headed = {f"bert.{name}": tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in body.items()}
    for folder, tensors in (("base", body), ("tuned", headed | {"classifier.weight": torch.randn(2, 6)})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    (tmp_path / "tuned" / "pytorch_model.bin").write_bytes(b"an old one, and never read")
    (tmp_path / "tuned" / "training_args.bin").write_bytes(b"no tensors at all")
    sides = [str(tmp_path / "base"), str(tmp_path / "tuned")]
    assert cli.main(["spectrum", *sides]) == 3
    said = capsys.readouterr()
    assert said.err.startswith("lora-edu: 'bert.' is taken from the front of 2 names of ") and said.err.count("\n") == 1
    assert "encoder.query" in said.out and "bert.encoder" not in said.out
    assert "only in the tuned model" in said.out
    assert cli.main(["extract", *sides, "--rank", "2", "--out", str(tmp_path / "lora")]) == 3
    assert "rank 2 on 1 matrices" in capsys.readouterr().out
