"""Docstrings as prompts: what of them is prose, and what is a session at the prompt."""

import re

# A session runs from `>>>` to the next blank line, as the module doctest reads it.
SESSION = re.compile(r"^[ \t]*>>>(?:[ \t].*|)(?:\n[ \t]*\S.*)*\n?", re.MULTILINE)
# Headings of examples with nothing left below: underlined as in numpydoc, or ending in a colon.
UNDERLINED = r"[^\S\n]*\n[ \t]*[-=~^]{3,}[ \t]*$"
EMPTY_SECTIONS = (
    re.compile(
        rf"^[ \t]*Examples?{UNDERLINED}(?=\s*(?:\Z|^[ \t]*\S[^\n]*{UNDERLINED}))", re.MULTILINE
    ),
    re.compile(
        r"^[ \t]*Examples?[ \t]*:{0,2}[ \t]*$(?=\s*(?:\Z|^[A-Z][\w ]*:[ \t]*$))", re.MULTILINE
    ),
)
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


def strip_doctests(docstring: str) -> str:
    r"""Return a cleaned docstring without its interactive sessions.

    The heading of a section of examples goes with them where nothing else is left of it.

    >>> strip_doctests("Add.\n\nExamples\n--------\n>>> add(1, 2)\n3\n\nNotes\n-----\nFast.")
    'Add.\n\nNotes\n-----\nFast.'
    """
    stripped = SESSION.sub("", docstring)
    if stripped == docstring:
        return docstring
    for section in EMPTY_SECTIONS:
        stripped = section.sub("", stripped)
    return BLANK_LINES.sub("\n\n", stripped).strip("\n").rstrip()
