"""The record of published transformers in notebook 03: their fine-tunes' spectra, and what a cut costs.

    python dev.py real minilm sre rxnfp && python -m lora_edu.record published_transformers

Nothing is trained. Singular values are stored at `AT`, all the first sixteen and ever fewer after them.
"""
import re

import torch

from lora_edu.checkpoints.deltas import ChangeReport, Deltas
from lora_edu.course.page.real_model import real_copy
from lora_edu.course.published import CLASSES, COMMAND, FINGERPRINTS, PAIRS, SRE, Judge, are_there, changes
from lora_edu.course.records.stored import load_record, rounded
from lora_edu.files import checksum
from lora_edu.measure.spectra import Factors, Spectrum, factor, gaussian_like, sign_flipped, spectrum

RANKS = (0, 1, 2, 4, 8, 12, 16, 32, 64, 128)      # 12 of 384 are as large a share as 8 of 256
# places (from 1) of the singular values that are stored
AT = (*range(1, 17), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16), *range(160, 1025, 32))
SLICE = 60            # texts of the slice that the notebook measures again
SHARED = 8            # directions of two fine-tunes that are compared


def stored_places(k: int) -> list[int]:
    """Which of k singular values a record holds, counted from 1: the last ones, which fall steeply, are among them.

    >>> stored_places(40)[-8:]
    [20, 24, 28, 32, 36, 38, 39, 40]
    """
    last = {place for place in (k - 16, k - 8, k - 4, k - 2, k - 1, k) if place > 0}
    return sorted(last | {place for place in AT if place < k})


def at_places(values: torch.Tensor) -> list[float]:
    return rounded(values[place - 1] for place in stored_places(len(values)))


def whole_spectrum(stored: list[float], k: int) -> torch.Tensor:
    """All k singular values from those that are stored: between two of them on a straight line of the logarithms.

    >>> whole_spectrum([8.0] * 16 + [8.0, 2.0, 2.0, 2.0], 22)[-6:].round(decimals=3).tolist()
    [8.0, 8.0, 4.0, 2.0, 2.0, 2.0]
    """
    places = torch.tensor(stored_places(k), dtype=torch.float64)
    logs = torch.tensor(stored, dtype=torch.float64).clamp_min(1e-30).log()
    want = torch.arange(1, k + 1, dtype=torch.float64)
    right = torch.searchsorted(places, want).clamp(1, len(places) - 1)
    left = right - 1
    share = (want - places[left]) / (places[right] - places[left])
    return (logs[left] + share * (logs[right] - logs[left])).exp()


def source(folder: str) -> dict:
    """Package, version, checksums and licence, as `python dev.py real` wrote them down."""
    text = " ".join((real_copy(folder) / "SOURCE.md").read_text(encoding="utf-8").split())
    said = re.search(r"the package (\S+) \(sha256 of its wheel (\w+)\), licence (\S+): ([^,]+)", text)
    return {"package": said[1], "sha256 of the wheel": said[2], "licence": said[3], "file in it": said[4],
            "sha256 of model.safetensors": checksum(real_copy(folder) / "model.safetensors")}


def of_a_matrix(weight: torch.Tensor, values: torch.Tensor, delta: torch.Tensor) -> dict:
    """Of one changed matrix: size and spectrum of the change, energy at each rank, and that of the same entries with
    new signs.
    """
    its, flipped = Spectrum(values, tuple(delta.shape)), spectrum(sign_flipped(delta))
    return {"shape": list(delta.shape), "change": rounded([delta.norm() / weight.norm()])[0],
            "rank 90": int(its.rank_for(0.9)), "energy": rounded(its.energy_kept()[list(RANKS[1:])]),
            "signs flipped": rounded(flipped.energy_kept()[list(RANKS[1:])]), "sigma": at_places(its.values)}


def outside(report: ChangeReport) -> dict:
    """Squared change by kind, and of how many tensors; None where no difference can be taken."""
    kinds: dict[str, list] = {"matrices": [report.matrices, rounded([report.squared])[0]]}
    for other in report.others:
        count, squared = kinds.get(other.kind, [0, 0.0])
        kinds[other.kind] = [count + 1, None if other.squared is None else rounded([squared + other.squared])[0]]
    return kinds


def embedding_rows(pair: Deltas) -> dict:
    """How each token's row moved. Weight decay alone shrinks every row by one factor, whether its token was seen or
    not; what learned has left that line.
    """
    name = next(name for name in pair.base.names if name.endswith("word_embeddings.weight"))
    before, after = (side.get(name).double() for side in (pair.base, pair.tuned))
    moved = after - before
    shrunk = -(moved * before).sum(1) / before.square().sum(1)
    rest = (moved + shrunk[:, None] * before).norm(dim=1) / before.norm(dim=1)
    changed = (moved != 0).any(1)
    decayed = changed & (rest < 1e-4)       # rounding of float32 over the steps leaves about 1e-5
    return {"rows": len(before), "moved": int(changed.sum()), "only shrunk": int(decayed.sum()),
            "shrunk by": rounded(shrunk[decayed].quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)))
            if decayed.any() else None}


