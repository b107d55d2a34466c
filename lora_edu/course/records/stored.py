"""Long experiments as they were stored: small JSON with settings, seeds, device, versions and date.

`python -m lora_edu.record NAME` makes one; a notebook shows it and re-measures a slice of it.
"""
import json
import platform
import re
import time
from pathlib import Path

import torch

from lora_edu.files import write_text
from lora_edu.models.pretrained import best_device
from lora_edu.training.loop import sixteen_bits

RECORDS = Path(__file__).parent


def load_record(name: str) -> dict:
    """A record that came with the package, by its name. Raises FileNotFoundError with the names there are."""
    file = RECORDS / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no record {name!r}: choose one of "
                                f"{', '.join(sorted(p.stem for p in RECORDS.glob('*.json')))}.")
    return json.loads(file.read_text(encoding="utf-8"))


def tie(differences: list[float], margin: float) -> bool | None:
    """Are two methods alike? One difference a seed: True if all lie within ±margin, False if all lie beyond it on one
    side.

    None (undecided) otherwise. The margin is fixed before the runs: 0.02 nats per token, or 2 points of slots.
    """
    low, high = min(differences), max(differences)
    if -margin <= low and high <= margin:
        return True
    return False if low > margin or high < -margin else None


def store_record(name: str, content: dict, began: float, options: str = "",
                 products: torch.dtype | None = None) -> None:
    """Write a record with where, when and with what it was made; `products`: the matrix products' dtype, if not
    `sixteen_bits`.
    """
    device = best_device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device} ({platform.machine()})"
    made = {"date": time.strftime("%Y-%m-%d"), "device": where,
            "threads": torch.get_num_threads(), "minutes": round((time.time() - began) / 60, 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "products in": str(products or sixteen_bits(device) or torch.float32).removeprefix("torch."),
            "command": f"python -m lora_edu.record {name}{options}"}
    text = json.dumps({"made": made} | content, indent=1)
    # a list of numbers on one line
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_text(RECORDS / f"{name}.json", text + "\n")
