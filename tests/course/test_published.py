"""The published pairs: their judges against their cards and against one text at a time; the record against numpy, and
against what was measured of these weights before it was made.
"""
import json
import statistics

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lora_edu.course import load_record
from lora_edu.course.figures.spectra import plot_shares_of_rank
from lora_edu.course.page.real_model import real_copy
from lora_edu.course.published import CLASSES, COMMAND, FINGERPRINTS, PAIRS, SRE, Judge, changes, operations
from lora_edu.course.reactions import KINDS, reactions
from lora_edu.course.records import published
from lora_edu.course.records.stored import RECORDS, rounded
from lora_edu.measure.spectra import Spectrum, factor


def test_reactions_are_different_and_their_marks_are_closed():
    every = reactions(300)
    assert len({smiles for _, smiles in every}) == 300 and {kind for kind, _ in every} == set(KINDS)
    assert reactions(300) == every and reactions(20) == every[:20]
    for _, smiles in every:
        assert smiles.count(">>") == 1 and smiles.count("(") == smiles.count(")") and "{" not in smiles
        for molecule in smiles.replace(">>", ".").split("."):
            assert molecule and molecule.count("1") % 2 == 0, molecule
    with pytest.raises(ValueError, match="n=9999: there are [0-9]+ reactions."):
        reactions(9999)


def atoms(side: str) -> dict[str, int]:
    """Heavy atoms of one side of a reaction, by element."""
    found: dict[str, int] = {}
    i = 0
    while i < len(side):
        symbol = side[i:i + 2] if side[i:i + 2] in ("Br", "Cl") else side[i]
        if symbol[0].isalpha():
            found[symbol.capitalize()] = found.get(symbol.capitalize(), 0) + 1
        i += len(symbol)
    return found


def test_no_atom_is_made_of_nothing():
    """Every heavy atom of a product was in what was put in; an oxidation or a reduction moves hydrogen alone. The one
    that comes from a reagent which is not written is the bromine of a bromide and the chlorine of an acid chloride.
    """
    unwritten = {"bromide": "Br", "acid chloride": "Cl"}
    for kind, smiles in reactions(300):
        before, after = map(atoms, smiles.split(">>"))
        made = {element for element, count in after.items() if count > before.get(element, 0)}
        assert made <= {unwritten.get(kind)}, smiles


def test_terms_and_meanings_are_many_and_share_few_words():
    """Else the search would be one for equal words."""
    pairs = operations()
    assert len({term for term, _ in pairs}) == len({meaning for _, meaning in pairs}) == len(pairs) > 120
    shared = [set(term.split()) & set(meaning.split()) - {"a", "the", "and", "of", "is", "to", "for", "in", "that"}
              for term, meaning in pairs]
    assert sum(map(bool, shared)) < 0.15 * len(pairs)


def test_without_the_weights_the_record_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_EDU_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=COMMAND):
        published.published_transformers()


def test_the_record_is_what_was_measured_before_it_was_made():
    """A maintainer's float32 SVD of the encoders' matrices (2026-11-25): energies in rank 8, 16 and
    32, mean and extremes, and the sizes of the change.
    """
    pairs = load_record("published_transformers")["pairs"]
    # pair -> matrices, mean energy by rank, least and most at rank 8
    said = {SRE: (36, {8: 0.41, 32: 0.68}, (0.22, 0.57)), CLASSES: (72, {8: 0.45, 16: 0.64}, (0.27, 0.74)),
            FINGERPRINTS: (72, {8: 0.30, 16: 0.47}, (0.18, 0.60))}
    for name, (count, means, ends) in said.items():
        rows = [row["energy"] for row in pairs[name]["matrices"].values()]
        assert len(rows) == count
        for rank, mean in means.items():
            kept = [row[published.RANKS[1:].index(rank)] for row in rows]
            assert statistics.mean(kept) == pytest.approx(mean, abs=6e-3)
        eight = [row[published.RANKS[1:].index(8)] for row in rows]
        assert (min(eight), max(eight)) == pytest.approx(ends, abs=6e-3)
    for name, size, off in ((SRE, 0.0137, 0.004), (CLASSES, 0.088, 0.1), (FINGERPRINTS, 0.227, 0.02)):
        sizes = [row["change"] for row in pairs[name]["matrices"].values()]
        assert statistics.mean(sizes) == pytest.approx(size, rel=off)
    assert pairs[SRE]["embedding"]["moved"] == pairs[SRE]["embedding"]["rows"] == 30_522
    assert load_record("published_transformers")["shared"]["cosine of all"] == pytest.approx(0.085, abs=5e-4)


