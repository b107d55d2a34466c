"""The records of notebook 06, made by `python -m lora_edu.record NAME`:

    latency    forward passes and tokens of fable and of a model of 135 M parameters, as they are and with each method,
    timed side by
               side, with the operators that each one runs
    methods    seven ways to learn restaurants, at an equal budget where one can be had, each at its own best learning
    rate
"""
from dataclasses import replace
from pathlib import Path

import torch

from lora_edu.course.records.runs import SEEDS, before, run, said, tales_to_forget, tuned_and_repeated
from lora_edu.files import once
from lora_edu.measure.operators import matrix_products, operators
from lora_edu.measure.timing import Times, decode, interleaved, prefill
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.models.sizes import PRESETS
from lora_edu.rivals.methods import METHODS, variants
from lora_edu.course.tasks import BATCH, Task

RANK, TOKENS = 8, 8                      # tokens that one timed call of `decode` makes
SHAPES = ((1, 16), (1, 128), (8, 128), (32, 256))      # batch x length
SMOLLM2 = replace(PRESETS["smollm2-135m"], context=2048).llama_config()
# where the search for a learning rate begins, the same factor 2 for all; it goes on until the best rate is not the
# smallest or largest
RATES = {"full": (1e-3, 2e-3, 4e-3), "lora": (8e-3, 1.6e-2, 3.2e-2), "adapters (two a block)": (8e-3, 1.6e-2, 3.2e-2),
         "adapters (one a block)": (8e-3, 1.6e-2, 3.2e-2), "prefix": (0.064, 0.128, 0.256),
         "prompt": (0.064, 0.128, 0.256),
         "BitFit": (0.032, 0.064, 0.128)}


def equal_budget(config: LlamaConfig, rank: int = RANK) -> dict[str, int]:
    """The bottleneck (two adapters a block), the prefix and the rank on queries and values alone that train about as
    many numbers as LoRA on all linear layers.
    """
    C, q, kv, wide = (config.hidden_size, config.num_attention_heads * config.head_dim,
                      config.num_key_value_heads * config.head_dim,
                      config.intermediate_size)
    lora = rank * (2 * (C + q) + 2 * (C + kv) + 3 * (C + wide))          # of one block
    return {"bottleneck": round((lora / 2 - C) / (2 * C + 1)), "prefix": round(lora / (2 * kv)),
            "narrow": min(round(lora / (2 * C + q + kv)), q, kv)}


def table(times: Times, calls: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds (of one of `calls`): median and quartiles; and the ratio to the base with its interval."""
    found = {}
    for name in times.seconds:
        ratio = times.ratio(name, "base")
        ms = (1000 / calls * seconds for seconds in (times.median(name), *times.quartiles(name)))
        found[name] = {key: round(value, 4) for key, value in
                       zip(("ms", "low", "high", "ratio", "ratio_low", "ratio_high"),
                           (*ms, ratio.value, ratio.low, ratio.high))}
    return found


def measure(base: Llama, shapes: tuple, rounds: int, many: int) -> dict:
    """One model at all shapes; `many` rounds where the batch is 1 (decoding always is).

    Decoding depends on the length alone.
    """
    device, budget = next(base.parameters()).device, equal_budget(base.config)
    models = variants(base, RANK, **budget)
    ids = {shape: torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
           for shape in shapes}
    seen = {name: operators(model, ids[shapes[0]]) for name, model in models.items()}
    decoded, found = {}, []
    for batch, length in shapes:
        count = many if batch == 1 else rounds
        read = interleaved({name: prefill(model, ids[batch, length]) for name, model in models.items()}, count)
        if length not in decoded:
            calls = {name: decode(model, ids[batch, length][:1], TOKENS) for name, model in models.items()}
            decoded[length] = table(interleaved(calls, many), TOKENS)
        found.append({"batch": batch, "length": length, "rounds": count, "prefill": table(read),
                      "decode": decoded[length]})
        print(f"{batch} x {length}: "
              + ", ".join(f"{name} {row['ms']:.1f} ms" for name, row in found[-1]["prefill"].items()), flush=True)
    return {"parameters": sum(p.numel() for p in base.parameters()),
            "dtype": str(next(base.parameters()).dtype).removeprefix("torch.")
            } | budget | {"operators": {name: len(names) for name, names in seen.items()},
                          "matrix products": {name: matrix_products(names) for name, names in seen.items()},
                          "shapes": found}


def latency(rounds: int = 20, models: tuple[str, ...] = ("fable", "135M")) -> dict:
    """`rounds` of each slow measurement, ten times as many of a quick one."""
    gpu, found = best_device().type == "cuda", {}
    left_out = () if gpu else SHAPES[2:]
    for name in models:
        base = load_pretrained()[0] if name == "fable" else Llama(SMOLLM2)
        small = name == "fable"
        found[name] = measure(base.to(best_device()), SHAPES if small or gpu else SHAPES[:2], 10 * rounds if gpu
                              else rounds,
                              10 * rounds if small or gpu else rounds)
    return {"settings": {"rank": RANK, "rounds": rounds} | equal_budget(load_pretrained()[0].config)
            | {"tokens decoded": TOKENS, "decoding": "batch 1", "weights of 135M": "random",
               "left out": [f"135M at {batch} x {length}: minutes on a CPU" for batch, length in left_out]},
            "models": found}


def methods(tales_file: str | None = None, steps: int = 120, every: int = 20, seeds=SEEDS, n: int = 400, names=METHODS,
            scratch: str | None = None) -> dict:
    """Each method at its best rate, three seeds; and the prefix once more with four times the steps, for it is the
    slowest of its size.

    `scratch`: a folder where each finished method is kept, to go on from.
    """
    tales, task = tales_to_forget(tales_file), Task("bistro", load_pretrained()[1], n)
    how = {"steps": steps, "every": every}
    found = {name: once(Path(scratch, f"methods {name}.json") if scratch else None,
                        lambda: tuned_and_repeated(task, name, tales, seeds, rates=RATES[name], **how))
             for name in names}
    patient = said(run(task, "prefix", found["prefix"]["lr"], seeds[0], tales, 4 * steps, 4 * every, slots=True), task,
                   "prefix")
    return {"settings": {"task": "bistro", "batch": BATCH, "steps": steps, "seeds": list(seeds), "tuning seed": 0,
                         "rules not kept": f"{len(seeds)} seeds in place of five, to stay within half an hour on a "
                                           "CPU; one task; BitFit and the prompt cannot have the budget"},
            "before": before([task], tales), "methods": found, "patient": patient}
