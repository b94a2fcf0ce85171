"""Markdown that foreign text cannot break: escaped table cells, fences longer than any inside.

Scraped fields and model output end up in reports and cards, so nothing of theirs may open a tag,
end a table row or close a code block.
"""

import re
from collections.abc import Iterable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# C0 and C1 without tab and newline, the other line ends of Unicode, and what turns its direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with columns padded for the terminal; numbers are aligned right."""
    body = [[cell(value) for value in row] for row in rows]
    lines = [[cell(name) for name in header], *body]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    right = [bool(body) and all(_is_number(line[i]) for line in body) for i in range(len(header))]
    rule = [f"{'-' * (w - 1)}{':' if r else '-'}" for w, r in zip(widths, right, strict=True)]
    padded = [
        [
            text.rjust(w) if r else text.ljust(w)
            for text, w, r in zip(line, widths, right, strict=True)
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def cell(value: object) -> str:
    """Return a value as one line of inert Markdown; integers get thousands separators."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}"
    text = " ".join(_CONTROL.sub(" ", str(value)).split())
    return re.sub(r"([\\|`<\[*])", r"\\\1", text)


def fence(text: str, language: str = "") -> str:
    """Return a code block around any text: the fence is longer than each run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{_CONTROL.sub(REPLACEMENT, text)}\n{marks}"


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?[\d,]+(\.\d+)?", text))
