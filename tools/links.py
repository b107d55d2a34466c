"""The links line and the setup cell of every notebook, written from one repository address.

The address is `Repository` under [project.urls] in pyproject.toml. A notebook gives the places: a markdown cell tagged
`header` that begins `# NN · Title`, and a code cell tagged `setup`. Only the line of links below the title and the
setup cell's source are written; the README's Colab badges get the same address. Standard library only: dev.py imports
this before anything is installed.
"""
import json
import os
import re
import tomllib

NOT_SET = "OWNER"
BRANCH = "main"   # the notebook that Colab opens and the library that it fetches come from the same place
COLAB = "https://colab.research.google.com/github/"
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form"}      # JupyterLab obeys the one, Colab the other
TITLE = re.compile(r"# (\d\d) · (\S.*)")

# A wheel beside the notebook, then LORA_EDU_SOURCE. Google Drive comes last: mounting it asks for a permission.
SETUP = """\
# @title Set-up: fetches the library where it is missing
try:
    import lora_edu  # noqa: F401
except ModuleNotFoundError:   # opened alone, as in Colab; its torch stays as it is
    import os
    from glob import glob
    found = glob("lora_edu-*.whl") + glob("../lora_edu-*.whl")
    found += glob("/content/drive/MyDrive/lora_edu/lora_edu-*.whl")
    found.append(os.environ.get("LORA_EDU_SOURCE"))
    found.append("lora-edu @ git+https://github.com/{repo}@{branch}")
    source = next(filter(None, found))
    %pip install -q "$source"\
"""

SETUP_WITHOUT_ADDRESS = """\
# @title Set-up: fetches the library where it is missing
try:
    import lora_edu  # noqa: F401
except ModuleNotFoundError:   # opened alone, as in Colab; its torch stays as it is
    import os
    from glob import glob
    found = glob("lora_edu-*.whl") + glob("../lora_edu-*.whl")
    source = next(iter(found), os.environ.get("LORA_EDU_SOURCE"))
    if not source and "COLAB_RELEASE_TAG" in os.environ:
        from google.colab import drive
        drive.mount("/content/drive")
        source = next(iter(glob("/content/drive/MyDrive/lora_edu/lora_edu-*.whl")), None)
    if not source:
        raise ModuleNotFoundError("lora_edu is not installed, and there is no wheel of it beside "
                                  "the notebook: the README's 'In Colab' says how.") from None
    %pip install -q "$source"\
"""


def repository(root):
    """OWNER/NAME out of pyproject.toml."""
    address = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    if not match:
        raise ValueError(f"Repository = {address!r} in pyproject.toml: write https://github.com/OWNER/NAME, nothing "
                         f"after it.")
    return match[1]


def set_repository(root, repo):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--repo {repo!r} is not a GitHub repository: write it as OWNER/NAME, for example "
                         f"ada/lora_edu.")
    file = root / "pyproject.toml"
    text, count = re.subn(r'(?m)^Repository = ".*"$', f'Repository = "https://github.com/{repo}"',
                          file.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f'pyproject.toml has {count} lines that begin Repository = "...": it needs one, under '
                         f'[project.urls].')
    write(file, text)


def notebook_files(root):
    """Every notebook of the course, in the order of its number."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def tagged(notebook, tag, name):
    """The one cell with this tag."""
    cells = [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{name} has {len(cells)} cells tagged {tag!r}: it needs exactly one.")
    return cells[0]


def source_of(cell):
    return "".join(cell["source"])


def title(path, notebook):
    """"00 Start here": what the neighbours' links say."""
    first = source_of(tagged(notebook, "header", path.name)).split("\n")[0]
    match = TITLE.fullmatch(first)
    if not match or match[1] != path.name[:2]:
        raise ValueError(f"{path.name}: its header begins {first!r}; write `# {path.name[:2]} · Title`.")
    return f"{match[1]} {match[2]}"


def links_line(previous, path, following, repo):
    """Previous · Contents · next · Colab, in words: a badge is a broken picture where there is no network. `previous`
    and `following` are (path, title), or None at the ends.
    """
    parts = ["[Contents](../README.md)", f"[Open in Colab]({COLAB}{repo}/blob/{BRANCH}/notebooks/{path.name})"]
    if previous:
        parts.insert(0, f"[{previous[1]}]({previous[0].name})")
    if following:
        parts.insert(-1, f"[{following[1]}]({following[0].name})")
    return " · ".join(parts)


def header_source(old, line):
    """The header with its links line replaced, or put under the title where there was none."""
    lines = old.split("\n")
    rest = lines[1:]
    while rest and (not rest[0].strip() or "[Contents](../README.md)" in rest[0]):
        rest = rest[1:]
    return "\n".join([lines[0], "", line, "", *rest]).rstrip("\n")


def setup_source(repo):
    if repo.split("/")[0] == NOT_SET:
        return SETUP_WITHOUT_ADDRESS
    return SETUP.format(repo=repo, branch=BRANCH)


def rewrite(notebook, name, line, repo):
    """A copy of the notebook with our two parts as they should be."""
    new = json.loads(json.dumps(notebook))
    header, setup = tagged(new, "header", name), tagged(new, "setup", name)
    if "nbval-ignore-output" not in setup["metadata"]["tags"]:
        raise ValueError(f"{name}: the setup cell prints what pip prints; tag it nbval-ignore-output as well.")
    setup["metadata"] |= FOLDED
    for cell, text in ((header, header_source(source_of(header), line)), (setup, setup_source(repo))):
        if source_of(cell) != text:
            cell["source"] = text.splitlines(keepends=True)
    return new


def pending(root):
    """(path, new text) of every notebook, and of the README, that is not as it should be."""
    repo, files = repository(root), notebook_files(root)
    books = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    known = [(path, title(path, book)) for path, book in zip(files, books)]
    for i, (path, book) in enumerate(zip(files, books)):
        line = links_line(known[i - 1] if i else None, path, known[i + 1] if i + 1 < len(known) else None, repo)
        new = rewrite(book, path.name, line, repo)
        if new != book:   # written as nbformat writes it, so that nothing else changes
            yield path, json.dumps(new, ensure_ascii=False, indent=1, sort_keys=True, separators=(",", ": ")) + "\n"
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        new = re.sub(re.escape(COLAB) + r"[\w.-]+/[\w.-]+/blob/[\w.-]+/", f"{COLAB}{repo}/blob/{BRANCH}/", text)
        new = re.sub(r"git clone https://github\.com/\S+\ncd \S+",
                     f"git clone https://github.com/{repo}\ncd {repo.split('/')[1]}", new)
        new = re.sub(r"\A(# .*\n)\n(?:Read it as a web page, .*\n\n)?", rf"\1\n{web_page(repo)}", new)
        if new != text:
            yield readme, new


def web_page(repo):
    """The README's first line, once there is an address: GitHub gives a repository's page one of its own."""
    owner, name = repo.split("/")
    return "" if owner == NOT_SET else f"Read it as a web page, with the model in it: https://{owner.lower()}.github.io/{name}/\n\n"


def write(path, text):
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def main(root, repo=None):
    """Write everything; prints what was changed.

    Raises ValueError, before any notebook is written, if one does not fit.
    """
    if repo:
        set_repository(root, repo)
    changes = list(pending(root))
    for path, text in changes:
        write(path, text)
        print("written:", path.relative_to(root).as_posix())
    address = repository(root)
    print(f"{len(changes)} files changed; the address is {address}"
          + (", which means that none is set: python dev.py links --repo OWNER/NAME"
             if address.startswith(f"{NOT_SET}/") else "."))
    return 0
