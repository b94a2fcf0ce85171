"""Where the statements and expressions of Python code are, for middles a person would cut out."""

import ast
from itertools import accumulate

from pipelines.syntax import BadSyntax, parse_python

SMALLEST = 2


def list_spans(text: str) -> list[tuple[int, int]]:
    """Return the character ranges of statements and expressions, in order; [] if it does not parse.

    Names and constants of one character are left out, and so is what spans the whole text.
    """
    if "\r" in text:  # a line to the parser, and none to us
        return []
    try:
        tree = parse_python(text)
    except BadSyntax:
        return []
    lines = text.split("\n")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    spans = {
        (
            starts[node.lineno - 1] + _characters(lines[node.lineno - 1], node.col_offset),
            starts[node.end_lineno - 1]
            + _characters(lines[node.end_lineno - 1], node.end_col_offset),
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr)
        and node.end_lineno is not None
        and node.end_col_offset is not None
        and node.end_lineno <= len(lines)
    }
    return sorted(
        (start, stop) for start, stop in spans if SMALLEST <= stop - start < len(text.strip())
    )


def _characters(line: str, offset: int) -> int:
    """Return the characters in the first `offset` bytes of a line."""
    return offset if line.isascii() else len(line.encode()[:offset].decode(errors="ignore"))
