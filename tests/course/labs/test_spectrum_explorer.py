"""The spectrum explorer: what goes to the page are the numbers that numpy finds."""
import re

import numpy as np
import pytest
import torch

from lora_edu.course.labs import spectrum_explorer as explorer
from lora_edu.course import load_record
from lora_edu.course.labs.spectrum_explorer import published_explorer, spectrum_explorer
from lora_edu.course.published import CLASSES, FINGERPRINTS, SRE

RANKS = [0, 1, 2, 4, 8]
LAYERS, SHAPES = (0, 2), {"q_proj": (8, 8), "up_proj": (12, 8)}
WHATS = ("restaurants", "random targets", "more tales")
LOSSES = {"restaurants": [4.4, 3.0, 2.0, 0.4, 0.4], "random targets": [4.4, 4.5, 4.6, 4.7, 4.9],
          "more tales": [4.4, 4.3, 4.5, 4.5, 4.6]}
MEASURED_ON = {what: "restaurants" for what in WHATS}


def delta(what: str, layer: int, matrix: str) -> np.ndarray:
    """An update that differs for each place, its spectrum uneven."""
    rng = np.random.default_rng(10 * WHATS.index(what) + layer + (matrix == "q_proj") * 5)
    out, into = SHAPES[matrix]
    return rng.normal(size=(out, into)) * np.linspace(1, 0.05, into)


def name_of(layer: int, matrix: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if matrix == 'q_proj' else 'mlp'}.{matrix}"


def thin_svd(matrix) -> tuple:
    return torch.linalg.svd(torch.as_tensor(matrix, dtype=torch.float32), full_matrices=False)


@pytest.fixture(scope="module")
def factors():
    return {what: {name_of(layer, matrix): thin_svd(delta(what, layer, matrix)) for layer in LAYERS
                   for matrix in SHAPES} for what in WHATS}


@pytest.fixture(scope="module")
def built(factors):
    return spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON, rank=2)


def test_the_page_gets_the_spectra_that_numpy_finds(built):
    for what in WHATS:
        for layer in LAYERS:
            for matrix in SHAPES:
                found = built.data["updates"][what]["spectra"][f"{layer} {matrix}"]
                assert np.allclose(found, np.linalg.svd(delta(what, layer, matrix), compute_uv=False), rtol=1e-3)
    assert built.data["shapes"] == {"q_proj": [8, 8], "up_proj": [12, 8]} and built.data["layers"] == [0, 2]
    assert built.state == {"left": "restaurants", "right": "random targets", "layer": 0, "matrix": "q_proj", "rank": 2}


def test_the_energy_of_all_matrices_is_that_of_their_best_parts(built):
    """Oracle: numpy's best rank-r part of each matrix, and the norms of what it leaves."""
    def lost(matrix, rank):
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        return ((matrix - (U[:, :rank] * S[:rank]) @ Vh[:rank]) ** 2).sum()
    every = [delta("more tales", layer, matrix) for layer in LAYERS for matrix in SHAPES]
    for rank, found in zip(RANKS, built.data["updates"]["more tales"]["energies"]):
        whole = sum((each**2).sum() for each in every)
        assert found == pytest.approx(1 - sum(lost(each, rank) for each in every) / whole, abs=1e-6)


def test_the_values_above_the_edge_are_counted():
    """Oracle: one direction far above noise, which numpy puts at 1 of 200 singular values above std (sqrt(m) +
    sqrt(n)).
    """
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 220))
    spiked = noise + 60 * np.outer(rng.normal(size=200), rng.normal(size=220)) / 200**0.5 / 220**0.5
    assert (np.linalg.svd(spiked, compute_uv=False) > 200**0.5 + 220**0.5 + 1).sum() == 1
    lab = spectrum_explorer({"one": {"layers.0.q": thin_svd(spiked)}}, [0, 256], {"one": [2, 1]}, {"one": "tales"})
    assert lab.data["updates"]["one"]["above"] == {"0 q": 1} and lab.state["right"] == "one"


def test_the_noise_has_a_median_of_one_and_is_decomposed_once_for_each_shape(factors, monkeypatch):
    explorer._noise_values.cache_clear()
    asked, spectrum = [], explorer.spectrum
    monkeypatch.setattr(explorer, "spectrum", lambda matrix: asked.append(tuple(matrix.shape)) or spectrum(matrix))
    labs = [spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON) for _ in range(2)]
    assert asked == [(8, 8), (12, 8)] and labs[0].data["noise"] == labs[1].data["noise"]
    assert all(np.median(values) == pytest.approx(1, rel=1e-3) for values in labs[0].data["noise"].values())


def test_the_stored_cell_says_both_updates(factors):
    lab = spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON, {"restaurants": [0, 0.1, 0.25, 0.5, 1]}, rank=2)
    energy = lab.data["updates"]["restaurants"]["energies"][2]
    first, second, _ = lab._repr_mimebundle_()[0]["text/plain"].splitlines()
    assert first == (f"restaurants: every matrix cut to rank 2 keeps {energy:.1%} of the energy; loss on restaurants "
                     "2.00 nats per token (base 4.40, whole update 0.40), slots right 25%")
    assert second.startswith("random targets: ") and "slots" not in second


