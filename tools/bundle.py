"""The course in two files: a wheel of the library, fable inside, and a zip of the notebooks.

`python dev.py bundle` calls this with the environment's Python; it needs no network.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = "lora_edu-notebooks.zip"


def build_wheel(out, root=ROOT):
    """The wheel's path. Built from a copy, because setuptools leaves folders in what it builds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        shutil.copytree(root / "lora_edu", source / "lora_edu", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(root / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                   "--disable-pip-version-check", "-w", str(source / "wheel"), str(source)]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not build the wheel:\n{done.stdout}{done.stderr}")
        (file,) = (source / "wheel").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("lora_edu-*.whl"):       # the setup cell takes what it finds
            old.unlink()
        return Path(shutil.move(file, out / file.name))


def zip_notebooks(out, root=ROOT):
    """README, its picture and the notebooks, in a tree in which their links work."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".{NOTEBOOKS}.part"
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in [root / "README.md", *sorted(root.glob("docs/*")),
                     *sorted(root.glob("notebooks/[0-9]*.ipynb"))]:
            zipped.write(path, path.relative_to(root))
    os.replace(part, out / NOTEBOOKS)
    return out / NOTEBOOKS


def main(out):
    try:
        files = [build_wheel(Path(out)), zip_notebooks(Path(out))]
    except RuntimeError as error:
        print(error)
        return 1
    for file in files:
        print(f"written: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
