"""The record of notebook 06, made by `python -m lora_edu.record latency`: forward passes and tokens of fable and of a model of 135 M
parameters, as they are and with each method, timed side by side, with the operators that each one runs.
"""
import torch

from lora_edu.measure.latency import Times, decode, interleaved, matrix_products, operators, prefill, variants
from lora_edu.models.llama import Llama, LlamaConfig
from lora_edu.models.pretrained import best_device, load_pretrained

RANK, TOKENS = 8, 8                      # tokens that one timed call of `decode` makes
SHAPES = ((1, 16), (1, 128), (8, 128), (32, 256))      # batch x length
SMOLLM2 = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                      num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True)     # SmolLM2-135M's sizes


def equal_budget(config: LlamaConfig, rank: int = RANK) -> dict[str, int]:
    """The bottleneck (two adapters a block) and the prefix that train about as many numbers as LoRA on all linear layers."""
    C, q, kv, wide = (config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim,
                      config.intermediate_size)
    lora = rank * (2 * (C + q) + 2 * (C + kv) + 3 * (C + wide))          # of one block
    return {"bottleneck": round((lora / 2 - C) / (2 * C + 1)), "prefix": round(lora / (2 * kv))}


def table(times: Times, calls: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds (of one of `calls`): median and quartiles; and the ratio to the base with its interval."""
    found = {}
    for name in times.seconds:
        ratio = times.ratio(name, "base")
        ms = (1000 / calls * seconds for seconds in (times.median(name), *times.quartiles(name)))
        found[name] = {key: round(value, 4) for key, value in
                       zip(("ms", "low", "high", "ratio", "ratio_low", "ratio_high"), (*ms, ratio.value, ratio.low, ratio.high))}
    return found


def measure(base: Llama, shapes: tuple, rounds: int, many: int) -> dict:
    """One model at all shapes; `many` rounds where the batch is 1 (decoding always is). Decoding depends on the length alone."""
    device, budget = next(base.parameters()).device, equal_budget(base.config)
    models = variants(base, RANK, **budget)
    ids = {shape: torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device) for shape in shapes}
    seen = {name: operators(model, ids[shapes[0]]) for name, model in models.items()}
    decoded, found = {}, []
    for batch, length in shapes:
        count = many if batch == 1 else rounds
        read = interleaved({name: prefill(model, ids[batch, length]) for name, model in models.items()}, count)
        if length not in decoded:
            calls = {name: decode(model, ids[batch, length][:1], TOKENS) for name, model in models.items()}
            decoded[length] = table(interleaved(calls, many), TOKENS)
        found.append({"batch": batch, "length": length, "rounds": count, "prefill": table(read), "decode": decoded[length]})
        print(f"{batch} x {length}: " + ", ".join(f"{name} {row['ms']:.1f} ms" for name, row in found[-1]["prefill"].items()), flush=True)
    return {"parameters": sum(p.numel() for p in base.parameters()), "dtype": str(next(base.parameters()).dtype).removeprefix("torch.")
            } | budget | {"operators": {name: len(names) for name, names in seen.items()},
                          "matrix products": {name: matrix_products(names) for name, names in seen.items()}, "shapes": found}


def latency(rounds: int = 20, models: tuple[str, ...] = ("fable", "135M")) -> dict:
    """`rounds` of each slow measurement, ten times as many of a quick one."""
    gpu, found = best_device().type == "cuda", {}
    left_out = () if gpu else SHAPES[2:]
    for name in models:
        base = load_pretrained()[0] if name == "fable" else Llama(SMOLLM2)
        small = name == "fable"
        found[name] = measure(base.to(best_device()), SHAPES if small or gpu else SHAPES[:2], 10 * rounds if gpu else rounds,
                              10 * rounds if small or gpu else rounds)
    return {"settings": {"rank": RANK, "rounds": rounds} | equal_budget(load_pretrained()[0].config)
            | {"tokens decoded": TOKENS, "decoding": "batch 1", "weights of 135M": "random",
               "left out": [f"135M at {batch} x {length}: minutes on a CPU" for batch, length in left_out]}, "models": found}
