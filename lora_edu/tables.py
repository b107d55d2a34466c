"""One table for everything that shows itself as one: HTML in a notebook, columns of text everywhere else."""
import re
import sys
from collections.abc import Sequence
from html import escape

NUMBER = re.compile(r"[-+]?\d[\d.,e+-]*\b|[-+]?\.\d|nan|inf", re.IGNORECASE)


PLAIN = {"✓": "[yes]", "✗": "[no]", "≠": "[differs]", "ΔW": "dW", "‖": "|", "₀": "0", "·": "*", "×": "x", "…": "..."}


def printable(text: str) -> str:
    """The text for this process's stdout: where that knows no tick or no Δ (cp1252, ASCII), plain signs stand for them.

    >>> printable("✓ holds")
    '✓ holds'
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        for sign, plain in PLAIN.items():
            text = text.replace(sign, plain)
        return text.encode(encoding, "replace").decode(encoding)


class Table:
    """A head, rows of text under it, and perhaps a sentence below.

    A column whose cells all begin with a number stands to the right, every other one to the left. What cells say is
    escaped.

    >>> Table(("layer", "count"), [("q_proj", "30"), ("down_proj", "4")], "34 layers in all.")
    layer      count
    q_proj        30
    down_proj      4
    34 layers in all.
    """

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""):
        self.head, self.rows, self.note = tuple(head), [tuple(row) for row in rows], note

    def __repr__(self) -> str:
        lines = [self.head, *self.rows] if self.rows else []
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))] if lines else []
        drawn = ["  ".join(f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in
                           zip(line, widths, self._to_the_right(), strict=True)).rstrip() for line in lines]
        return "\n".join(drawn + [self.note] * bool(self.note))

    def __str__(self) -> str:
        return printable(repr(self))

    def _repr_html_(self) -> str:
        sides = ["right" if right else "left" for right in self._to_the_right()]

        def row(cells, tag):
            return "<tr>" + "".join(f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
                                    for cell, side in zip(cells, sides, strict=True)) + "</tr>"
        body = "".join(row(cells, "td") for cells in self.rows)
        table = f"<table><thead>{row(self.head, 'th')}</thead><tbody>{body}</tbody></table>" if self.rows else ""
        return table + (f"<p>{escape(self.note)}</p>" if self.note else "")

    def _to_the_right(self) -> list[bool]:
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.head)
        return [any(column) and all(NUMBER.match(cell) for cell in column if cell) for column in columns]


class ShowsTables:
    """For a result that displays as tables: it says which in `tables`, and has str, repr and HTML from here."""

    def tables(self) -> list[Table]:
        raise TypeError(f"{type(self).__name__} does not say its tables.")

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.tables()))

    def __str__(self) -> str:
        return printable(repr(self))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())
