"""The reader's own copies of the notebooks: what is run, changed and saved there is no file of the course.

`python dev.py lab` calls `renew`. A copy of which no cell was changed is brought up to date with the course; a changed
one is the reader's, and is never written over. Where a notebook asks for a guess, its copy has no stored answer below.
Standard library only: dev.py imports this.
"""
import hashlib
import json
import os
import re
import shutil

from tools.links import write

FOLDER = "my_notebooks"
NOTE = ".copied.json"        # name -> digest of the cells that were copied


def digest(path):
    """Of a notebook's cells without their outputs; of the bytes of a file that is no notebook."""
    content = path.read_bytes()
    try:
        cells = [[cell["cell_type"], "".join(cell["source"])] for cell in json.loads(content)["cells"]]
    except (ValueError, KeyError, TypeError):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def renew(root, fresh=False):
    """Make or renew the copies, and what their links lead to; `fresh` makes all of them again. Returns what there is to
    say: which changed copies are kept, and where.
    """
    home, said = root / FOLDER, []
    (home / "notebooks").mkdir(parents=True, exist_ok=True)
    copied = read_note(home / NOTE)
    for source in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        copy, now = home / "notebooks" / source.name, digest(source)
        theirs = copy.exists() and digest(copy) not in (now, copied.get(source.name))
        if theirs and fresh:
            said.append(f"your {copy.name} is kept as {set_aside(copy).name}.")
        elif theirs and copied.get(source.name) != now:
            said.append(f"your {copy.name} is kept; the course has a newer one: --fresh gives it to you, and keeps "
                        "yours beside it.")
        if fresh or not theirs and (not copy.exists() or copied.get(source.name) != now):
            write_copy(source, copy)
            copied[source.name] = now
    for path in [root / "README.md", *(root / "docs").glob("*")]:
        if path.is_file():
            write_copy(path, home / path.relative_to(root))
    write(home / NOTE, json.dumps(copied, indent=1))
    return said


def read_note(path):
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def set_aside(copy):
    """The copy under a name of its own beside it."""
    number = 1
    while (aside := copy.with_name(f"{copy.stem}.yours-{number}.ipynb")).exists():
        number += 1
    os.replace(copy, aside)
    return aside


def write_copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    if source.suffix == ".ipynb":
        part.write_text(without_answers(source.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        shutil.copyfile(source, part)
    os.replace(part, target)


def without_answers(text):
    """A notebook without the stored outputs that stand between a question, ``bet = guess(None, ...)``, and the cell
    that answers it, ``bet.reveal(...)``, which loses its own, too.
    """
    try:
        notebook = json.loads(text)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (ValueError, KeyError, TypeError):
        return text
    hidden = set()
    for asked, source in enumerate(sources):
        for name in re.findall(r"^(\w+) = guess\(None", source, re.MULTILINE):
            told = next((i for i in range(asked + 1, len(sources)) if f"{name}.reveal(" in sources[i]), asked)
            hidden |= set(range(asked + 1, told + 1))
    for i in hidden:
        cells[i] |= {"outputs": [], "execution_count": None}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
