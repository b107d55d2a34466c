"""Is a merged LoRA free? A forward pass of fable as it is, and with each method, at four shapes; and the ratio that
must be 1.

    python benchmarks/merge_latency.py                           1 x 16, 1 x 128, 8 x 128, 32 x 256
    python benchmarks/merge_latency.py --batch 1 --length 16     one shape
    python benchmarks/merge_latency.py --model 135M --batch 1 --length 128     random weights of SmolLM2-135M's sizes

Rank 8 on every linear layer but the head, adapters and prefix of an equal budget, float32. The variants take turns in
one process, in a new order each round, each with weights of its own; a cell is the median, and the median over the
rounds of the ratio to the base of the same round with its 95 % bootstrap interval. The last line is about merged and
unloaded / base over all shapes: the widest reading of their intervals must lie within 0.97 to 1.03.
"""
import argparse

import torch

from lora_edu import load_pretrained
from lora_edu.course.records.merging import RANK, SHAPES, SMOLLM2, equal_budget
from lora_edu.measure.timing import Times, interleaved, prefill
from lora_edu.models.llama import Llama
from lora_edu.models.pretrained import best_device
from lora_edu.rivals.methods import variants
from lora_edu.tables import Table

MERGED, LOW, HIGH = "merged and unloaded", 0.97, 1.03


def measure(models: dict[str, torch.nn.Module], shape: tuple[int, int], rounds: int, threads: int) -> Times:
    """Short calls are repeated ten times as often: they cost little, and are the noisier ones."""
    base = models["base"]
    ids = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(best_device())
    return interleaved({name: prefill(model, ids) for name, model in models.items()},
                       10 * rounds if shape[0] == 1 else rounds, threads=threads)


def verdict(found: dict[tuple[int, int], Times]) -> str:
    """One line: the ratio whose interval reaches farthest from 1, and what is to be said of it."""
    ratios = [times.ratio(MERGED, "base") for times in found.values()]
    ratio = max(ratios, key=lambda ratio: max(ratio.high - 1, 1 - ratio.low))
    text = ratio.text(HIGH - LOW)
    if text.startswith("too noisy"):
        return text
    return f"{text}: " + (f"within {LOW} to {HIGH}" if LOW <= ratio.low and ratio.high <= HIGH else f"outside {LOW} to "
                                                                                                    f"{HIGH}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="ten times as many at batch 1")
    parser.add_argument("--model", choices=("fable", "135M"), default="fable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="with --length: one shape in place of the four")
    parser.add_argument("--length", type=int)
    args = parser.parse_args()
    if (args.batch is None) != (args.length is None):
        parser.error("--batch and --length go together")
    shapes = [(args.batch, args.length)] if args.batch else SHAPES
    base = (load_pretrained()[0] if args.model == "fable" else Llama(SMOLLM2)).to(best_device())
    models = variants(base, RANK, **equal_budget(base.config))
    print(f"{args.model}, {best_device()}, {args.threads} threads, torch {torch.__version__}; milliseconds, and the "
          "ratio to the base")
    found = {shape: measure(models, shape, args.rounds, args.threads) for shape in shapes}
    rows = [("batch x length", *(f"{batch} x {length}" for batch, length in shapes))]
    for name in models:
        rows.append((name,
                     *(f"{1000 * times.median(name):.2f}  {times.ratio(name, 'base').text()}"
                       for times in found.values())))
    print(Table(rows[0], rows[1:]))
    print(f"{MERGED} / base: {verdict(found)}")


if __name__ == "__main__":
    main()
