"""open_side: every sort of source gives the same tensors, and what is broken, or could run code, is refused."""
import contextlib
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_edu.checkpoints.reading import open_side
from lora_edu.files import read_pickled
from tests.lora.tiny import gpt2, our_llama

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16),
           "steps": torch.tensor(7)}


def as_file(folder):
    save_file(TENSORS, folder / "x.safetensors")
    return folder / "x.safetensors"


def as_folder(folder):
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def as_shards(folder):
    where = {name: f"model-{i}.safetensors" for i, name in enumerate(TENSORS)}
    for name, file in where.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def as_pickle(folder):
    torch.save(TENSORS, folder / "x.pt")
    return str(folder / "x.pt")


def as_pickle_of_before_2020(folder):
    torch.save({"epoch": 3, "state_dict": TENSORS}, folder / "x.bin", _use_new_zipfile_serialization=False)
    return folder / "x.bin"


def as_two_pickles(folder):
    for i, (name, tensor) in enumerate(TENSORS.items()):
        torch.save({name: tensor}, folder / f"pytorch_model-{i}.bin")
    return folder


@pytest.mark.parametrize("write", [as_file, as_folder, as_shards, as_pickle, as_pickle_of_before_2020, as_two_pickles])
def test_every_sort_of_source_gives_the_same(write, tmp_path):
    place = write(tmp_path)
    side = open_side(place)
    assert sorted(side.names) == sorted(TENSORS) and side.source == str(place)
    for name, tensor in TENSORS.items():
        got = side.get(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
        assert side.shapes[name] == tuple(tensor.shape) and side.layer(name) is None
    assert side.dtype("a.bias") == torch.bfloat16 and side.dtype("a.weight") == torch.float32
    assert side.tied == {} and side.module_names == ["a"]
    assert all(file.is_file() for file in side.files)
    assert len(side.files) == (3 if write in (as_shards, as_two_pickles) else 1)


def test_a_model_is_a_side_with_modules_and_its_ties():
    model = our_llama(tied=True)
    side = open_side(model)
    assert side.source == "Llama" and side.files == () and set(side.names) == set(model.state_dict())
    assert side.tied == {"lm_head.weight": "model.embed_tokens.weight"} and open_side(our_llama(tied=False)).tied == {}
    assert side.layer("lm_head.weight") is model.lm_head
    assert not side.get("model.norm.weight").requires_grad
    assert open_side(gpt2()).tied == {"lm_head.weight": "transformer.wte.weight"}


def test_ties_in_files(tmp_path):
    """A pickle keeps them; safetensors cannot, so the config is asked."""
    model = our_llama(tied=True)
    torch.save(model.state_dict(), tmp_path / "x.bin")
    assert open_side(tmp_path / "x.bin").tied == {"lm_head.weight": "model.embed_tokens.weight"}
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert open_side(tmp_path).tied == {}
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert (
        open_side(tmp_path).tied
        == open_side(tmp_path / "model.safetensors").tied
        == {"lm_head.weight": "model.embed_tokens.weight"}
    )


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_that_could_run_code_is_refused_and_not_run(old, tmp_path, capsys):
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2), "b": Evil()}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"x\.bin is damaged, or a pickle that holds more than plain tensors and could "
                       r"run code") as told:
        open_side(file)
    assert "\n" not in str(told.value) and not capsys.readouterr().out


@pytest.mark.parametrize("body", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_a_file_that_is_no_pickle_of_tensors(body, tmp_path):
    (tmp_path / "x.pt").write_bytes(body)
    with pytest.raises(ValueError, match=r"x\.pt"):
        open_side(tmp_path / "x.pt")


def test_a_whole_pickled_list_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a list, not tensors by name"):
        open_side(tmp_path / "x.pt")


def test_an_index_that_promises_too_much(tmp_path):
    as_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"b.weight": "model-0.safetensors"}}))
    with pytest.raises(ValueError, match="the index says that .*model-0.safetensors holds b.weight, and it does not"):
        open_side(tmp_path)
    (tmp_path / "model-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-0.safetensors is named in the index but missing"):
        open_side(tmp_path)


def test_a_folder_without_weights_and_a_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        open_side(tmp_path)
    as_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        open_side(tmp_path)


def test_a_model_on_the_meta_device_has_no_values():
    with pytest.raises(ValueError, match="weight of Linear has no values"):
        open_side(nn.Linear(2, 3, device="meta")).get("weight")


@pytest.mark.parametrize("tensors", [
    {3: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()}, {"a": torch.ones(2, device="meta")},
    {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}])
def test_tensors_that_are_not_plain_or_have_no_name(tensors, tmp_path):
    torch.save(tensors, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin"):
        open_side(tmp_path / "x.bin")


def test_an_old_pickle_that_is_cut_or_spoiled_anywhere(tmp_path):
    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.bin").read_bytes()
    bodies = [whole[:at] for at in range(len(whole))]
    bodies += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:] for at in range(0, len(whole), 3)]
    for body in bodies:
        (tmp_path / "x.bin").write_bytes(body)
        with contextlib.suppress(ValueError), warnings.catch_warnings(action="ignore"):
            read_pickled(tmp_path / "x.bin")
