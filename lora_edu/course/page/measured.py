"""What a claim compared, read off its own cell: "after = 1.9, and 0.2 * before = 0.83"."""
import ast
import linecache
from types import FrameType

import numpy as np

CHEAP = {"abs", "float", "int", "len", "max", "min", "round", "sum"}      # a call of anything else is not made twice


def compared(frame: FrameType, function: str = "claim") -> list[str]:
    """The comparisons in the second argument (or `holds`) of the call of `function` that runs in this frame, both sides
    with their values; empty where the source or a number is not to be had.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except SyntaxError:
        return []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == function
             and node.lineno <= frame.f_lineno <= node.end_lineno]
    if not calls:
        return []
    holds = next((word.value for word in calls[0].keywords if word.arg == "holds"), (calls[0].args + [None] * 2)[1])
    found = [node for node in ast.walk(holds) if isinstance(node, ast.Compare)] if holds else []
    return [said for node in found if (said := _said(node, frame))]


def _said(node: ast.Compare, frame: FrameType) -> str:
    sides = [_side(side, frame) for side in (node.left, *node.comparators)]
    return ", ".join(sides) if all(sides) else ""


def _side(side: ast.expr, frame: FrameType) -> str:
    """"after[-1] = 1.9" for an expression whose value is a number; a number that is written out is itself."""
    calls = [node.func for node in ast.walk(side) if isinstance(node, ast.Call)]
    if not all(isinstance(call, ast.Name) and call.id in CHEAP for call in calls):
        return ""
    try:
        value = eval(compile(ast.Expression(side), "<claim>", "eval"), frame.f_globals, frame.f_locals)
        number = float(np.asarray(value.detach().cpu() if hasattr(value, "detach") else value))
    except Exception:                     # a name of a loop inside the cell, a list, a text: nothing to show
        return ""
    written = ast.unparse(side)
    return written if isinstance(side, ast.Constant) else f"{written} = {number:.4g}"
