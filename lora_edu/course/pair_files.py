"""The reader's own file, read as questions and answers: what is in it, and in a sentence what is wrong with it.

CSV and TSV have two columns, or two that a heading names; JSON lines (or one JSON list) hold objects with a question
and an answer, or a chat of two messages; plain text becomes pieces without a question.
"""
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

from lora_edu.training.pairs import Pair

QUESTION = ("prompt", "question", "input", "instruction", "user", "source", "q", "guest")
ANSWER = ("completion", "answer", "output", "response", "assistant", "target", "a", "kitchen")
DELIMITERS = (",", ";", "\t", "|")
PIECE = 1000                # characters of plain text that are learned together
KINDS = ".csv or .tsv (two columns), .jsonl or .json (a prompt and an answer), .txt (plain text)"


def read_pairs(file: Path) -> tuple[list[Pair], list[str]]:
    """The pairs of a file in its order, and what was noticed on the way.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what it holds is not pairs; the message names the line where it can.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}: give the path of a {KINDS} file.")
    readers = {".csv": from_csv, ".tsv": from_csv, ".jsonl": from_json, ".json": from_json, ".txt": from_text}
    if file.suffix.lower() not in readers:
        raise ValueError(f"{file.name} is no file that can be read here: save it as {KINDS}.")
    text, notes = decoded(file)
    pairs = readers[file.suffix.lower()](text, file.name)
    if file.suffix.lower() == ".txt":
        return pairs, notes
    whole = [(question.strip(), answer.strip()) for question, answer in pairs]
    whole = [pair for pair in whole if all(pair)]
    if len(whole) < len(pairs):
        notes.append(f"{counted(len(pairs) - len(whole), 'row')} with an empty side left out")
    return whole, notes


def decoded(file: Path) -> tuple[str, list[str]]:
    """The file's text, and a note where it is not UTF-8."""
    raw = file.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return raw.decode("utf-16"), ["read as UTF-16"]
        except UnicodeDecodeError:
            raise ValueError(f"{file.name} begins like UTF-16 and breaks off: save it as UTF-8.") from None
    if b"\0" in raw:
        raise ValueError(f"{file.name} holds bytes that are no text (a spreadsheet or an archive?): save it as CSV in "
                         "UTF-8.")
    try:
        return raw.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        note = f"line {line} is not UTF-8: the file was read as Windows-1252, so look at its accents"
        return raw.decode("cp1252", errors="replace"), [note]


def from_csv(text: str, name: str) -> list[Pair]:
    rows = table(text, name)
    head = [cell.strip().lower() for cell in rows[0]]
    named = [next((head.index(each) for each in names if each in head), None) for names in (QUESTION, ANSWER)]
    if None not in named:
        rows, (q, a) = rows[1:], named
    elif len(head) == 2:
        q, a = 0, 1
    else:
        raise ValueError(f"{name} has {len(head)} columns ({', '.join(head[:6])}), and it is not clear which are "
                         "meant: keep two, or name them prompt and answer in the first line.")
    return [(row[q], row[a]) for row in rows]


def table(text: str, name: str) -> list[list[str]]:
    """The rows of a CSV text, all of one width, by the delimiter that gives the most rows the same width."""
    found, broken = [], {}
    for delimiter in DELIMITERS:
        try:
            rows = split_rows(text, delimiter)
        except csv.Error as error:
            broken[delimiter] = f"line {error.args[1]} of {name} is broken ({error.args[0]})"
            continue
        width, count = Counter(len(cells) for _, cells in rows).most_common(1)[0] if rows else (0, 0)
        if width > 1:
            found.append((count, width, rows))
    if not found and broken:
        raise ValueError(f"{next(iter(broken.values()))}: a quote inside quotes is written twice, and every quote that "
                         "opens must close.")
    if not found:
        raise ValueError(f"{name} has one column, or nothing in it: write prompt,answer on each line, and put quotes "
                         "around a text that holds a comma.")
    _, width, rows = max(found, key=lambda each: each[0])
    odd = [(line, cells) for line, cells in rows if len(cells) != width]
    if odd:
        raise ValueError(f"line {odd[0][0]} of {name} has {len(odd[0][1])} columns where most have {width} "
                         f"({counted(len(odd), 'such line')}): put quotes around a text that holds a comma.")
    return [cells for _, cells in rows]


def split_rows(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Every row that is not empty, with the line it begins on. Raises csv.Error(what, line)."""
    reader, rows, began = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((began, cells))
            began = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(str(error), began) from None
    return rows


def from_json(text: str, name: str) -> list[Pair]:
    try:
        whole = json.loads(text)
        objects = list(enumerate(whole if isinstance(whole, list) else [whole], start=1))
    except ValueError:                                        # not one value: one in each line, then
        objects = [(n, parsed(line, n, name)) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    return [from_object(each, n, name) for n, each in objects]


def parsed(line: str, n: int, name: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {n} of {name} is not JSON ({error}): write one object a line, such as "
                         '{"prompt": "…", "answer": "…"}.') from None


def from_object(found, n: int, name: str) -> Pair:
    """A question and an answer by the names people give them, or a chat of one turn."""
    if isinstance(found, dict) and isinstance(found.get("messages"), list):
        turns = [(turn.get("role"), turn.get("content")) for turn in found["messages"] if isinstance(turn, dict)]
        if [role for role, _ in turns] != ["user", "assistant"]:
            roles = ", ".join(str(role) for role, _ in turns) or "nothing"
            raise ValueError(f"entry {n} of {name} is a chat of {roles}: give one user message and one assistant "
                             "message.")
        pair = tuple(content for _, content in turns)
    elif isinstance(found, dict):
        lower = {key.lower(): value for key, value in found.items()}
        pair = tuple(next((lower[each] for each in names if each in lower), None) for names in (QUESTION, ANSWER))
    else:
        pair = (None, None)
    # an answer that is JSON itself is learned as its text
    pair = tuple(json.dumps(side) if isinstance(side, (dict, list)) else side for side in pair)
    if not all(isinstance(side, str) for side in pair):
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"entry {n} of {name} has no prompt and answer in words (it has {keys}): name them so.")
    return pair


def from_text(text: str, name: str) -> list[Pair]:
    """Paragraphs, put together to pieces of about `PIECE` characters; a longer one is a piece of its own."""
    pieces = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        if not paragraph:
            continue
        if pieces[-1] and len(pieces[-1]) + len(paragraph) > PIECE:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]}\n\n{paragraph}".strip()
    return [("", piece) for piece in pieces if piece]


def counted(n: int, what: str) -> str:
    """Such as "1 row", "1,200 rows".

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{n:,} {what}{'' if n == 1 else 's'}"
