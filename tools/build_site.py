"""The course as a web page: the stored notebooks, the labs' data, the claims and the library's docstrings, by Sphinx.

    python tools/build_site.py [--out FOLDER]

Nothing is executed and nothing is fetched. What stands on the page is what is stored in the notebooks; the labs' data
lies in site/labs (`tools/lab_data.py` makes it).
"""
import argparse
import ast
import base64
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lora_edu import __all__ as PUBLIC
from lora_edu.course.labs.fable_live import fable_live
from lora_edu.course.labs.lab import module
from lora_edu.course.page.claims import article_rows
from lora_edu.models.pretrained import FABLE

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "site"
PICTURE = re.compile(r'src="data:image/png;base64,([^"]+)"')
MARKS = {"✓ holds": "holds", "≠ differs here": "differs here", "? undecided": "undecided"}
KERNEL = "It trains while you watch, and that needs a kernel: run the notebook."
HERE = ("> *On this page the notebook is read, not run: its labs move, but exercises, guesses and what trains or "
        "writes at a press of a button need the notebook itself, and the numbers are those of the machine it was "
        "stored on.*")
ORDER = ("differs here", "undecided", "holds")
GROUPS = (("LoRA", "apply_lora LoRALinear LoRASettings LoRAStack lora_parameters lora_state_dict load_lora_state_dict "
                   "layers_without_gradient"),
          ("Merging", "merge_lora unmerge_lora remove_lora set_strength lora_off"),
          ("Files", "save_adapter load_adapter load_training"),
          ("Models", "Llama load_pretrained best_device quantize_"), ("Training", "train fit evaluate sweep"),
          ("What fine-tuning changed", "deltas extract_lora spectrum truncate"))


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def place(lab: str, kind: str, still: str) -> str:
    """Where a lab goes; what stands there is seen without JavaScript."""
    return f'<div class="lora-place" data-lab="{lab}" data-module="{kind}"><div class="still">{still}</div></div>'


def page_of(path: Path, pages: Path) -> dict:
    """A notebook as the page shows it: labs in their places, plumbing folded, links to pages, anchors at claims."""
    book, cells = json.loads(path.read_text(encoding="utf-8")), []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for name, kinds in cell.pop("attachments", {}).items():
                picture = base64.b64decode(kinds["image/png"])
                (pages / f"{path.stem[:2]}-{name}").write_bytes(picture)
                source = source.replace(f"attachment:{name}", f"{path.stem[:2]}-{name}")
            source = source.replace("../README.md", "../index.md").replace("../docs/devices.md", "../devices.md")
            cell["source"] = source + (f"\n\n{HERE}" if not cells else "")
        elif "setup" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("hide-cell")
        elif source.lstrip().startswith(("import ", "from ", "# @title Imports")):
            cell["metadata"].setdefault("tags", []).append("hide-input")
        if cell["cell_type"] == "code" and "claim(" in source:
            cells.append({"cell_type": "markdown", "id": f"anchor-{cell['id']}"[:60], "metadata": {},
                          "source": f'<span id="claim-{cell["id"]}"></span>'})
        kept = SITE / "labs" / f"{path.stem[:2]}-{cell['id']}.json"
        for output in cell.get("outputs", []):
            page = "".join(output.get("data", {}).get("text/html", ""))
            if kept.is_file() and "Run this cell to move it." in page:
                kind = json.loads(kept.read_text(encoding="utf-8"))["module"]
                still = page.replace("<br>Run this cell to move it.", "").replace("Run this cell to move it.", "")
                output["data"] = {"text/html": place(kept.stem, kind, still)}
            elif "Run this cell to move it." in page:
                output["data"]["text/html"] = page.replace("Run this cell to move it.", KERNEL)
        cells.append(cell)
    book["cells"] = cells
    return book


