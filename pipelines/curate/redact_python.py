"""Tells what is Python code from secrets: `a@b.io` multiplies matrices, `"a@b.io"` is an address.

A scan for strings and comments says where a hit lies. Only if one lies outside of them is the text
parsed, without their contents, once; and only where its length allows what that would cost: in
doubt a hit is a secret.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice

from pipelines.curate.fences import fenced_blocks
from pipelines.curate.redact_keys import Edit
from pipelines.syntax import is_python

# Reserved words, of which a text has one outside of strings: "Contact (bob@corp.com)" parses too.
_CODE_WORD = re.compile(r"\b(?:def|class|import)\b")
# Comments, and strings as groups of quotes, in Python that parses.
_LITERAL = re.compile(
    r"#[^\r\n]*+"
    r"|(''')(?:[^'\\]++|\\[\s\S]|'(?!''))*+((?:''')?)"
    r'|(""")(?:[^"\\]++|\\[\s\S]|"(?!""))*+((?:""")?)'
    r"|(')(?:[^'\\\r\n]++|\\(?:\r\n|[\s\S]))*+('?)"
    r'|(")(?:[^"\\\r\n]++|\\(?:\r\n|[\s\S]))*+("?)'
)
_QUOTES = r"\1\2\3\4\5\6\7\8"
_F_PREFIX = re.compile(r"(?<!\w)(?:[fF][rR]?|[rR][fF])$")
# What ends an expression in an f-string, or leaves it unclear where it ends.
_FIELD_END = re.compile(r"[}'\":]")
_F_STRING_CHARS = 1000

# Only these may be code: a product, what a name is set to. A key that its issuer marked is a key,
# also where `key = sk-...` parses as a difference.
_CODE_KINDS = frozenset({"email", "password", "secret"})
# What holds more hits outside of strings than this is data, and no code.
_MOST_SPARED = 500
# What the time of parsing grows with: names, numbers, strings, brackets. Code has one in 7 to 20
# characters; what is made to be slow has one in 2, and is read as code only if it is short.
_ATOM = re.compile(r"\b(?!(?:def|return)\b)\w+|[\[({]|(?<=[\[({])[\])}]|''|\"\"|\.{3}")
_MOST_ATOMS = 200_000
_FREE_ATOMS = 2_000
_CHARS_PER_ATOM = 7
_ATOMS_PER_PARSE = 100


def find_code(text: str, edits: Sequence[Edit], *, python: bool) -> set[Edit]:
    """Return the edits that would replace Python code, which a secret is not.

    `python` says that the text is Python; else that is asked of what parses and defines or imports
    something, and of fenced blocks that are called Python.
    """
    edits = [edit for edit in edits if edit.kind in _CODE_KINDS]
    if not edits:
        return set()
    found = _find_in(text, edits, [(0, len(text))], certain=python)
    if not python:
        blocks = (each for each in fenced_blocks(text) if each.language == "python")
        found |= _find_in(text, edits, ((each.start, each.end) for each in blocks), certain=True)
    return found


def _find_in(
    text: str, edits: Sequence[Edit], regions: Iterable[tuple[int, int]], *, certain: bool
) -> set[Edit]:
    """Return the edits that are code in those regions of a text which parse."""
    starts = [edit.start for edit in edits]
    left = min(_MOST_ATOMS, _FREE_ATOMS + len(text) // _CHARS_PER_ATOM)
    found: set[Edit] = set()
    for start, end in regions:
        inside = edits[bisect_left(starts, start) : bisect_left(starts, end)]
        code, f_strings = _outside_strings(text, inside, start, end)
        if not 0 < len(code) <= _MOST_SPARED:
            continue
        source = _empty_strings(text[start:end], {begin - start for begin in f_strings})
        if not certain and not _CODE_WORD.search(source):
            continue
        atoms = sum(1 for _ in islice(_ATOM.finditer(source), left + 1))
        if atoms <= left:
            left = max(0, left - atoms - _ATOMS_PER_PARSE)
            if is_python(source):
                found.update(code)
    return found


def _outside_strings(
    text: str, edits: Sequence[Edit], start: int, end: int
) -> tuple[list[Edit], set[int]]:
    """Return the edits that begin in no string and no comment, up to one more than are spared.

    The code in f-strings is outside as well; where they begin comes second.
    """
    outside: list[Edit] = []
    f_strings: set[int] = set()
    literals = _LITERAL.finditer(text, start, end)
    literal = next(literals, None)
    for edit in edits:
        while literal is not None and literal.end() <= edit.start:
            literal = next(literals, None)
        if literal is not None and literal.start() <= edit.start:
            if not _is_in_field(text, literal, edit.start):
                continue
            f_strings.add(literal.start())
        outside.append(edit)
        if len(outside) > _MOST_SPARED:
            break
    return outside, f_strings


def _is_in_field(text: str, literal: re.Match[str], at: int) -> bool:
    """Say whether a place in a literal is an expression of an f-string."""
    start, end = literal.span()
    if end - start > _F_STRING_CHARS or not _F_PREFIX.search(text[max(0, start - 3) : start]):
        return False
    brace = text.rfind("{", start, at)
    if brace < 0 or _FIELD_END.search(text, brace, at):
        return False
    before = text[start : brace + 1]
    return (len(before) - len(before.rstrip("{"))) % 2 == 1  # two are one that is printed


def _empty_strings(source: str, kept: set[int]) -> str:
    """Return a source without comments and what is in its strings, but for those at some places."""
    if not kept:
        return _LITERAL.sub(_QUOTES, source)
    return _LITERAL.sub(
        lambda each: each[0] if each.start() in kept else each.expand(_QUOTES), source
    )