def test_the_record_is_small_and_says_where_it_is_from():
    file = RECORDS / "published_transformers.json"
    assert file.stat().st_size < 400_000
    record = json.loads(file.read_text(encoding="utf-8"))
    for said in [its["source"] for part in ("pairs", "bases") for its in record[part].values()]:
        assert "==" in said["package"] and said["licence"] in ("MIT", "Apache-2.0") and "/" in said["file in it"]
        assert all(len(said[key]) == 64 for key in said if key.startswith("sha256"))


def test_spectra_through_the_stored_places_have_the_energies_of_the_whole_ones():
    """Of a flat and a steep spectrum, of the stored ones, and of one that ends in zeros."""
    for k in (20, 256, 384):
        for power in (0.1, 1.0):
            whole = torch.arange(1, k + 1, dtype=torch.float64) ** -power
            drawn = published.whole_spectrum(published.at_places(whole), k)
            assert len(drawn) == k and torch.allclose(drawn, whole, rtol=1e-2)
    for pair in load_record("published_transformers")["pairs"].values():
        for row in pair["matrices"].values():
            drawn = Spectrum(published.whole_spectrum(row["sigma"], min(row["shape"])), tuple(row["shape"]))
            assert torch.allclose(drawn.energy_kept()[list(published.RANKS[1:])], torch.tensor(row["energy"]).double(),
                                  atol=5e-3)
    zeros = torch.cat([torch.ones(15), torch.zeros(15)])
    assert published.whole_spectrum(published.at_places(zeros), 30)[-1] < 1e-20


def test_everything_on_one_axis_ends_at_everything():
    energy, way, chance = published.on_one_axis()
    for lines in (energy, way, chance):
        for shares, values in lines.values():
            assert len(shares) == len(values) and shares[-1] == 1 and list(shares) == sorted(shares)
    assert all(values[0] == 0 and values[-1] == pytest.approx(1) and values == sorted(values)
               for _, values in (*energy.values(), *chance.values()))
    record = load_record("published_transformers")
    cosine = record["pairs"][SRE]["cut"]["base"]["cosine"]          # of vectors of length 1 the distance is 2 - 2 cos
    assert np.allclose(way[SRE][1], [(each - cosine[0]) / (1 - cosine[0]) for each in cosine], atol=1e-3)
    assert all(1 / 32 in shares for shares, _ in way.values())
    for name in PAIRS:
        assert published.from_spectra(name)["energy"] == pytest.approx(
            record["pairs"][name]["energy"][published.RANKS.index(8)], abs=3e-3)
    fig = plot_shares_of_rank(energy, way, chance, title="Title")
    assert [len(ax.get_lines()) for ax in fig.axes] == [7, 4]
    drawn = {line.get_label(): line for line in fig.axes[1].get_lines()}
    assert np.allclose(drawn[CLASSES].get_ydata(), 100 * np.array(way[CLASSES][1]))
    colors = {line.get_label(): line.get_color() for line in fig.axes[0].get_lines()}
    assert all(line.get_color() == colors[name] for name, line in drawn.items())


