"""One line of print for every terminal: where it knows no tick (cp1252, ASCII), plain signs stand for it."""
import sys

PLAIN = {"✓": "[yes]", "✗": "[no]", "≠": "[differs]", "Δ": "D", "‖": "|", "₀": "0", "·": "*", "×": "x", "…": "..."}


def tell(line: str) -> None:
    """Print a line.

    >>> tell("✓ holds")
    ✓ holds
    """
    try:
        print(line)
    except UnicodeEncodeError:
        for sign, plain in PLAIN.items():
            line = line.replace(sign, plain)
        print(line.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