def test_a_share_alone_needs_no_losses(factors):
    kept = dict.fromkeys(WHATS, [0, 0.1, 0.25, 0.5, 1])
    lab = spectrum_explorer(factors, RANKS, {}, {}, kept, rank=2, share="answers as before")
    assert lab.data["share"] == "answers as before" and "losses" not in lab.data["updates"]["restaurants"]
    assert lab._repr_mimebundle_()[0]["text/plain"].splitlines()[0].endswith("of the energy, answers as before 25%")
    with pytest.raises(ValueError, match="losses has no entry for 'restaurants'"):
        spectrum_explorer(factors, RANKS, {}, {})


def test_the_published_pairs_are_those_of_the_record():
    """Two fine-tunes of one base side by side, every layer and matrix; energies within half a point of the record's."""
    record = load_record("published_transformers")
    for base, names, layers in (("rxnfp-bert_pretrained", [CLASSES, FINGERPRINTS], 12), ("all-MiniLM-L6-v2", [SRE], 6)):
        data = published_explorer(base).data
        assert list(data["updates"]) == names and data["layers"] == list(range(layers)) and len(data["matrices"]) == 6
        for name in names:
            its, pair = data["updates"][name], record["pairs"][name]
            far = pair["cut"]["base"]["distance"]
            assert np.allclose(its["slots"], 1 - np.array(far) / far[0]) and its["slots"][0] == 0
            assert np.allclose(its["energies"][:-1], pair["energy"], atol=5e-3)
            for place, ending in (("3 value", "layer.3.attention.self.value"), ("3 output", "layer.3.output.dense"),
                                  ("5 attn output", "layer.5.attention.output.dense")):
                row = next(row for module, row in pair["matrices"].items() if module.endswith(ending))
                assert its["spectra"][place][:16] == row["sigma"][:16]


def test_a_start_between_two_ranks_takes_the_nearer_one(factors):
    assert spectrum_explorer(factors, RANKS, LOSSES, MEASURED_ON, rank=7).state["rank"] == 8


@pytest.mark.filterwarnings("error")
def test_an_update_of_zeros_can_be_shown():
    lab = spectrum_explorer({"none": {"layers.0.q": thin_svd(np.zeros((4, 4)))}}, [0, 4], {"none": [2, 2]},
                            {"none": "tales"})
    assert lab.data["updates"]["none"]["spectra"] == {"0 q": [0.0] * 4}


def without(factors, what, name):
    return factors | {what: {key: value for key, value in factors[what].items() if key != name}}


def renamed(factors, old, new):
    return {what: {new if name == old else name: value for name, value in parts.items()}
            for what, parts in factors.items()}


Q0 = name_of(0, "q_proj")


@pytest.mark.parametrize("change, says", [
    (lambda f: ({}, RANKS, LOSSES, MEASURED_ON), "needs at least one update"),
    (lambda f: ({"restaurants": {}}, RANKS, LOSSES, MEASURED_ON), "with at least one matrix"),
    (lambda f: (without(f, "more tales", Q0), RANKS, LOSSES, MEASURED_ON), f"'{Q0}' is in only one of 'restaurants' "
                                                                           "and 'more tales'"),
    (lambda f: (renamed(f, Q0, "lm_head"), RANKS, LOSSES, MEASURED_ON), "'lm_head' does not say its layer"),
    (lambda f: (renamed(f, Q0, "model.layers.2.cross.q_proj"), RANKS, LOSSES, MEASURED_ON),
     "are both q_proj of layer 2: leave one"),
    (lambda f: (renamed(f, Q0, "model.layers.0.self_attn.k_proj"), RANKS, LOSSES, MEASURED_ON), "there is no q_proj in "
                                                                                                "layer 0"),
    (lambda f: (f | {"more tales": f["more tales"] | {Q0: thin_svd(np.eye(4))}}, RANKS, LOSSES, MEASURED_ON),
     f"'{Q0}' of 'more tales' has factors (4, 4), (4,), (4, 4): they should be (8, 8), (8,), (8, 8)"),
    (lambda f: ({"a": {"layers.0.q": torch.linalg.svd(torch.ones(5, 3))}}, [0, 3], {"a": [2, 1]}, {"a": "a"}),
     "should be (5, 3), (3,), (3, 3)"),
    (lambda f: (f, [1, 2, 8], LOSSES, MEASURED_ON), "[1, 2, 8]: give at least two, rising from 0"),
    (lambda f: (f, [0, 4, 2, 8, 9], LOSSES, MEASURED_ON), "rising from 0"),
    (lambda f: (f, [0, 1, 2, 4], LOSSES, MEASURED_ON), "the ranks end at 4, and 'model.layers.0.self_attn.q_proj' has "
                                                       "8 singular values"),
    (lambda f: (f, RANKS, {"restaurants": LOSSES["restaurants"]}, MEASURED_ON), "losses has no entry for 'random "
                                                                                "targets'"),
    (lambda f: (f, RANKS, LOSSES, {"restaurants": "x"}), "measured_on has no entry for 'random targets'"),
    (lambda f: (f, RANKS, LOSSES | {"more tales": [1, 2]}, MEASURED_ON), "losses['more tales'] has 2 numbers: give 5 "
                                                                         "finite ones"),
    (lambda f: (f, RANKS, LOSSES | {"more tales": [1, 2, 3, 4, np.nan]}, MEASURED_ON), "give 5 finite ones"),
    (lambda f: (f, RANKS, LOSSES, MEASURED_ON, {"more tales": [0, 1]}), "slots['more tales'] has 2 numbers: give 5"),
    (lambda f: (f, RANKS, LOSSES, MEASURED_ON, {"poems": [0] * 5}), "only for restaurants, random targets")])
def test_what_does_not_fit_is_refused_in_a_sentence(factors, change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        spectrum_explorer(*change(factors))
