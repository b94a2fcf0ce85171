"""Finds Markdown's fenced code blocks, in one pass over a text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(
    r"^[ \t]{0,12}(?:[>*\-] )?[ \t]{0,12}(`{3,}|~{3,})[ \t]*([^\s`{]*)([^\n]*)$", re.MULTILINE
)
# What people write after a fence, as the names of languages in data sets go.
ALIASES = {
    "bash": "shell", "c#": "csharp", "c++": "cpp", "cs": "csharp", "console": "shell",
    "golang": "go", "js": "javascript", "jsx": "javascript", "kt": "kotlin", "py": "python",
    "py3": "python", "pycon": "python", "python3": "python", "rb": "ruby", "rs": "rust",
    "sh": "shell", "shell-session": "shell", "ts": "typescript", "tsx": "typescript",
    "yml": "yaml", "zsh": "shell",
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block: the language it is tagged with, or "", and where its content lies."""

    language: str
    start: int
    end: int


def fenced_blocks(text: str) -> Iterator[Block]:
    r"""Yield the fenced blocks of a text; one that is never closed goes to the end.

    >>> list(fenced_blocks("See\n```py\nx = 1\n```\n"))
    [Block(language='python', start=10, end=16)]
    """
    if "```" not in text and "~~~" not in text:
        return
    fence, language, start = "", "", 0
    for found in _FENCE.finditer(text):
        marks, tag, rest = found.groups()
        if not fence:
            if "`" in rest and marks[0] == "`":
                continue  # inline code
            fence, language = marks, tag.lower().strip(".,:")
            start = min(found.end() + 1, len(text))
        elif marks.startswith(fence) and not tag and not rest.strip():
            yield Block(ALIASES.get(language, language), start, found.start())
            fence = ""
    if fence:
        yield Block(ALIASES.get(language, language), start, len(text))
