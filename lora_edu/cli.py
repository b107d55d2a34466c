"""The command `lora-edu`: what fine-tuning changed (`spectrum`), a LoRA cut out of it (`extract`), what training
costs (`memory`), and an adapter's folder: what it holds (`inspect`), made from another layout (`convert`), for
llama.cpp (`gguf`).
"""
import argparse
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from lora_edu.checkpoints.convert import convert_adapter
from lora_edu.checkpoints.deltas import Deltas, deltas
from lora_edu.checkpoints.extract import extract_lora
from lora_edu.checkpoints.gguf_file import adapter_to_gguf
from lora_edu.files import check_place, checksum, write_text, write_whole
from lora_edu.lora.inspection import inspect_adapter
from lora_edu.measure.memory import OPTIMIZERS, RECIPES, bill
from lora_edu.measure.spectra import spectrum
from lora_edu.models.pretrained import FABLE
from lora_edu.models.sizes import PRESETS, sizes_of
from lora_edu.tables import Table
from lora_edu.training.group import STRATEGIES

SIDES = "'fable', a folder, a .safetensors file, an old .bin or .pt file, or a name on the hub (owner/name)"
HEAD = ("matrix", "shape", "change", "rank for 90 %", "effective rank", "stable rank", "above noise edge")


def installed_version() -> str:
    """The version that was installed; a source folder on Python's path has none."""
    try:
        return version("lora-edu")
    except PackageNotFoundError:
        return "(not installed: run from its source folder)"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lora-edu", description="The library behind the lora_edu course. The notebooks are in the repository: "
                                     "python dev.py lab.")
    top.add_argument("--version", action="version", version=f"lora-edu {installed_version()}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB")
    see = verbs.add_parser("spectrum", help="the singular values of what fine-tuning changed, matrix by matrix")
    see.add_argument("--json", type=Path, metavar="FILE",
                     help="write all singular values, with the sources and their checksums")
    see.add_argument("--plot", type=Path, metavar="FILE", help="draw them; a .png file")
    cut = verbs.add_parser("extract", help="write the best LoRA for a full fine-tune, in PEFT's format")
    size = cut.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="rank of the LoRA, for example 16")
    size.add_argument("--energy", type=float, help="or the share of the squared change to keep, for example 0.9")
    cut.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                     help="where to write it: a new or an empty folder")
    for verb, run in ((see, show_spectrum), (cut, extract)):
        verb.add_argument("--kind", action="append", default=[], type=told, metavar="NAME=KIND",
                          help="what bare files do not tell: ending of a module's name, and conv1d, conv2d or conv3d")
        verb.add_argument("base", metavar="BASE", help="the model before: " + SIDES)
        verb.add_argument("tuned", metavar="TUNED", help="the model after full fine-tuning")
        verb.set_defaults(run=run)
    add_memory(verbs.add_parser("memory", help="what a training step needs in memory, by formula",
                                description="What a training step needs in memory, by formula: "
                                            "no weights are read, none need exist."))
    add_adapters(verbs)
    return top


def add_adapters(verbs) -> None:
    """The verbs about an adapter's folder."""
    look = verbs.add_parser("inspect", help="what an adapter's folder holds, and what it asks for")
    look.add_argument("folder", type=Path, metavar="FOLDER", help="an adapter in PEFT's format")
    look.set_defaults(run=lambda args: print(inspect_adapter(args.folder)) or 0)
    turn = verbs.add_parser("convert", help="an adapter of loralib, kohya, diffusers or MLX, in PEFT's format")
    turn.add_argument("file", type=Path, metavar="FILE", help="its tensors: .safetensors, or an old .bin or .pt")
    turn.add_argument("--base", required=True, metavar="BASE", help="the model it goes on: " + SIDES)
    turn.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new or an empty folder")
    turn.add_argument("--alpha", type=float, help="where the file holds none; alpha / rank is the scaling")
    turn.add_argument("--targets", help="of a bare list of factors: q_proj,v_proj, the order within a layer")
    turn.set_defaults(run=convert)
    other = verbs.add_parser("gguf", help="an adapter of a LLaMA for llama.cpp")
    other.add_argument("folder", type=Path, metavar="FOLDER", help="an adapter in PEFT's format")
    other.add_argument("--base", required=True, metavar="FOLDER", help="the base's folder: its config.json is read")
    other.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .gguf to write")
    other.set_defaults(run=to_gguf)


def told(text: str) -> tuple[str, str]:
    name, equals, kind = text.partition("=")
    if not equals or not name or kind not in ("conv1d", "conv2d", "conv3d"):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=conv1d, NAME=conv2d or NAME=conv3d")
    return name, kind


def add_memory(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help=f"a preset ({', '.join(PRESETS)}), a config.json, a folder that "
                                                     "has one, or a name on the hub (owner/name)")
    verb.add_argument("--method", choices=("lora", "full"), default="lora", help="default: lora")
    verb.add_argument("--rank", type=int, default=8, help="of the LoRA, default: 8")
    verb.add_argument("--targets", default="all-linear",
                      help="names of matrices with commas, such as q_proj,v_proj; default: all-linear")
    verb.add_argument("--recipe", choices=RECIPES,
                      help="how numbers are stored, default: bf16-mixed, or the four bits that the config says")
    verb.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")
    verb.add_argument("--batch", type=int, default=1, help="texts in a step, default: 1")
    verb.add_argument("--length", type=int,
                      help="tokens of a text; default: 2048, or the model's context where that is shorter")
    verb.add_argument("--checkpointing", action="store_true",
                      help="keep each block's input alone, and compute the block again")
    verb.add_argument("--strategy", choices=STRATEGIES, help="the bill of one process among several")
    verb.add_argument("--processes", type=int, default=1, help="how many; --batch is then of each")
    verb.set_defaults(run=show_memory)