def claims_of(path: Path) -> list[dict]:
    """The claims of a stored notebook: sentence and verdict from its outputs, source and check from its code."""
    rows = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "claim(" not in source:
            continue
        said = "".join("".join(output.get("text", "")) for output in cell["outputs"]).splitlines()
        tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith(("%", "!"))))
        calls = [_call(node) for node in ast.walk(tree) if isinstance(node, ast.Call)
                 and getattr(node.func, "id", "") == "claim"]
        lines = [(verdict, line.removeprefix(f"{mark}: ")) for line in said for mark, verdict in MARKS.items()
                 if line.startswith(f"{mark}: ")]
        for call in calls:
            if call["sentence"] and not any(text.startswith(call["sentence"]) for _, text in lines):
                raise SystemExit(f"{path.name}: the stored output does not say {call['sentence']!r}: store it again.")
        for verdict, text in lines:         # a sentence that is put together in the cell is known by its output alone
            call = next((call for call in calls if call["sentence"] and text.startswith(call["sentence"])),
                        next((call for call in calls if not call["sentence"]), None))
            if call is None:
                raise SystemExit(f"{path.name}: no claim in the cell says {text!r}: store the notebook again.")
            rows.append(call | {"sentence": call["sentence"] or text, "verdict": verdict, "page": path.stem,
                                "anchor": f"claim-{cell['id']}"})
    return rows


def _call(node: ast.Call) -> dict:
    """What a call of `claim` says; "" for a sentence that is not written out."""
    given = dict(zip(("sentence", "holds", "expected", "why", "source", "article"), node.args)) | {
        key.arg: key.value for key in node.keywords}
    told = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
    return {"sentence": told.get("sentence", ""), "why": told.get("why"), "check": ast.unparse(given["holds"]),
            "source": told.get("source") or (f"the article: {told['article']}" if "article" in told else "this course")}


def claims_page() -> str:
    rows = [row for path in notebooks() for row in claims_of(path)]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ORDER}
    open_ones = sum(row["check"] == "None" for row in rows)
    lines = ["# What the course claims", "",
             f"{len(rows)} sentences of the notebooks: {counts['differs here']} in which a published number or "
             f"sentence did not come out here, {counts['undecided']} undecided ({open_ones} of them say what no "
             f"measurement here could settle), {counts['holds']} that hold. The last column is the check, as the cell "
             "has it: if it comes out otherwise when the notebook runs, the verdict changes. Thresholds were set with "
             "room for another machine; the numbers themselves are in the notebooks.", "",
             "Unless a sentence says otherwise, the model is fable (3.7 million numbers), the task its restaurants "
             "(cards made by a small grammar; a card has slots, and its sentence should say each), the machine two "
             "cores of a CPU, and loss is in nats per token. *Full fine-tuning* trains the matrices that LoRA adapts, "
             "whole; in a memory bill, and where a sentence says so, everything. *The article* is a widely read "
             "introduction to LoRA, whose sentences are all at the end.", ""]
    for verdict in ORDER:
        lines += [f"## {verdict.capitalize()}", "", '<div class="claims-wide"><table class="claims"><thead><tr>'
                  "<th>sentence</th><th>source</th><th>where</th><th>holds if</th></tr></thead><tbody>"]
        for row in (row for row in rows if row["verdict"] == verdict):
            why = f" <em>({html.escape(row['why'])})</em>" if row["why"] else ""
            lines.append(f"<tr><td>{html.escape(row['sentence'])}{why}</td><td>{html.escape(row['source'])}</td>"
                         f'<td><a href="notebooks/{row["page"]}.html#{row["anchor"]}">{row["page"][:2]}</a></td>'
                         f"<td><code>{html.escape(row['check'])}</code></td></tr>")
        lines += ["</tbody></table></div>", ""]
    lines += ["## The article, sentence by sentence", "", '<div class="claims-wide"><table class="claims"><thead><tr>'
              "<th>it says</th><th>verdict</th><th>how</th><th>where</th></tr></thead><tbody>"]
    first = sorted(article_rows(), key=lambda row: str(row["verdict"]).startswith("holds"))
    for row in first:
        where = row.get("notebook") or ""
        there = (ROOT / f"notebooks/{where}.ipynb").is_file()
        link = f'<a href="notebooks/{where}.html">{where[:2]}</a>' if there else where
        lines.append(f"<tr><td>{html.escape(row['claim'])}</td><td>{html.escape(str(row['verdict']))}</td>"
                     f"<td>{html.escape(str(row.get('how', '')))}</td><td>{link}</td></tr>")
    return "\n".join([*lines, "</tbody></table></div>", ""])


