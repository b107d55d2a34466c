"""The long experiments, one command each: python -m lora_edu.record NAME [--tales FILE] [--pair FOLDER] [--scratch
FOLDER]

    bistro_adapter    the adapter that notebook 00 opens with, into models/fable/bistro_lora
    lora_beside_full  LoRA and full fine-tuning on bistro and python_docs
    lora_rates        one LoRA at seven learning rates
    placements        the same number of trainable numbers in different matrices
    spectra           full fine-tunings cut to every rank, and their nulls (after lora_beside_full)
    published_pair    spectra of a published fine-tune, from --pair FOLDER
    rank_alpha        rank x learning rate x alpha rule x task
    rank_seeds        the best rate of each rank with more seeds, and more steps (after rank_alpha)
    two_rates         ranks 8 and 64 with alpha and the rate both free (after rank_alpha)
    planted_rank      students of teachers whose rank is known
    methods           seven methods on restaurants, equal budgets
    plateau           LoRA and full fine-tuning until neither gains (after lora_beside_full)
    placements_docs   the placements on documentation
    optimizers        full fine-tuning by SGD, and its spectrum
    latency           what each of them costs in time when it is used
    published_transformers  three published fine-tunes, nothing trained (after `python dev.py real minilm sre rxnfp`)
    real_model        LoRA and full fine-tuning of SmolLM2-135M-Instruct beside fable (after `python dev.py real`)
    trade_adapters    the adapters of fable's two other trades, into models/fable/
    adapter_mixer     the three shipped adapters, mixed (after trade_adapters)
    from_scratch      the updates of both, beside each other (after real_model)

A record is small JSON beside this file, with its settings, seeds, device, versions and date; notebooks show it and
re-measure a slice. Rules (the same for every method): the learning rate is chosen on the validation split, from a grid
of factor 2 that is widened until the best is not on its edge; the test split is reported; data order is fixed by the
seed. "Full" trains exactly the matrices that LoRA adapts, embedding and norms frozen.
"""
import argparse
import time
from pathlib import Path

import torch

from lora_edu.course.records import (
    comparisons,
    from_scratch,
    merging,
    published,
    rank,
    real,
    sharing,
    spectra,
    verdicts,
)
from lora_edu.course.records.stored import load_record, store_record

# name -> how to make it from the command's options
EXPERIMENTS = {
    "bistro_adapter": lambda options: comparisons.bistro_adapter(options.tales),
    "lora_beside_full": lambda options: comparisons.lora_beside_full(options.tales),
    "lora_rates": lambda options: comparisons.lora_rates(options.tales),
    "placements": lambda options: comparisons.placements(options.tales),
    "spectra": lambda options: spectra.spectra(),
    "published_pair": lambda options: spectra.published_pair(options.pair),
    "rank_alpha": lambda options: rank.rank_alpha(
        scratch=options.scratch, known=load_record("rank_alpha") if options.go_on else None),
    "rank_seeds": lambda options: rank.rank_seeds(scratch=options.scratch),
    "two_rates": lambda options: rank.two_rates(scratch=options.scratch),
    "planted_rank": lambda options: rank.planted_rank(),
    "methods": lambda options: merging.methods(options.tales, scratch=options.scratch),
    "plateau": lambda options: verdicts.plateau(options.tales, scratch=options.scratch),
    "placements_docs": lambda options: verdicts.placements_docs(scratch=options.scratch),
    "optimizers": lambda options: verdicts.optimizers(scratch=options.scratch),
    "latency": lambda options: merging.latency(),
    "published_transformers": lambda options: published.published_transformers(),
    "real_model": lambda options: real.real_model(scratch=options.scratch),
    "from_scratch": lambda options: from_scratch.from_scratch(),
    "adapter_mixer": lambda options: sharing.adapter_mixer(),
    "trade_adapters": lambda options: sharing.trade_adapters(options.tales),
}
IN_FLOAT32 = ("planted_rank", "latency", "published_transformers", "adapter_mixer")   # whatever is faster here


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lora_edu.record",
                                     description="Make one of the course's records again.")
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--tales", metavar="FILE", help="a held-out text of tales, to measure forgetting on as well")
    parser.add_argument("--pair", metavar="FOLDER",
                        help="published_pair: where base.safetensors and ft_*.safetensors are")
    parser.add_argument("--scratch", metavar="FOLDER",
                        help="keep finished runs there, to go on (what takes long can)")
    parser.add_argument("--go-on", action="store_true",
                        help="rank_alpha: take over the cells that the stored record has, and train the others")
    options = parser.parse_args()
    if options.scratch:
        Path(options.scratch).mkdir(parents=True, exist_ok=True)
    began = time.time()
    content = EXPERIMENTS[options.name](options)
    said = " --pair FOLDER" if options.pair else " --go-on" if options.go_on else ""
    store_record(options.name, content, began, options=said,
                 products=torch.float32 if options.name in IN_FLOAT32 else None)
    print(f"stored {options.name} after {(time.time() - began) / 60:.1f} minutes")