def show_memory(args: argparse.Namespace) -> int:
    sizes = sizes_of(args.model)
    targets = args.targets if args.targets == "all-linear" else tuple(args.targets.split(","))
    said = bill(sizes, args.method, args.rank, targets, args.recipe, args.optimizer, args.batch, args.length,
                args.checkpointing, args.strategy, args.processes)
    method = "full fine-tuning" if args.method == "full" else f"LoRA rank {args.rank} on {args.targets}"
    print(f"{method}, {said.recipe}, {args.optimizer}, {args.batch} x {said.length} tokens" + ", checkpointing"
          * args.checkpointing + f", one of {args.processes} processes ({args.strategy})" * bool(args.strategy))
    print(replace(said, model=args.model))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` without the program's name, by default the process's own.

    Returns:
        0; 1 after an error that it said in one line on stderr; 3 when it is done, and some tensors of the two models
        could not be compared; 130 after Ctrl-C.

    Raises:
        SystemExit: after --help and --version (status 0), and for an argument it does not know (status 2).
    """
    top = parser()
    args = top.parse_args(argv)
    if "run" not in args:
        top.print_help()
        return 0
    with warnings.catch_warnings():
        # tqdm.write: on a line of its own, also while a progress bar stands
        warnings.showwarning = lambda message, *rest: tqdm.write(f"lora-edu: {message}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")        # in a name; tables have signs for it
        try:
            status = args.run(args)
            sys.stdout.flush()
        except BrokenPipeError:                             # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            print("lora-edu: stopped; no file is half-written.", file=sys.stderr)
            return 130
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            print("lora-edu: " + " ".join(str(error).split()), file=sys.stderr)
            return 1
    return status


def convert(args: argparse.Namespace) -> int:
    print(convert_adapter(args.file, source(args.base), args.out, args.alpha,
                          args.targets.split(",") if args.targets else None))
    return 0


def to_gguf(args: argparse.Namespace) -> int:
    check_place(args.out)
    count = adapter_to_gguf(args.folder, source(args.base), args.out)
    print(f"{count} matrices, {args.out.stat().st_size:,} bytes in {args.out}")
    return 0


def source(name: str) -> str | Path:
    return FABLE if name == "fable" else name


def extract(args: argparse.Namespace) -> int:
    report = extract_lora(source(args.base), source(args.tuned), rank=args.rank, energy=args.energy, out=args.out,
                          kinds=dict(args.kind))
    print(report)
    return 3 if report.change.not_compared else 0


def show_spectrum(args: argparse.Namespace) -> int:
    for file in filter(None, (args.json, args.plot)):
        check_place(file)
    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot} is no .png file: give a name that ends in .png.")
    pair = deltas(source(args.base), source(args.tuned), dict(args.kind))
    if not len(pair) and (args.json or args.plot):
        raise ValueError(f"no matrix of the two can be compared, so nothing is written: {pair.report().summary()}")
    measured, rows = measure(pair)
    report = pair.report()
    print(str(Table(HEAD, rows)) + "\n\n" + str(report))
    if args.json:
        said = {"base": describe(args.base, pair.base), "tuned": describe(args.tuned, pair.tuned), "matrices": measured,
                "others": [other._asdict() for other in pair.others]}
        write_text(args.json, json.dumps(said) + "\n")
    if args.plot:
        from lora_edu.course.figures.spectra import plot_spectra
        from lora_edu.course.page.show import png  # matplotlib, only for a picture
        curves = {name: each["singular_values"] for name, each in measured.items()}
        figure = plot_spectra(curves, title=f"{ending(args.base)} to {ending(args.tuned)}")
        write_whole(args.plot, lambda half: half.write_bytes(png(figure)))
    return 3 if report.not_compared else 0


def ending(name: str) -> str:
    """The end of a path, short enough for a title."""
    short = Path(name).name or name
    return short if len(short) <= 28 else "…" + short[-27:]


def measure(pair: Deltas) -> tuple[dict[str, dict], list[tuple[str, ...]]]:
    """Singular values of every matrix, one at a time: what --json stores, and the rows of the table."""
    measured, rows = {}, []
    for name, weight, delta in tqdm(pair, desc="spectrum", unit="matrix", leave=False):
        seen, before = spectrum(delta), weight.norm().item()
        change = delta.norm().item() / before if before else math.nan
        shape = f"{delta.shape[0]} x {delta.shape[1]}"
        rows.append((name, shape, f"{change:.2%}", str(seen.rank_for(0.9).item()),
                     f"{seen.effective_rank().item():.1f}",
                     f"{seen.stable_rank().item():.1f}", str(seen.above_edge().item())))
        measured[name] = {"shape": list(delta.shape), "change": change if before else None,
                          "singular_values": seen.values.tolist()}
        del weight, delta                                          # before the next pair is read
    return measured, rows


def describe(name: str, side) -> dict:
    return {"source": name, "sha256": {file.name: checksum(file) for file in side.files}}


if __name__ == "__main__":
    raise SystemExit(main())