def entry(path: Path) -> str:
    """A notebook's line in the contents: the title up to a colon."""
    head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
    number, title = head.removeprefix("# ").split(" · ")
    return f"{number} {title.partition(':')[0]} <notebooks/{path.stem}>"


def api_page() -> str:
    listed = [name for _, names in GROUPS for name in names.split()]
    if sorted(listed) != sorted(PUBLIC):
        raise SystemExit(f"the API page and lora_edu.__all__ differ: {sorted(set(listed) ^ set(PUBLIC))}")
    lines = ["# The library's names", "", "Everything that `lora_edu` gives. The course's own names are in the "
             "notebooks.", ""]
    for title, names in GROUPS:
        lines += [f"## {title}", "", "```{eval-rst}", ".. currentmodule:: lora_edu", ""]
        for name in names.split():
            kind = "autoclass" if name[0].isupper() else "autofunction"
            more = ["   :members:", "   :exclude-members: weight"] if kind == "autoclass" else []
            lines += [f".. {kind}:: {name}", *more, ""]
        lines += ["```", ""]
    return "\n".join(lines)


def contents() -> str:
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [0")]
    table = ["| | question | minutes | exercises |", "|---|---|---|---|"]
    for row in rows:
        link, question, minutes, exercises = [cell.strip() for cell in row.strip("|").split("|")][:4]
        table.append(f"| {link} | {question} | {minutes} | {exercises} |")
    return "\n".join(table)


def assemble(source: Path) -> None:
    """All that Sphinx reads, in one folder."""
    shutil.copytree(SITE / "_static", source / "_static", dirs_exist_ok=True)
    shutil.copytree(SITE / "_templates", source / "_templates")
    shutil.copy(SITE / "conf.py", source)
    labs, pages = source / "_static" / "labs", source / "notebooks"
    labs.mkdir(), pages.mkdir()
    kinds = {"fable_live"}
    for file in (SITE / "labs").glob("*.json"):
        shutil.copy(file, labs)
        kinds.add(json.loads(file.read_text(encoding="utf-8"))["module"])
    for kind in kinds:
        (labs / f"{kind}.mjs").write_text(module(kind), encoding="utf-8")
    live = fable_live(address="fable")
    (labs / "fable.json").write_text(json.dumps({"module": "fable_live", "data": live.data, "state": live.state}))
    shutil.copytree(FABLE, source / "_static" / "fable", ignore=shutil.ignore_patterns("*.md"))
    still = live._repr_mimebundle_()[0]["text/html"].replace("<br>Run this cell to move it.", "")
    picture = PICTURE.search(still)
    (source / "_static" / "dial.png").write_bytes(base64.b64decode(picture[1]))
    still = PICTURE.sub('src="_static/dial.png"', still)
    for path in notebooks():
        (pages / path.name).write_text(json.dumps(page_of(path, pages)), encoding="utf-8")
    index = (SITE / "index.md").read_text(encoding="utf-8")
    index = index.replace("FABLE_PLACE", place("fable", "fable_live", still)).replace("CONTENTS", contents())
    index = index.replace("TOCTREE", "\n".join(map(entry, notebooks())))
    (source / "index.md").write_text(index, encoding="utf-8")
    (source / "claims.md").write_text(claims_page(), encoding="utf-8")
    (source / "api.md").write_text(api_page(), encoding="utf-8")
    shutil.copy(FABLE / "README.md", source / "fable.md")
    shutil.copy(ROOT / "docs" / "devices.md", source)


def build(out: Path) -> int:
    """Sphinx's status: a warning is a failure, for most are links that lead nowhere."""
    source = out.parent / "source"
    for folder in (source, out, out.parent / "doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    assemble(source)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html",
               "-d", str(out.parent / "doctrees"), str(source), str(out)]
    status = subprocess.run(command).returncode
    for path in notebooks() if status == 0 else []:      # whoever downloads one gets it as it is, not as it is shown
        shutil.copy(path, out / "_sources" / "notebooks")
    for file in [*out.glob("_static/webpack-macros.html"), *out.glob("_static/**/*.map")]:      # of the theme's making
        file.unlink()
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SITE / "_build" / "html")
    out = parser.parse_args().out
    status = build(out.resolve())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{out}: {size:.1f} MB; open it with: python -m http.server -d {out}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