def test_an_lstm_cut_to_half_of_each_matrix():
    """Oracle: numpy, matrix by matrix."""
    squares = [np.square(row["sigma"]) for pair in load_record("published_pair")["pairs"].values()
               for row in pair["matrices"].values()]
    half = sum(s[:round(len(s) / 2)].sum() for s in squares) / sum(s.sum() for s in squares)
    assert published._lstm(0.5) == pytest.approx(half)


def test_fine_tunes_share_what_their_angles_say():
    """Oracle: scipy-free principal angles of numpy, on two updates whose first direction is one and the same."""
    rng = np.random.default_rng(0)
    common = np.outer(rng.normal(size=9), rng.normal(size=7)) * 5
    updates = [torch.tensor(common + rng.normal(size=(9, 7)), dtype=torch.float64) for _ in range(2)]
    one, other = (published.Factors(None, {"q": (torch.zeros(9, 7), *torch.linalg.svd(update, full_matrices=False))})
                  for update in updates)
    found = published.shared(one, other, k=2)
    (U, _, Vh), (V, _, Wh) = (np.linalg.svd(update.numpy(), full_matrices=False) for update in updates)
    want = [(np.linalg.svd(a, compute_uv=False) ** 2).mean() for a in (U[:, :2].T @ V[:, :2], Vh[:2] @ Wh[:2].T)]
    cosine = (updates[0] * updates[1]).sum() / (updates[0].norm() * updates[1].norm())
    assert found["matrices"]["q"] == rounded([*want, 2 / 9, 2 / 7, cosine])
    assert found["cosine of all"] == rounded([cosine])[0]


def test_rows_that_only_shrank_are_told_from_rows_that_learned(tmp_path):
    from lora_edu import deltas
    base = torch.nn.ModuleDict({"word_embeddings": torch.nn.Embedding(6, 8), "fc": torch.nn.Linear(3, 3)})
    tuned = torch.nn.ModuleDict({"word_embeddings": torch.nn.Embedding(6, 8), "fc": torch.nn.Linear(3, 3)})
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned["word_embeddings"].weight[:4] *= 0.999
        tuned["word_embeddings"].weight[0] += 0.1
    found = published.embedding_rows(deltas(base, tuned))
    assert (found["rows"], found["moved"], found["only shrunk"]) == (6, 4, 3)
    assert found["shrunk by"] == pytest.approx([1e-3] * 3, rel=1e-3)


@pytest.mark.real
def test_the_sentence_vectors_are_those_of_the_models_card(published_weights):
    """The card's own example and the similarities that it prints."""
    judge = Judge(SRE, 5)
    vectors = judge.embed(judge.full, ["self-healing", "system detects and recovers from failures automatically",
                                       "runtime error prevented container from starting"])
    assert torch.allclose(vectors @ vectors.T, torch.tensor([[1, 0.9505, 0.6978], [0.9505, 1, 0.6172],
                                                             [0.6978, 0.6172, 1]]), atol=1e-4)


@pytest.mark.real
def test_the_classifier_tells_our_kinds_of_reactions_apart(published_weights):
    """It was trained on others: each of our kinds is one class to it, and no two are the same."""
    judge = Judge(CLASSES, 120)
    found = judge.run(judge.full, judge.ids(judge.smiles)).argmax(-1).tolist()
    classes = dict(zip(judge.kinds, found))
    assert len(set(classes.values())) == len(KINDS) and [classes[kind] for kind in judge.kinds] == found


@pytest.mark.real
@pytest.mark.parametrize("name", PAIRS)
def test_a_row_does_not_depend_on_its_neighbours(name, published_weights):
    """Padding is masked: one text at a time gives the same."""
    judge = Judge(name, 6)
    rows = judge.ids((*judge.terms, *judge.meanings) if name == SRE else judge.smiles)
    together = judge.run(judge.full, rows)
    assert torch.allclose(together, torch.cat([judge.run(judge.full, [row]) for row in rows]), atol=2e-5)
    scores = judge.scores(judge.full)
    assert scores["agreement"] == 1 and scores["distance"] == 0 and scores.get("centred", 1) == pytest.approx(1)