def cuts(judge: Judge, factors: Factors, n_ranks: int) -> dict[str, dict[str, list[float]]]:
    """What the judge says of the model cut to each of the first ranks, and whole, with the base's or the fine-tune's
    rest: {rest: {score: one a rank}}.
    """
    whole = max(len(S) for _, _, S, _ in factors.parts.values())
    found: dict[str, dict[str, list]] = {}
    for rest in ("base", "tuned"):
        for rank in (*RANKS[:n_ranks], whole):
            scores = judge.scores(judge.cut(factors, rank, rest))
            print(judge.name, rest, rank, scores, flush=True)
            for what, value in scores.items():
                found.setdefault(rest, {}).setdefault(what, []).append(round(value, 4))
    return found


def encoder(factors: Factors) -> Factors:
    """Without the pooler, a matrix before the head: the pretraining of both bases has hardly used it, so that its
    change is no fine-tuning of something that was there.
    """
    return Factors(factors.deltas, {name: parts for name, parts in factors.parts.items() if "pooler" not in name})


def measured_again(name: str, n: int = SLICE) -> dict:
    """What the notebook measures again where the weights are: energy at rank 8, and a shorter examination."""
    factors, judge = factor(changes(name)), Judge(name, n)
    scores = judge.scores(judge.cut(factors, 8))
    return {"texts": n, "rank": 8, "energy": encoder(factors).energy_kept(8)} | scores


def one(name: str, n: int, n_ranks: int) -> tuple[dict, Factors]:
    """One pair: what the record says of it, and its factors."""
    pair = changes(name)
    factors = factor(pair)
    inner, judge = encoder(factors), Judge(name, n)
    squares = {module: S.square().sum().item() for module, (_, _, S, _) in factors.parts.items()}
    pooler = next(module for module in factors.parts if module not in inner.parts)
    said = {"base": PAIRS[name][0], "source": source(PAIRS[name][1]), "ranks": [*RANKS[:n_ranks], "whole"],
            "texts": len(judge.terms) * 2 if name == SRE else len(judge.smiles),
            "energy": rounded([inner.energy_kept(rank) for rank in RANKS]),
            "matrices": {module: of_a_matrix(W, S, (U * S) @ Vh) for module, (W, U, S, Vh) in inner.parts.items()},
            "pooler": {"change": rounded([squares[pooler] ** 0.5 / factors.parts[pooler][0].norm()])[0],
                       "share of the squared change": rounded([squares[pooler] / sum(squares.values())])[0]},
            "outside": outside(pair.report()), "embedding": embedding_rows(pair),
            "whole": judge.scores(judge.full), "slice": measured_again(name), "cut": cuts(judge, factors, n_ranks)}
    return said, inner


def of_a_base(folder: str, factors: Factors) -> dict:
    """The weights before: of each matrix the stored singular values and the rank for 90 % of their energy."""
    spectra = {name: spectrum(W) for name, (W, *_) in factors.parts.items()}
    return {"source": source(folder), "sigma": {name: at_places(its.values) for name, its in spectra.items()},
            "rank 90": {name: int(its.rank_for(0.9)) for name, its in spectra.items()}}


def phi(one: torch.Tensor, other: torch.Tensor) -> float:
    """How much two subspaces share, 0 to 1: the squared cosines of the angles between them, mean; bases are
    orthonormal, (side, k). By chance it is k over the side. Source: Hu et al. (2021), section 7.2.
    """
    return (one.T @ other).square().sum().item() / one.shape[1]


def shared(one: Factors, other: Factors, k: int = SHARED) -> dict:
    """`phi` of the k leading directions of two fine-tunes of one base, on the output side (left) and the input side,
    and the cosine of the updates.
    """
    rows, inners, squares = {}, 0.0, [0.0, 0.0]
    for name, (_, U, S, Vh) in one.parts.items():
        _, V, T, Wh = other.parts[name]
        left, right = phi(U[:, :k], V[:, :k]), phi(Vh[:k].T, Wh[:k].T)
        inner = ((U * S).T @ (V * T) * (Vh @ Wh.T)).sum().item()
        inners, squares = inners + inner, [squares[0] + S.square().sum().item(), squares[1] + T.square().sum().item()]
        rows[name] = rounded([left, right, k / len(U), k / Vh.shape[1], inner / (S.norm() * T.norm())])
    return {"directions": k, "columns": ["left", "right", "chance left", "chance right", "cosine of the updates"],
            "matrices": rows, "cosine of all": rounded([inners / (squares[0] * squares[1]) ** 0.5])[0]}


