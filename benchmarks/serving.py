"""Ten adapters on one base: how long a batch takes in which every row has its own, four ways.

    python benchmarks/serving.py                       32 rows of 1, 16 and 64 tokens
    python benchmarks/serving.py --adapters 10 --rank 8 --rows 32 --length 16

fable, float32, LoRA on every linear layer but the head. "stack" is `LoRAStack.rows`; "PEFT" its own mixed batch, a loop
over the adapters that the batch names; "merge" folds in one adapter after another and reads its rows; "one adapter" is
the whole batch on one LoRA, which is no service to ten users and the floor of what any of them can be. All take turns
in one process, in a new order each round; a cell is the median, and the median over the rounds of the ratio to the
stack with its 95 % bootstrap interval. Before a time is taken, all logits are compared.
"""
import argparse
import copy
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from lora_edu import LoRAStack, apply_lora, load_adapter, load_pretrained, lora_parameters, save_adapter
from lora_edu.lora.factors import lora_layers
from lora_edu.measure.timing import Times, interleaved
from lora_edu.models.pretrained import FABLE, best_device
from lora_edu.tables import Table


def adapters(folder: Path, count: int, rank: int) -> list[Path]:
    """Random ones, as large as trained ones are."""
    for i in range(count):
        model = load_pretrained()[0]
        torch.manual_seed(i)
        apply_lora(model, rank=rank, alpha=2 * rank)
        for p in lora_parameters(model)[1::2]:
            torch.nn.init.normal_(p, std=0.02)
        save_adapter(model, folder / str(i))
    return [folder / str(i) for i in range(count)]


class Ways:
    """The four, each with a model of its own and the same logits."""

    def __init__(self, folders: list[Path], rows: int, length: int):
        device = best_device()
        self.ids = torch.randint(2048, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
        self.order = [row % len(folders) for row in range(rows)]
        self.stack = LoRAStack.from_folders(load_pretrained()[0].to(device), folders)
        self.alone = [load_pretrained()[0].to(device) for _ in folders]
        for model, folder in zip(self.alone, folders):
            load_adapter(model, folder)
        base = LlamaForCausalLM.from_pretrained(FABLE, dtype=torch.float32).to(device)
        self.peft = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        for i, folder in enumerate(folders[1:], 1):
            self.peft.load_adapter(folder, str(i))
        self.peft.eval()
        self.names = [str(i) for i in self.order]

    def by_stack(self) -> torch.Tensor:
        with self.stack.rows(self.order):
            return self.stack.model(self.ids)

    def by_peft(self) -> torch.Tensor:
        return self.peft(input_ids=self.ids, adapter_names=self.names, use_cache=False).logits

    def by_merging(self) -> torch.Tensor:
        out = torch.empty(*self.ids.shape, 2048, device=self.ids.device)
        for i, model in enumerate(self.alone):
            rows = [row for row, wanted in enumerate(self.order) if wanted == i]
            for _, layer in lora_layers(model):             # without merge_lora's report, which takes time
                layer.merge()
            out[rows] = model(self.ids[rows])
            for _, layer in lora_layers(model):
                layer.unmerge()
        return out

    def by_one(self) -> torch.Tensor:
        return self.alone[0](self.ids)


def measure(folders: list[Path], rows: int, length: int, rounds: int, threads: int) -> Times:
    ways = Ways(folders, rows, length)
    with torch.inference_mode():
        stacked = ways.by_stack()
        for other in (ways.by_peft(), ways.by_merging()):
            torch.testing.assert_close(other, stacked, atol=1e-4, rtol=1e-5)
        off = [f"{(other - stacked).abs().max():.1e}" for other in (ways.by_peft(), ways.by_merging())]
        print(f"{rows} x {length}: largest difference of logits to PEFT's {off[0]}, to merging {off[1]}")
    return interleaved({"stack": ways.by_stack, "PEFT": ways.by_peft, "merge": ways.by_merging,
                        "one adapter": ways.by_one}, rounds if length > 1 else 5 * rounds, threads=threads)


def memory(folders: list[Path]) -> str:
    """Bytes of all numbers that are held: the stack, and as many whole models."""
    base = load_pretrained()[0]
    alone = sum(p.nbytes for p in base.parameters())
    stack = LoRAStack.from_folders(copy.deepcopy(base), folders)
    held = sum(p.nbytes for p in stack.model.parameters())
    return (f"held: base {alone / 1e6:.2f} MB, with {len(folders)} adapters in a stack {held / 1e6:.2f}, as "
            f"{len(folders)} merged models {len(folders) * alone / 1e6:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, help="one length in place of 1, 16 and 64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    lengths = [args.length] if args.length else [1, 16, 64]
    with tempfile.TemporaryDirectory() as folder:
        folders = adapters(Path(folder), args.adapters, args.rank)
        print(f"fable, {args.adapters} adapters of rank {args.rank}, {best_device()}, {args.threads} threads, torch "
              f"{torch.__version__}; milliseconds, and the ratio to the stack")
        found = {length: measure(folders, args.rows, length, args.rounds, args.threads) for length in lengths}
        rows = [("rows x tokens", *(f"{args.rows} x {length}" for length in lengths))]
        for name in ("stack", "PEFT", "merge", "one adapter"):
            rows.append((name, *(f"{1000 * times.median(name):.2f}  {times.ratio(name, 'stack').text()}"
                                 for times in found.values())))
        print(Table(rows[0], rows[1:]))
        print(memory(folders))


if __name__ == "__main__":
    main()
