"""The command `lora-edu`: for now it says what it is, and which version."""
import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version that was installed; a source folder on Python's path has none."""
    try:
        return version("lora-edu")
    except PackageNotFoundError:
        return "(not installed: run from its source folder)"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lora-edu", description="The library behind the lora_edu course. The notebooks are in the repository: python dev.py lab.")
    top.add_argument("--version", action="version", version=f"lora-edu {installed_version()}")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` without the program's name, by default the process's own.

    Raises:
        SystemExit: after --help and --version (status 0), and for an argument it does not know (status 2).
    """
    top = parser()
    top.parse_args(argv)
    top.print_help()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
