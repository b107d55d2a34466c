"""Where tensors lie: folders, files, and names on the hub, read through a local server that answers like the hub."""
import json
import os
import subprocess
import sys

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
