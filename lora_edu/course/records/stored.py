"""Long experiments as they were stored: small JSON with settings, seeds, device, versions and date.

`python -m lora_edu.record NAME` makes one; a notebook shows it and re-measures a slice of it. Read `Record.runs`, then
`Runs.band`.
"""
import json
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lora_edu.files import read_json, write_text
from lora_edu.measure.timing import Ratio
from lora_edu.models.pretrained import best_device
from lora_edu.training.loop import sixteen_bits

RECORDS = Path(__file__).parent
LEVELS = {"tasks": ("task", "method"), "placements": ("placement",), "methods": ("method",), "short": ("task",)}


class Record(dict):
    """A stored experiment: the JSON as it is, and its runs as plain rows.

    >>> record = load_record("placements")
    >>> record.runs(placement="MLP").of("seed")
    [1, 2, 3]
    >>> record.runs(placement="MLP", part="tuning").best()["lr"] == record["placements"]["MLP"]["lr"]
    True
    """

    def runs(self, part: str = "runs", **where) -> "Runs":
        """The runs with these entries, one a seed where they were repeated.

        Args:
            part: "runs" are the reported ones, "tuning" those that a rate was chosen by; or another list of the record.
            where: entries of a run, such as task="bistro", method="lora".

        Raises:
            ValueError: there is none; the message says what there is.
        """
        rows = Runs(row for row in self._rows() if row["part"] == part
                    and all(row.get(key) == value for key, value in where.items()))
        if not rows:
            kinds = {key: list(dict.fromkeys(row[key] for row in self._rows() if key in row))
                     for key in ("part", *where)}
            raise ValueError(f"no run of this record has part={part!r} and {where}: there are {kinds}.")
        return rows

    def _rows(self) -> list[dict]:
        found = [dict(_plain(row), part=part) for part in ("runs", "grid", "students", "slices", "smaller")
                 for row in self.get(part, ())]
        found += [dict(_plain(self["patient"]), part="patient")] if "patient" in self else []
        for key, names in LEVELS.items():
            found += _descend(self.get(key, {}), names, {}, key)
        return found + _descend(self.get("long", {}), (), {}, "long")

    def about(self) -> str:
        """How it was made and what it leaves out, in two lines."""
        made, settings = self["made"], self.get("settings", {})
        seeds = f" | seeds {settings['seeds']}" if "seeds" in settings else ""
        lines = [f"record: {made['command']} | {made['device']} {made['date']}{seeds}"]
        lines += [f"{key}: {settings[key]}" for key in ("rules not kept",) if key in settings]
        return "\n".join(lines)

    def times(self, model: str, part: str = "prefill") -> dict[str, dict[str, Ratio]]:
        """Of the record latency: time over the base's, {"1×16": {"LoRA": Ratio, ...}, ...}, read ("prefill") or
        written ("decode").
        """
        return {f"{shape['batch']}×{shape['length']}":
                {name: Ratio(row["ratio"], row["ratio_low"], row["ratio_high"]) for name, row in shape[part].items()
                 if name != "base"}
                for shape in self["models"][model]["shapes"]}


def _descend(node, names: tuple[str, ...], context: dict, part: str) -> list[dict]:
    """The rows below a node whose levels have these names."""
    if names:
        return [row for value, below in node.items()
                for row in _descend(below, names[1:], context | {names[0]: value}, part)]
    if isinstance(node, list):
        return [_plain(row) | context | {"part": part} for row in node]
    # such as a placement's rank
    kept = {key: value for key, value in node.items() if not isinstance(value, (list, dict))}
    own = {"runs": "runs", "tuning": "tuning"} if part != "long" else {"runs": "long", "tuning": "long tuning"}
    return [kept | _plain(row) | context | {"part": said} for key, said in own.items() for row in node.get(key, ())]


def _plain(run: dict) -> dict:
    """A run with one number where the JSON has several: tales are fable's own, change is in the Frobenius norm.

    A full fine-tuning that was cut to every rank (record spectra) has its numbers by rank, and `gain`, the share of the
    improvement in loss that is kept.
    """
    row = dict(run)
    if isinstance(run.get("tales"), dict):
        row |= {"tales": run["tales"]["its own"], "tales people wrote": run["tales"].get("held-out")}
    if isinstance(run.get("change"), dict):
        row["change"] = run["change"]["frobenius"]
    if "cut" in run:
        first = run["cut"][0]
        loss = first["test"]
        row |= {"loss": loss, "tales": first["tales"], "slots": first.get("slots"),
                "gain": [(loss[0] - each) / (loss[0] - loss[-1]) for each in loss]}
    return row


