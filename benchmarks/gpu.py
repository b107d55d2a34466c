"""What must be measured on a real GPU, in one go: under eight minutes, and it goes on where it was stopped.

    python benchmarks/gpu.py                 every part that is not in the record yet; writes records/gpu.json
    python benchmarks/gpu.py --missing       which numbers are missing, and nothing else
    python benchmarks/gpu.py --rehearse      the same code, small, on whatever there is; nothing is stored

    step time          our LoRA, PEFT, loralib, full fine-tuning, and torch.compile of ours and of PEFT's
    16 adapters        a grid in shared passes beside 16 PEFT runs one after another
    latency            reading and decoding: base, LoRA apart, merged, unloaded, adapters, prefix
    peak memory        the allocator's peak of a step beside the ledger's prediction

A part's numbers are kept with the device (name and capability), the date and the versions; another device begins a new
record. Four bits are not among them: their layer here is for reading, and makes its weight anew at every pass.
"""
import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from lora_edu import apply_lora, best_device, load_pretrained  # noqa: E402
from lora_edu.course.records import merging  # noqa: E402
from lora_edu.course.records.stored import RECORDS, hardware  # noqa: E402
from lora_edu.files import write_text  # noqa: E402
from lora_edu.measure.memory import bill  # noqa: E402
from lora_edu.measure.memory_measured import checkpoint_blocks, measure  # noqa: E402
from lora_edu.training.loop import adamw, loss_on  # noqa: E402

RECORD = RECORDS / "gpu.json"


def step_time(small: bool) -> dict:
    """Seconds: the first step, which compiles, and the median of the others."""
    return importlib.import_module("step_time").one_run(*((1, 2) if small else (5, 40)))


def adapters_16(small: bool) -> dict:
    """Seconds of all steps of all adapters, and the ratio; batches of 4 x 64."""
    speed = importlib.import_module("sweep_speed")
    if small:
        speed.GRID, speed.BATCH, speed.LENGTH = speed.GRID[:2], 1, 8
    cut = speed.chunks()
    times = [speed.one_round(cut, 1 if small else 8) for _ in range(1 if small else 3)]
    return {"chunks": [len(chunk) for chunk in cut], "rounds": [{"stacks": ours, "PEFT": theirs, "ratio": theirs / ours}
                                                                for ours, theirs in times]}


def latency(small: bool) -> dict:
    """Milliseconds of reading and decoding, as in the record of that name; on fable and at SmolLM2-135M's sizes."""
    shapes, rounds = (((1, 8),), 5) if small else (merging.SHAPES, 50)
    models = {"fable": load_pretrained()[0]} | ({} if small else {"135M": merging.Llama(merging.SMOLLM2)})
    return {name: merging.measure(base.to(best_device()), shapes, rounds, rounds) for name, base in models.items()}


def peak_memory(small: bool) -> list[dict]:
    """Bytes of a training step on fable: the allocator's peak, and the ledger's total for the same settings."""
    batch, length = (1, 16) if small else (16, 256)
    ids = torch.randint(2048, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(best_device())
    rows = []
    for method in ("full", "lora"):
        for checkpointing in (False, True):
            model = load_pretrained()[0].to(best_device())
            if method == "lora":
                apply_lora(model, rank=8)           # and full trains everything, as the ledger has it
            if checkpointing:
                checkpoint_blocks(model)
            found = measure(model, lambda: loss_on(model, (ids[:, :-1], ids[:, 1:])), adamw(model))
            said = bill("fable", method, rank=8, recipe="fp32", batch=batch, length=length, checkpointing=checkpointing)
            rows.append({"method": method, "checkpointing": checkpointing, "batch": batch, "length": length,
                         "peak": found.peak, "kept": found.activations, "predicted": round(said.total),
                         "predicted kept": round(said.parts["activations"])})
    return rows


PARTS = {"step time": step_time, "16 adapters": adapters_16, "latency": latency, "peak memory": peak_memory}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options, device = parser.parse_args(argv), best_device()
    found = read(RECORD)
    if found.get("made", {}).get("device") != hardware(device) and not options.missing:
        found = {}
    missing = [name for name in PARTS if name not in found]
    if options.missing:
        print(f"not measured on a GPU yet: {', '.join(missing) or 'nothing'}; and 4-bit weights, which the library has "
              "not")
        return 0
    if device.type != "cuda" and not options.rehearse:
        print(f"the device here is {device}, and these numbers are a GPU's: --rehearse runs the same code, small.")
        return 1
    for name in PARTS if options.rehearse else missing:
        began = time.perf_counter()
        result = PARTS[name](options.rehearse)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        if not options.rehearse:
            made = {"device": hardware(device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                    "command": "python benchmarks/gpu.py"}
            found |= {"made": made, name: result}
            write_text(RECORD, json.dumps(found, indent=1) + "\n")       # after each part, so that it can go on
    return 0


if __name__ == "__main__":
    sys.exit(main())