def noise(shapes: set[tuple[int, int]]) -> dict[str, list[float]]:
    """Energy that a Gaussian matrix of each shape keeps at each rank from 1."""
    found = {shape: spectrum(gaussian_like(torch.ones(shape))) for shape in sorted(shapes)}
    return {"x".join(map(str, shape)): rounded(its.energy_kept()[list(RANKS[1:])]) for shape, its in found.items()}


@torch.no_grad()
def published_transformers(n: int = 300, n_ranks: int = len(RANKS)) -> dict:
    """Three published pairs, from the cache: records/published_transformers.json. Smaller numbers are for a test.

    Raises:
        FileNotFoundError: the weights are not there; with the command that fetches them.
    """
    if not are_there():
        raise FileNotFoundError(f"the published weights are not in {real_copy('')}, or transformers is missing: run "
                                f"{COMMAND} first.")
    pairs, factors = {}, {}
    for name in PAIRS:
        pairs[name], factors[name] = one(name, n, n_ranks)
    bases = {folder: factors[name] for name, (folder, _) in PAIRS.items()}
    shapes = {tuple(matrix["shape"]) for pair in pairs.values() for matrix in pair["matrices"].values()}
    return {"settings": {"ranks": list(RANKS), "places of sigma": "see stored_places in records/published.py",
                         "rest": "base: all but the cut updates is the base's (a head that the base has not: the "
                                 "fine-tune's); tuned: all else is the fine-tune's",
                         "rules not kept": "one fine-tune each: what is published has no seeds"},
            "bases": {folder: of_a_base(folder, its) for folder, its in bases.items()}, "gaussian": noise(shapes),
            "pairs": pairs, "shared": shared(factors[CLASSES], factors[FINGERPRINTS])}


def way_come(pair: dict) -> list[float]:
    """Of one pair of the record, for each rank: which share of the squared distance between the base's outputs and the
    whole fine-tune's is no longer there, beside the base's rest.
    """
    far = pair["cut"]["base"]["distance"]
    return [1 - each / far[0] for each in far]


def on_one_axis() -> tuple[dict, dict, dict]:
    """What `plot_shares_of_rank` draws by the share of all directions that is kept: energy; the share of the way from
    the base's outputs to the whole fine-tune's (of fable: of the improvement in loss); chance (MiniLM's matrices).
    """
    record, fable = load_record("published_transformers"), load_record("spectra")
    runs = fable.runs(task="bistro", null=None, trains="matrices")
    shares = [rank / fable["settings"]["ranks"][-1] for rank in fable["settings"]["ranks"]]
    energy, way = {"fable": (shares, runs.mean("energy"))}, {"fable": (shares, runs.mean("gain"))}
    for name, pair in record["pairs"].items():
        k = min(next(iter(pair["matrices"].values()))["shape"])
        shares = [rank / k for rank in (*RANKS, k)]
        energy[name] = (shares, [*pair["energy"], 1.0])
        way[name] = (shares, way_come(pair))
    energy["LSTM, four fine-tunes"] = (shares, [_lstm(share) for share in shares])
    matrices = record["pairs"][SRE]["matrices"].values()
    shares = [rank / 384 for rank in RANKS] + [1.0]
    chance = {}
    for what, kept in (("white noise", [record["gaussian"]["x".join(map(str, m["shape"]))] for m in matrices]),
                       ("signs flipped", [m["signs flipped"] for m in matrices])):
        chance[what] = (shares, [0.0, *(sum(column) / len(column) for column in zip(*kept)), 1.0])
    return energy, way, chance


def from_spectra(name: str) -> dict:
    """`measured_again` without the weights: the energy at rank 8 from the stored singular values alone."""
    pair = load_record("published_transformers")["pairs"][name]
    squares = [whole_spectrum(row["sigma"], min(row["shape"])).square() for row in pair["matrices"].values()]
    kept = sum(s[:8].sum() for s in squares) / sum(s.sum() for s in squares)
    return {"texts": 0, "rank": 8, "energy": kept.item(), "agreement": pair["slice"]["agreement"]}


def _lstm(share: float) -> float:
    """Energy of all matrices of the record published_pair, each cut to this share of its directions."""
    rows = [torch.tensor(row["sigma"], dtype=torch.float64).square()
            for pair in load_record("published_pair")["pairs"].values() for row in pair["matrices"].values()]
    return float(sum(row[:round(share * len(row))].sum() for row in rows) / sum(row.sum() for row in rows))
