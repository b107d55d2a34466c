"""Where tensors lie: folders, files, and names on the hub, read through a local server that answers like the hub."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_edu import files
from tests.hub import local_hub

READ = """
import json, sys
from lora_edu.checkpoints.deltas import deltas
try:
    print(json.dumps({d.name: d.delta.norm().item() for d in deltas(*sys.argv[1:])}))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 4), "b.bias": torch.randn(3)}
    return base, {name: t + torch.randn_like(t) / 9 for name, t in base.items()}


def read_from_hub(endpoint, home, *names):
    """`deltas` in a process of its own: the hub client reads its endpoint and its cache when it is imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                        "HF_HUB_OFFLINE": "0",
                        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", READ, *names], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_names_on_the_hub_are_read_through_it(pair, tmp_path):
    """The base lies there in shards beside files that nobody needs; the tuned one is an old pickle without
    safetensors.
    """
    base, tuned = pair
    owner, home = tmp_path / "hub" / "owner", tmp_path / "home"
    for folder in ("base/onnx", "tuned"):
        (owner / folder).mkdir(parents=True)
    shards = {"model-1.safetensors": ["a.weight"], "model-2.safetensors": ["b.weight", "b.bias"]}
    for file, names in shards.items():
        save_file({name: base[name] for name in names}, owner / "base" / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (owner / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (owner / "base" / "config.json").write_text("{}")
    for unwanted in ("pytorch_model.bin", "tokenizer.json", "onnx/model.safetensors"):
        (owner / "base" / unwanted).write_bytes(b"not wanted")
    torch.save(tuned, owner / "tuned" / "pytorch_model.bin")
    with local_hub(tmp_path / "hub") as (endpoint, asked):
        got = read_from_hub(endpoint, home, "owner/base", "owner/tuned")
        nowhere = read_from_hub(endpoint, home, "owner/base", "owner/nowhere")
    assert got == pytest.approx({name: (tuned[f"{name}.weight"] - base[f"{name}.weight"]).norm().item()
                                 for name in "ab"}, rel=1e-5)
    fetched = {line.rpartition("/resolve/")[2].partition("/")[2] for line in asked if line.startswith("GET")
               and "/resolve/" in line}
    assert fetched == {"config.json", "model.safetensors.index.json", *shards, "pytorch_model.bin"}
    assert not [line for line in asked if "owner/base" in line and line.endswith("pytorch_model.bin")]
    assert nowhere[0] == "RuntimeError" and "'owner/nowhere' is neither a folder nor a file" in nowhere[1]
    assert "\n" not in nowhere[1]
    again = read_from_hub(endpoint, home, "owner/base", "owner/tuned")       # the server is gone: from the cache
    assert again == got


def test_a_path_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fetch", lambda name: pytest.fail(f"asked the hub for {name}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for wrong in ("nothing", tmp_path / "a", "runs/tuned", "some/model.safetensors", "a/b/c", "../tuned"):
        with pytest.raises(FileNotFoundError, match="there is no folder or file.*owner/name, such as "
                                                    "HuggingFaceTB/SmolLM2-135M"):
            files.locate(wrong)


def test_a_hub_name_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "fetch", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert files.locate("owner/a_model-1.5") == tmp_path / "owner/a_model-1.5"


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is no index of a model.*fetch it again"):
        files.tensor_files(tmp_path)


def test_headers_are_read_without_the_tensors(pair, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(pair[0] | {"c": torch.zeros(2, dtype=torch.bfloat16)}, file)
    assert files.tensor_headers(file) == {"a.weight": ((6, 4), "F32"), "b.weight": ((3, 4), "F32"),
                                          "b.bias": ((3,), "F32"),
                                          "c": ((2,), "BF16")}
    assert torch.equal(files.read_tensor(file, "b.bias"), pair[0]["b.bias"])


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def lie(file):
    """The header says 7 x 4 where 6 x 4 numbers lie."""
    file.write_bytes(file.read_bytes().replace(b"[6,4]", b"[7,4]"))


@pytest.mark.parametrize("spoil",
                         [truncate, lie, lambda file: file.write_bytes(b"x" * 50), lambda file: file.write_bytes(b"")])
def test_a_damaged_or_lying_file_is_named(spoil, pair, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(pair[0], file)
    spoil(file)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged or no safetensors file"):
        files.tensor_headers(file)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("at", range(1, 5))
def test_two_files_that_were_there_are_both_old_or_both_new(at, links, monkeypatch, tmp_path):
    """Stopped at any of the moves: the old pair is back, and nothing else lies there. At no moment is a file missing,
    also on a file system without links.
    """
    a, b = tmp_path / "a", tmp_path / "b"
    files.write_together({a: lambda part: part.write_text("old a"), b: lambda part: part.write_text("old b")})
    calls = [0]

    def stopping(real):
        def stop(*paths):
            assert a.exists() and b.exists()
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            return real(*paths)
        return stop

    def no_links(*paths):
        raise OSError("no links here")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping(Path.replace))
        patch.setattr(files, "_second_name", stopping(files._second_name))
        if not links:
            patch.setattr(files.os, "link", no_links)
        with pytest.raises(KeyboardInterrupt):
            files.write_together({a: lambda part: part.write_text("new a"), b: lambda part: part.write_text("new b")})
    assert [f.read_text() for f in (a, b)] == ["old a", "old b"] and sorted(tmp_path.iterdir()) == [a, b]
    files.write_together({a: lambda part: part.write_text("new a"), b: lambda part: part.write_text("new b")})
    assert [f.read_text() for f in (a, b)] == ["new a", "new b"] and sorted(tmp_path.iterdir()) == [a, b]


@pytest.mark.parametrize("name, said", [("x.npz", "a NumPy"), ("x.h5", "an HDF5"), ("x.gguf", "a GGUF")])
def test_files_of_other_kinds_are_called_what_they_are(name, said, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    for read in (files.tensor_headers, files.read_pickled):
        with pytest.raises(ValueError, match=f"{name} is {said} file, and weights are read from"):
            read(tmp_path / name)


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model"])
def test_what_training_scripts_wrap_around_the_tensors_is_taken_off(wrap, tmp_path):
    for name in ("x.pt", "x.ckpt"):
        torch.save({wrap: {"a.weight": torch.ones(2, 2)}, "epoch": 3}, tmp_path / name)
        assert list(files.read_pickled(tmp_path / name)) == ["a.weight"]
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="holds a dict of 'epoch', 'loss', not tensors by name"):
        files.read_pickled(tmp_path / "y.pt")


def test_a_file_that_may_not_be_read_is_not_called_missing(monkeypatch, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(files.os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match="a.safetensors is there and may not be read"):
        files.read_tensor(tmp_path / "a.safetensors", "a")


@pytest.mark.parametrize("names", [{"a": 5}, {"a": ["x"]}, {"a": None}])
def test_an_index_whose_file_names_are_none(names, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="is no index of a model"):
        files.tensor_files(tmp_path)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """A black hole of a network: one connection is tried, with a limit, and the client is told to look in its cache."""
    import huggingface_hub
    waited, asked = [], []

    class Line:
        def __init__(self, *args): ...
        def __enter__(self): return self
        def __exit__(self, *args): ...
        def settimeout(self, seconds): waited.append(seconds)
        def connect(self, address): raise TimeoutError("timed out")

    def cached_only(name, allow_patterns, local_files_only):
        asked.append(local_files_only)
        raise FileNotFoundError("no copy")
    monkeypatch.setattr(files.socket, "getaddrinfo", lambda *args, **how: [(2, 1, 6, "", ("192.0.2.1", 443))])
    monkeypatch.setattr(files.socket, "socket", Line)
    monkeypatch.setattr(files.urllib.request, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_only)
    with pytest.raises(RuntimeError, match="owner/name' .*does not answer within 5 seconds: check the network"):
        files.fetch("owner/name")
    assert waited == [5] and asked == [True]
