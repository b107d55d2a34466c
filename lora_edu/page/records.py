"""Long experiments as they were stored: small JSON with settings, seeds, device, versions and date.

`python -m lora_edu.record NAME` makes one; a notebook shows it and re-measures a slice of it.
"""
import json
from pathlib import Path

RECORDS = Path(__file__).parents[1] / "records"


def load_record(name: str) -> dict:
    """A record that came with the package, by its name. Raises FileNotFoundError with the names there are."""
    file = RECORDS / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no record {name!r}: choose one of {', '.join(sorted(p.stem for p in RECORDS.glob('*.json')))}.")
    return json.loads(file.read_text(encoding="utf-8"))
