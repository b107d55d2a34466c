"""How long it takes to cut a LoRA out of a full fine-tune: `extract_lora` beside a full SVD of every matrix.

    python benchmarks/extract_speed.py                    a pair shaped like SmolLM2-135M, one of 2048 x 2048, and fable
    python benchmarks/extract_speed.py --layers 2 --runs 1 --side 512     a small try

and, where `python dev.py real minilm sre rxnfp` has fetched them, the published pairs.

The pair lies in two safetensors files. Ours is the whole of `extract_lora` at rank 16: reading, subtracting, factors,
reports, writing. The other side is what the usual extractors do: `torch.linalg.svd` of each ΔW, cut to rank 16, its
factors in the same form; the files are read and subtracted there too. Both run in one process, one after the other in
every run, with 2 threads; medians are compared.

What the pair's change looks like: singular values 1 / (i + 3)^p, i = 1, 2, ..., with p = 0.8 in the attention and 0.6
in the MLP, random singular vectors, and white noise of a tenth of its norm. The updates of a full fine-tune of fable on
200 steps of bistro follow these powers down to i = 128 and then fall faster; a flat spectrum is the hard case. The 2048
x 2048 matrix has p = 0.6.
"""
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_edu import load_pretrained
from lora_edu.checkpoints.deltas import deltas
from lora_edu.checkpoints.extract import best_part, extract_lora
from lora_edu.measure.spectra import spectrum

RANK, THREADS = 16, 2
SHAPES = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
          "self_attn.o_proj": (576, 576),
          "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}


def like_fine_tuning(out: int, into: int, power: float, generator: torch.Generator) -> torch.Tensor:
    """A change with the spectrum described above, of Frobenius norm 1."""
    k = min(out, into)
    U, V = (torch.linalg.qr(torch.randn(side, k, generator=generator)).Q for side in (out, into))
    S = (torch.arange(1, k + 1) + 3.0) ** -power
    noise = torch.randn(out, into, generator=generator) / (out * into) ** 0.5
    change = (U * (S / S.norm())) @ V.T + 0.1 * noise
    return change / change.norm()


def write_pair(folder: Path, layers: int) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for layer in range(layers):
        for name, (out, into) in SHAPES.items():
            full = f"model.layers.{layer}.{name}.weight"
            power = 0.8 if "attn" in name else 0.6
            base[full] = torch.randn(out, into, generator=generator) / into**0.5
            tuned[full] = base[full] + 0.05 * base[full].norm() * like_fine_tuning(out, into, power, generator)
    for file, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, folder / f"{file}.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def with_full_svds(base: Path, tuned: Path, out: Path) -> None:
    factors = {}
    for name, _, delta in deltas(base, tuned):
        U, S, Vh = full_svd(delta)
        factors[f"{name}.lora_A"] = (S.sqrt()[:, None] * Vh).contiguous()
        factors[f"{name}.lora_B"] = (U * S.sqrt()).contiguous()
    save_file(factors, out)


def full_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :RANK], S[:RANK], Vh[:RANK]


def excess(matrix: torch.Tensor) -> float:
    """Our error over that of the best rank-16 part, less 1; Frobenius norms in float64."""
    matrix = matrix.double()
    ours, best = ((matrix - (U.double() * S) @ Vh.double()).norm().item() for U, S, Vh in
                  (best_part(matrix.float(), RANK), full_svd(matrix)))
    return ours / best - 1


def interleaved(runs: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of each; they take turns, so that a noisy machine is noisy for all of them."""
    times = [[] for _ in calls]
    for _ in range(runs):
        for each, call in zip(times, calls, strict=True):
            began = time.perf_counter()
            call()
            each.append(time.perf_counter() - began)
    return [statistics.median(each) for each in times]


def compare(title: str, ours: float, full: float, worst: float) -> None:
    print(f"{title}: ours {ours:.3f} s, full SVD {full:.3f} s, {full / ours:.1f} times as fast; worst excess error "
          f"{worst:.1e}", flush=True)


def time_pair(layers: int, runs: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pair = write_pair(folder, layers)
        outs = iter(range(10**6))
        ours, full = interleaved(runs, lambda: extract_lora(*pair, rank=RANK, out=folder / str(next(outs))),
                                 lambda: with_full_svds(*pair, folder / "full.safetensors"))
        # one layer: each shape once
        worst = max(excess(delta) for (_, _, delta), _ in zip(deltas(*pair), SHAPES))
    compare(f"a pair of {layers} layers shaped like SmolLM2-135M, rank {RANK}", ours, full, worst)


def time_square(side: int, runs: int) -> None:
    matrix = like_fine_tuning(side, side, 0.6, torch.Generator().manual_seed(1))
    best_part(matrix, RANK)         # the first call of a size is slower
    ours, full = interleaved(runs, lambda: best_part(matrix, RANK), lambda: full_svd(matrix))
    compare(f"one matrix of {side} x {side}, rank {RANK}", ours, full, excess(matrix))


def time_fable(runs: int) -> None:
    base = load_pretrained()[0]
    tuned = load_pretrained()[0]
    generator = torch.Generator().manual_seed(2)
    for name, _, delta in deltas(base, base):
        tuned.get_submodule(name).weight.data += like_fine_tuning(*delta.shape, 0.6, generator)
    seconds, = interleaved(max(runs, 3), lambda: [spectrum(delta) for _, _, delta in deltas(base, tuned)])
    print(f"all singular values of fable's 28 matrices: {seconds:.2f} s")


def time_published(runs: int) -> None:
    """MiniLM to SRE, and rxnfp to 50 classes, whose matrices of 256 are decomposed whole by both: a tie at best."""
    from lora_edu.course.page.real_model import real_copy
    from lora_edu.course.published import CLASSES, PAIRS, SRE, are_there
    for name in (SRE, CLASSES) if are_there() else ():
        pair = [real_copy(folder) for folder in PAIRS[name]]
        with tempfile.TemporaryDirectory() as place:
            outs = iter(range(10**6))
            ours, full = interleaved(runs, lambda: extract_lora(*pair, rank=RANK, out=Path(place) / str(next(outs))),
                                     lambda: with_full_svds(*pair, Path(place) / "full.safetensors"))
        compare(f"{name}, rank {RANK}", ours, full, max(excess(delta) for _, _, delta in deltas(*pair) if delta.any()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--side", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(f"medians of {args.runs} runs, {THREADS} threads, float32, torch {torch.__version__}")
    time_pair(args.layers, args.runs)
    time_square(args.side, args.runs)
    time_fable(args.runs)
    time_published(args.runs)


if __name__ == "__main__":
    main()
