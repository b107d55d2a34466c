"""The spectrum explorer: two updates side by side, one matrix, one rank, and what is left of the model.

A spectrum alone would tempt to read energy as learning: the loss beside it is the guard. The page gets the singular
values and what was measured, and nothing is decomposed while a slider moves.
"""
import functools
import re

import numpy as np
import torch
from matplotlib.figure import Figure

from lora_edu.course.figures.spectra import plot_spectra, rising_ranks
from lora_edu.course.labs.lab import Lab
from lora_edu.course.published import PAIRS
from lora_edu.course.records.published import way_come, whole_spectrum
from lora_edu.course.records.stored import load_record, rounded
from lora_edu.measure.spectra import Spectrum, gaussian_like, spectrum

# what a BERT calls its matrices -> what the page has room for
BERT = {"attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
        "attention.output.dense": "attn output", "intermediate.dense": "intermediate", "output.dense": "output"}


def spectrum_explorer(factors: dict, ranks, losses: dict, measured_on: dict, slots: dict | None = None,
                      rank: int = 8, share: str = "slots right") -> Lab:
    """Two updates side by side: a map of their matrices, the spectra of one, and what is left when all are cut.

    Args:
        factors: ``{"restaurants": {"model.layers.0.self_attn.q_proj": (U, S, Vh), ...}, "random targets": ...}``:
            updates of one model, each with the same matrices; U (out, k), S (k,) in falling order, Vh (k, in), k the
            smaller side.
        ranks: the ranks to choose from, rising from 0 to at least the largest k.
        losses: ``{"restaurants": [loss, ...], ...}``, nats per token of the whole model with every matrix cut to each
            of the ranks; empty where only a share was measured.
        measured_on: ``{"restaurants": "restaurants", ...}``, the data those losses were measured on.
        slots: the same for the share of slots right, of those updates for which it was measured; or for another share,
            0 to 1, which is called what ``share`` says.
        rank: where the cut starts.

    The axes are the same for all matrices; white noise of the same median is drawn in.

    Raises:
        ValueError: the updates, ranks, losses and names do not fit together; the sentence says which.
    """
    ranks, slots = rising_ranks(ranks), slots or {}
    places = _check_factors(factors, ranks)
    _check_losses(list(factors) if losses or not slots else [], ranks, losses, measured_on)
    _check_shares(list(factors), ranks, slots)
    layers, matrices = (list(dict.fromkeys(part)) for part in zip(*places))
    first = next(iter(factors.values()))
    shapes = {matrix: [len(first[places[layers[0], matrix]][0]), first[places[layers[0], matrix]][2].shape[1]]
              for matrix in matrices}
    updates = {what: _of_an_update(parts, places, ranks)
               | ({"losses": [float(value) for value in losses[what]], "measured_on": measured_on[what]} if losses
                  else {})
               | ({"slots": [float(value) for value in slots[what]]} if what in slots else {})
               for what, parts in factors.items()}
    noise = {"×".join(map(str, shape)): rounded(_noise_values(tuple(shape))) for shape in shapes.values()}
    data = {"title": "spectra of two updates", "share": share, "ranks": ranks, "layers": layers, "matrices": matrices,
            "shapes": shapes, "updates": updates, "noise": noise}
    names = list(factors)
    state = {"left": names[0], "right": next((name for name in names if name.startswith("random")), names[-1]),
             "layer": layers[0], "matrix": matrices[0], "rank": min(ranks, key=lambda each: abs(each - rank))}
    return Lab("spectrum_explorer", data, state, in_words(data, state), picture(data, state))


def published_explorer(base: str) -> Lab:
    """The same on the published fine-tunes of a base, "all-MiniLM-L6-v2" or "rxnfp-bert_pretrained": from the record,
    so that it needs no weights. Spectra are drawn through the places that are stored.

    >>> published_explorer("rxnfp-bert_pretrained").data["layers"][-1]
    11
    """
    record = load_record("published_transformers")
    names = [name for name, (folder, _) in PAIRS.items() if folder == base]
    parts, kept = {}, {}
    for name in names:
        its = record["pairs"][name]
        parts[name] = {}
        for module, row in its["matrices"].items():
            if place := _short(module):
                (rows, columns), k = row["shape"], min(row["shape"])
                parts[name][place] = (torch.empty(rows, k, device="meta"), whole_spectrum(row["sigma"], k),
                                      torch.empty(k, columns, device="meta"))
        kept[name] = way_come(its)
    return spectrum_explorer(parts, [*record["settings"]["ranks"], k], {}, {}, kept, share="of the way to the whole "
                             "fine-tune")


def _short(module: str) -> str | None:
    """"bert.encoder.layer.3.attention.self.query" is "layers.3.query"; None outside the layers."""
    found = re.search(r"layer\.(\d+)\.(.+)$", module)
    return found and f"layers.{found[1]}.{BERT[found[2]]}"


def _of_an_update(parts: dict, places: dict, ranks: list) -> dict:
    """What the page gets of an update; a place is "layer matrix"."""
    spectra, above = {}, {}
    for (layer, matrix), name in places.items():
        U, S, Vh = parts[name]
        found = Spectrum(S.detach().cpu(), (len(U), Vh.shape[1]))
        spectra[f"{layer} {matrix}"] = rounded(found.values.double().numpy())
        above[f"{layer} {matrix}"] = int(found.above_edge())
    return {"spectra": spectra, "above": above, "energies": _energy_of_all(parts, ranks)}


