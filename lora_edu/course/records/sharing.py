"""The records of notebook 07: the adapters of two more trades, and what three adapters of fable say when they are
mixed.
"""
import itertools
import tempfile

import torch

from lora_edu.course.records.runs import tales_to_forget
from lora_edu.course.trades import SHIPPED, TRADES
from lora_edu.lora.adapter_file import load_adapter, save_adapter
from lora_edu.lora.combine import combine_adapters
from lora_edu.lora.factors import lora_layers
from lora_edu.models.pretrained import best_device, load_pretrained
from lora_edu.rivals.methods import prepare
from lora_edu.training import bistro, corpora
from lora_edu.training.loop import evaluate, fit, sixteen_bits

BATCH = 16


def trade_adapters(tales_file: str | None = None, steps: int = 1000, lr: float = 6e-3, rank: int = 6, seed: int = 0,
                   n: int = 200) -> dict:
    """Train and save the two, as the bistro's was; each is scored on its own cards and on tales, from the file."""
    tales, tokenizer = tales_to_forget(tales_file), load_pretrained()[1]
    report = {}
    for name, trade in TRADES.items():
        test, device = trade.heldout(tokenizer, n), best_device()
        model = load_pretrained()[0]
        before = evaluate(model, test)
        trainable = prepare(model.to(device), "lora", rank=rank, seed=seed)
        fit(model, trade.batches(tokenizer, steps, BATCH, seed), steps, lr, autocast=sixteen_bits(device))
        size = save_adapter(model.cpu(), SHIPPED[name], dtype=torch.bfloat16, base_name="fable")
        shipped = load_pretrained()[0]
        load_adapter(shipped, SHIPPED[name])
        report[name] = {"trainable": trainable, "bytes": size, "before": round(before, 4),
                        "test": round(evaluate(shipped, test), 4),
                        "tales": {kind: round(evaluate(shipped, some), 4) for kind, some in tales.items()}}
        print(name, report[name], flush=True)
    return {"settings": {"rank": rank, "alpha": 2 * rank, "targets": "all-linear", "steps": steps, "lr": lr,
                         "batch": BATCH, "seed": seed, "test cards": n}, "trades": report}


WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TALE = "Once upon a time there was a king who"


class Mixture:
    """fable with the exact sum of several adapters, whose weights can be turned: the ranks stand side by side, and a
    weight scales its own columns of every lora_B.
    """

    def __init__(self, folders):
        self.model, self.tokenizer = load_pretrained()
        with tempfile.TemporaryDirectory() as scratch:
            combine_adapters(folders, [1] * len(folders), f"{scratch}/sum")
            load_adapter(self.model, f"{scratch}/sum")
        self.layers = [(layer, layer.lora_B.detach().clone()) for _, layer in lora_layers(self.model)]
        self.count = len(folders)

    @torch.no_grad()
    def turn(self, weights) -> None:
        for layer, B in self.layers:
            rank = B.shape[1] // self.count
            layer.lora_B.copy_(B * torch.tensor(weights, dtype=B.dtype).repeat_interleave(rank))


def say(model, tokenizer, prompt: str = TALE, tokens: int = 44) -> str:
    """What the model writes after the prompt, with the seed and temperature of notebook 00's dial."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    told = model.generate(ids, tokens, temperature=0.6, top_k=20, seed=1, stop_token=0)
    return tokenizer.decode(told[0, ids.shape[1]:].tolist())


def yardsticks(tokenizer, base, n: int = 64) -> dict:
    """Held-out cards of the three trades, and tales of fable's own."""
    return {"bistro": bistro.heldout(tokenizer, n, split="test")} | {
        name: trade.heldout(tokenizer, n) for name, trade in TRADES.items()} | {
        "tales": corpora.tales_from(base, tokenizer, n=8, length=128)}


def adapter_mixer(n: int = 64) -> dict:
    """Every mixture of the three shipped adapters on a grid of weights: four losses, and how a tale goes on."""
    mixture = Mixture(list(SHIPPED.values()))
    tests, points = yardsticks(mixture.tokenizer, load_pretrained()[0], n), []
    for weights in itertools.product(WEIGHTS, repeat=len(SHIPPED)):
        mixture.turn(weights)
        losses = {name: round(evaluate(mixture.model, batches), 4) for name, batches in tests.items()}
        points.append({"weights": list(weights), **losses, "text": say(mixture.model, mixture.tokenizer)})
        print(weights, losses, flush=True)
    return {"settings": {"adapters": list(SHIPPED), "weights": list(WEIGHTS), "prompt": TALE, "test cards": n,
                         "sum": "exact: the ranks side by side"}, "runs": points}