@pytest.mark.real
def test_what_all_texts_have_in_common_does_not_count_when_centred(published_weights, monkeypatch):
    judge = Judge(SRE, 6)
    whole, shift = judge._full_outputs, 3 * torch.nn.functional.normalize(torch.ones(384), dim=0)
    monkeypatch.setattr(judge, "vectors", lambda model: whole + shift)
    scores = judge.scores(judge.full)
    assert scores["centred"] == pytest.approx(1) and scores["cosine"] < 0.5
    assert scores["distance"] == pytest.approx(9)


@pytest.mark.real
@pytest.mark.parametrize("name", PAIRS)
def test_the_records_spectra_are_numpys(name, published_weights):
    """Three matrices of each pair, in float64, from the files themselves."""
    pair = load_record("published_transformers")["pairs"][name]
    base, tuned = (load_file(real_copy(folder) / "model.safetensors") for folder in PAIRS[name])
    modules = list(pair["matrices"])
    for module in (modules[0], modules[len(modules) // 2], modules[-1]):
        row, own = pair["matrices"][module], module if f"{module}.weight" in tuned else module.removeprefix("bert.")
        W, change = base[f"{module}.weight"].astype(float), 0
        change = tuned[f"{own}.weight"].astype(float) - W
        sigma = np.linalg.svd(change, compute_uv=False)
        energy = np.cumsum(sigma**2) / (sigma**2).sum()
        assert np.allclose(row["sigma"], [sigma[place - 1] for place in published.stored_places(len(sigma))], rtol=1e-3)
        assert np.allclose(row["energy"], [energy[rank - 1] for rank in published.RANKS[1:]], atol=1e-3)
        assert row["change"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(W), rel=1e-3)
        assert row["rank 90"] == int((energy < 0.9).sum()) + 1
        weights = load_record("published_transformers")["bases"][PAIRS[name][0]]["sigma"][module]
        whole = np.linalg.svd(W, compute_uv=False)
        assert np.allclose(weights, [whole[place - 1] for place in published.stored_places(len(whole))], rtol=1e-3)


@pytest.mark.real
def test_the_record_comes_out_again(published_weights):
    """Short: fewer texts and ranks, one run of the whole command."""
    small = published.published_transformers(n=12, n_ranks=2)
    stored = load_record("published_transformers")
    for name, pair in small["pairs"].items():
        assert pair["source"]["package"] == stored["pairs"][name]["source"]["package"]
        assert np.allclose(pair["energy"], stored["pairs"][name]["energy"], atol=1e-3)
        assert pair["outside"].keys() == stored["pairs"][name]["outside"].keys()
        assert pair["embedding"] == stored["pairs"][name]["embedding"]
        assert set(pair["cut"]) == {"base", "tuned"} and pair["whole"]["agreement"] == 1
        assert pair["slice"]["agreement"] == pytest.approx(stored["pairs"][name]["slice"]["agreement"], abs=0.05)
    assert small["shared"]["cosine of all"] == pytest.approx(stored["shared"]["cosine of all"], abs=1e-3)


@pytest.mark.real
def test_a_whole_update_with_the_fine_tunes_rest_is_the_fine_tune(published_weights):
    """And rank 0 with the base's is the base: its head apart, which the base has not."""
    judge, pair = Judge(CLASSES, 8), changes(CLASSES)
    whole, none = (judge.cut(factor(pair), rank, rest) for rank, rest in ((256, "tuned"), (0, "base")))
    full = judge.full.state_dict()
    assert all(torch.allclose(tensor, full[name], atol=1e-6) for name, tensor in whole.state_dict().items())
    stored = load_file(real_copy(PAIRS[CLASSES][0]) / "model.safetensors")
    for name, tensor in none.state_dict().items():
        assert np.array_equal(tensor.numpy(), stored[name] if name in stored else full[name].numpy()), name