def in_words(data: dict, state: dict) -> str:
    at, lines = data["ranks"].index(state["rank"]), []
    for what in dict.fromkeys((state["left"], state["right"])):
        its = data["updates"][what]
        lines.append(f"{what}: every matrix cut to rank {state['rank']} keeps {its['energies'][at]:.1%} of the energy"
                     + (f"; loss on {its['measured_on']} {its['losses'][at]:.2f} nats per token (base "
                        f"{its['losses'][0]:.2f}, whole update {its['losses'][-1]:.2f})" if "losses" in its else "")
                     + (f", {data['share']} {its['slots'][at]:.0%}" if "slots" in its else ""))
    return "\n".join(lines)


def picture(data: dict, state: dict) -> Figure:
    place = f"{state['layer']} {state['matrix']}"
    curves = {what: data["updates"][what]["spectra"][place] for what in dict.fromkeys((state["left"], state["right"]))}
    return plot_spectra(curves, f"Layer {state['layer']}, {state['matrix']}: the spectra of two updates")


@functools.cache
def _noise_values(shape: tuple[int, int]) -> np.ndarray:
    """Singular values of a Gaussian matrix whose median singular value is 1, once for each shape."""
    values = spectrum(gaussian_like(torch.ones(shape))).values.numpy()
    return values / np.median(values)


def _energy_of_all(parts: dict, ranks: list) -> list[float]:
    """Share of the squared change of all matrices together, for each rank."""
    squares = [S.detach().cpu().double().square() for _, S, _ in parts.values()]
    total = sum(s.sum().item() for s in squares)
    return [sum(s[:rank].sum().item() for s in squares) / (total or 1.0) for rank in ranks]


def _check_factors(factors: dict, ranks: list) -> dict[tuple[int, str], str]:
    """``{(layer, matrix): name}`` of the matrices, by rising layer; a ValueError where the updates do not fit
    together.
    """
    if not factors or not all(factors.values()):
        raise ValueError('spectrum_explorer needs at least one update with at least one matrix: {"restaurants": {name: '
                         '(U, S, Vh), ...}}.')
    first, *others = factors
    for what in others:
        if odd := sorted(factors[first].keys() ^ factors[what].keys()):
            raise ValueError(f"{odd[0]!r} is in only one of {first!r} and {what!r}: "
                             "every update needs the same matrices.")
    for what, parts in factors.items():
        for name, (U, S, Vh) in parts.items():
            shape = (len(factors[first][name][0]), factors[first][name][2].shape[1])
            if S.ndim != 1 or len(S) != min(shape) or U.shape != (shape[0], len(S)) or Vh.shape != (len(S), shape[1]):
                raise ValueError(f"{name!r} of {what!r} has factors {tuple(U.shape)}, {tuple(S.shape)}, "
                                 f"{tuple(Vh.shape)}: they should be {(shape[0], min(shape))}, {(min(shape),)}, "
                                 f"{(min(shape), shape[1])}, as torch.linalg.svd(delta, "
                                 "full_matrices=False) gives them.")
            if len(S) > ranks[-1]:
                raise ValueError(f"the ranks end at {ranks[-1]}, and {name!r} has {len(S)} singular values: let them "
                                 f"end at {len(S)} or above, so that the last loss is the whole update's.")
    return _places(list(factors[first]))


def _places(names: list[str]) -> dict[tuple[int, str], str]:
    """Layer and matrix of each name, which must form a full table: the controls offer every pair."""
    places = {}
    for name in names:
        found = re.search(r"(?:^|\.)(\d+)\.(?:.*\.)?([^.]+)$", name)
        if not found:
            raise ValueError(f"{name!r} does not say its layer: names must look like "
                             "'model.layers.0.self_attn.q_proj'.")
        place = int(found[1]), found[2]
        if place in places:
            raise ValueError(f"{places[place]!r} and {name!r} are both {place[1]} of layer {place[0]}: "
                             "leave one of them out.")
        places[place] = name
    layers, matrices = sorted({layer for layer, _ in places}), list(dict.fromkeys(matrix for _, matrix in places))
    missing = [f"{matrix} in layer {layer}" for layer in layers for matrix in matrices if (layer, matrix) not in places]
    if missing:
        raise ValueError(f"there is no {missing[0]}: every layer needs the same matrices, here {', '.join(matrices)}.")
    return {(layer, matrix): places[layer, matrix] for layer in layers for matrix in matrices}


def _check_losses(whats: list[str], ranks: list, losses: dict, measured_on: dict) -> None:
    for what in whats:
        if what not in losses or what not in measured_on:
            raise ValueError(f"{'losses' if what not in losses else 'measured_on'} has no entry for {what!r}: give one "
                             f"for each of {', '.join(whats)}.")
        if len(losses[what]) != len(ranks) or not np.isfinite(np.asarray(losses[what], dtype=float)).all():
            raise ValueError(f"losses[{what!r}] has {len(losses[what])} numbers: give {len(ranks)} finite ones, one "
                             f"for each of the ranks {', '.join(map(str, ranks))}.")


def _check_shares(whats: list[str], ranks: list, slots: dict) -> None:
    for what, values in slots.items():
        if what not in whats or len(values) != len(ranks):
            raise ValueError(f"slots[{what!r}] has {len(values)} numbers: give {len(ranks)}, one for each rank, and "
                             f"only for {', '.join(whats)}.")
