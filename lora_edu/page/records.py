"""Long experiments as they were stored: small JSON with settings, seeds, device, versions and date.

`python -m lora_edu.record NAME` makes one; a notebook shows it and re-measures a slice of it.
"""
import json
from pathlib import Path

TASKS = {"bistro": "restaurants", "python_docs": "documentation"}      # how the pages call them
RECORDS = Path(__file__).parents[1] / "records"


def load_record(name: str) -> dict:
    """A record that came with the package, by its name. Raises FileNotFoundError with the names there are."""
    file = RECORDS / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no record {name!r}: choose one of {', '.join(sorted(p.stem for p in RECORDS.glob('*.json')))}.")
    return json.loads(file.read_text(encoding="utf-8"))


def tie(differences: list[float], margin: float) -> bool | None:
    """Are two methods alike? One difference a seed: True if all lie within ±margin, False if all lie beyond it on one side.

    None (undecided) otherwise. The margin is fixed before the runs: 0.02 nats per token, or 2 points of slots.
    """
    low, high = min(differences), max(differences)
    if -margin <= low and high <= margin:
        return True
    return False if low > margin or high < -margin else None