class Band(NamedTuple):
    """What the seeds gave, as a figure draws it."""

    mean: float | list[float]
    low: float | list[float]
    high: float | list[float]


class Runs(list):
    """Runs of one kind, one a seed: what a table or a figure wants of them."""

    def of(self, what: str) -> list:
        """One value a run."""
        return [run[what] for run in self]

    def mean(self, what: str):
        """Over the runs; of a value that is a list, such as one number a rank, a list."""
        return self.band(what).mean

    def band(self, what: str) -> "Band":
        """Mean, lowest and highest over the runs, each a number, or a list where the value is one."""
        values = self.of(what)
        if not isinstance(values[0], list):
            return Band(sum(values) / len(values), min(values), max(values))
        columns = list(zip(*values, strict=True))
        return Band([sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns])

    def text(self, what: str, form: str = ".3f") -> str:
        """Such as "0.271 (0.266 to 0.276)"."""
        mean, low, high = self.band(what)
        return f"{mean:{form}} ({low:{form}} to {high:{form}})"

    def apart(self, other: "Runs", what: str = "test") -> list[float]:
        """One difference a seed: these minus the others."""
        theirs = {run["seed"]: run[what] for run in other}
        return [run[what] - theirs[run["seed"]] for run in self]

    def by(self, key: str) -> dict:
        """The same runs by one of their entries, in the order of its first appearance: {value: Runs}."""
        found: dict = {}
        for run in self:
            found.setdefault(run[key], Runs()).append(run)
        return found

    def best(self, what: str = "valid") -> dict:
        """The run of the lowest value; one that diverged has none."""
        return min((run for run in self if run[what] is not None), key=lambda run: run[what])


def load_record(name: str) -> Record:
    """A record that came with the package, by its name. Raises FileNotFoundError with the names there are."""
    file = RECORDS / f"{name}.json"
    if not file.is_file():
        there = ", ".join(sorted(p.stem for p in RECORDS.glob("*.json")))
        raise FileNotFoundError(f"there is no record {name!r}: choose one of {there}.")
    return Record(read_json(file, "a record"))


def tie(differences: list[float], margin: float = 0.02) -> bool | None:
    """Are two methods alike? One difference a seed: True if all lie within ±margin, False if all lie beyond it on one
    side.

    None (undecided) otherwise. The margin is fixed before the runs: 0.02 nats per token, or 2 points of slots.
    """
    low, high = min(differences), max(differences)
    if -margin <= low and high <= margin:
        return True
    return False if low > margin or high < -margin else None


def better(differences: list[float], margin: float = 0.02) -> bool | None:
    """Is the first of two lower by more than the margin?

    True or False where every seed agrees, else None; a tie is not better.
    """
    if max(differences) < -margin:
        return True
    return False if tie(differences, margin) or min(differences) > 0 else None


def rounded(values, digits: int = 4) -> list[float]:
    """Numbers to this many significant digits.

    >>> rounded([1234567, 0.00012345])
    [1235000.0, 0.0001234]
    """
    return [float(f"{float(value):.{digits}g}") for value in values]


def hardware(device: torch.device) -> str:
    """What a record was made on: a GPU by its name and capability ("Tesla T4 (compute capability 7.5)"), for "cuda"
    says nothing about what it can; else the device and the machine.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    return f"{device} ({platform.machine()})"


def store_record(name: str, content: dict, began: float, options: str = "",
                 products: torch.dtype | None = None) -> None:
    """Write a record with where, when and with what it was made; `products`: the matrix products' dtype, if not
    `sixteen_bits`.
    """
    device = best_device()
    made = {"date": time.strftime("%Y-%m-%d"), "device": hardware(device),
            "threads": torch.get_num_threads(), "minutes": round((time.time() - began) / 60, 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "products in": str(products or sixteen_bits(device) or torch.float32).removeprefix("torch."),
            "command": f"python -m lora_edu.record {name}{options}"}
    text = json.dumps({"made": made} | content, indent=1)
    # a list of numbers on one line
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_text(RECORDS / f"{name}.json", text + "\n")
