"""The records of notebook 03: the code runs end to end on tiny sizes, and what is stored keeps its rules."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_edu.course.records import spectra
from lora_edu.course.records.stored import load_record

pytestmark = pytest.mark.slow

PAIR = Path(__file__).resolve().parents[4] / "shared" / "data" / "pair-textgenrnn-charlm"


@pytest.fixture(autouse=True)
def few_ranks(monkeypatch):
    monkeypatch.setattr(spectra, "RANKS", (0, 8, 256))


def test_spectra_has_what_the_notebook_reads():
    what = (("bistro", None, "matrices"), ("bistro", "mismatched", "matrices"), ("bistro", None, "everything"))
    found = spectra.spectra(seeds=(1,), n=32, what=what, slice_steps=1, sizes={"bistro": {"steps": 1}})
    real, null, everything = found["runs"]
    assert [run["null"] for run in found["runs"]] == [None, "mismatched", None]
    assert len(real["matrices"]) == 14 and len(real["sigma"]) == 7
    assert len(real["sigma"]["model.layers.1.mlp.up_proj"]) == 16
    assert real["cut"][0]["rest"] == "base" and len(real["cut"][0]["slots"]) == len(found["settings"]["ranks"])
    assert null["cut"][0]["ranks"] == [0, 8, 256]
    assert [cut["rest"] for cut in everything["cut"]] == ["base", "tuned"]
    assert set(everything["squared change"]) == {"matrices", "embedding", "norms"}
    assert everything["squared change"]["embedding"] > 0
    assert real["energy"][0] == 0 and real["energy"][-1] == pytest.approx(1)
    # the same model whatever the rest, once the rest is the same
    assert real["cut"][0]["test"][0] == everything["cut"][0]["test"][0] != everything["cut"][1]["test"][0]
    json.dumps(found)


def test_the_recorded_runs_keep_their_rules():
    found = load_record("spectra")
    beside = load_record("lora_beside_full")
    for run in found["runs"]:
        assert run["lr"] == beside["tasks"][run["task"]]["full"]["lr"]
        assert run["steps"] == beside["settings"]["sizes"][run["task"]]["steps"]
        assert all(a <= b for a, b in zip(run["energy"], run["energy"][1:]))
    kinds = {(run["task"], run["null"], run["trains"]) for run in found["runs"]}
    assert kinds == set(spectra.WHAT) and len(found["runs"]) == len(kinds) * len(found["settings"]["seeds"])


def test_the_whole_update_is_the_run_of_the_other_record():
    """Same rate, steps and data order as full fine-tuning in lora_beside_full: the same model, up to rounding."""
    other = {run["seed"]: run["test"] for run in load_record("lora_beside_full")["tasks"]["bistro"]["full"]["runs"]}
    for run in load_record("spectra")["runs"]:
        if (run["task"], run["null"], run["trains"]) == ("bistro", None, "matrices"):
            assert run["cut"][0]["test"][-1] == pytest.approx(other[run["seed"]], abs=0.01)


def test_recorded_singular_values_give_the_recorded_figures():
    for run in load_record("spectra")["runs"]:
        for name, sigma in run.get("sigma", {}).items():
            shares = np.square(sigma).cumsum() / np.square(sigma).sum()
            # four digits are stored
            assert abs(int((shares < 0.9).sum()) + 1 - run["matrices"][name]["rank 90"]) <= 1


def a_pair(folder):
    generator = torch.Generator().manual_seed(0)
    base = {"rnn.kernel": torch.randn(6, 9, generator=generator), "rnn.bias": torch.zeros(9)}
    save_file(base, folder / "base.safetensors")
    save_file({"rnn.kernel": base["rnn.kernel"] + 1, "rnn.bias": torch.ones(9)}, folder / "ft_plus_one.safetensors")


def test_a_published_pair_is_read_from_a_folder(tmp_path):
    a_pair(tmp_path)
    found = spectra.published_pair(str(tmp_path))
    assert set(found["source"]["sha256"]) == {"base.safetensors", "ft_plus_one.safetensors"}
    matrix = found["pairs"]["ft_plus_one"]["matrices"]["rnn.kernel"]
    assert matrix["sigma"][0] == pytest.approx(54**0.5, rel=1e-3) and max(matrix["sigma"][1:]) < 1e-5
    assert [other[0] for other in found["pairs"]["ft_plus_one"]["others"]] == ["rnn.bias"]


@pytest.mark.parametrize("given", [None, "nowhere"])
def test_a_folder_without_a_pair_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="base.safetensors and at least one ft_"):
        spectra.published_pair(given and str(tmp_path / given))


def test_the_stored_spectra_are_those_of_the_files():
    if not PAIR.is_dir():
        pytest.skip("the published pair is not beside this checkout")
    base = load_file(PAIR / "base.safetensors")
    for name, found in load_record("published_pair")["pairs"].items():
        tuned = load_file(PAIR / f"{name}.safetensors")
        for tensor, matrix in found["matrices"].items():
            sigma = np.linalg.svd((tuned[tensor].double() - base[tensor].double()).numpy(), compute_uv=False)
            np.testing.assert_allclose(matrix["sigma"], sigma, rtol=1e-3, atol=1e-4 * sigma[0])
