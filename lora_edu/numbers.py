"""Numbers that readers hand in, of whatever make, as Python's own, or None for what is none; and numbers in words."""
import math
import operator
from collections.abc import Iterable


def whole(value) -> int | None:
    """Python's int of a whole number of any make (NumPy's and torch's too), or None for anything else; True is none.

    >>> whole(8), whole(8.0), whole("8"), whole(True)
    (8, None, None, None)
    """
    try:
        return None if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) else operator.index(value)
    except TypeError:
        return None


def real(value) -> int | float | None:
    """Python's int or float of a finite number of any make, or None for anything else; text is none.

    >>> real(16), real(0.5), real("16"), real(float("nan"))
    (16, 0.5, None, None)
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value) if whole(value) is None else whole(value)
        return number if math.isfinite(number) else None
    except (TypeError, ValueError, RuntimeError, OverflowError):      # an array of several; a whole number past float's
        return None


def bytes_in_words(count: float) -> str:
    """A number of bytes in the unit that fits, as makers of cards count: a GB is 10⁹ bytes, where a GiB would be 2³⁰.

    >>> bytes_in_words(58_698_654), bytes_in_words(2.8e12), bytes_in_words(12)
    ('58.7 MB', '2.80 TB', '12 bytes')
    """
    size, unit = next((each for each in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= each[0]),
                      (1, "bytes"))
    value = count / size
    return f"{value:,.{0 if unit == 'bytes' or value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def low_to_high(values: Iterable[float], form: str = "g") -> str:
    """The least and the largest, or one number where they read the same.

    >>> low_to_high([8, 2, 4]), low_to_high([1.0001, 1.0], ".3g")
    ('2 to 8', '1')
    """
    values = [*values]
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
