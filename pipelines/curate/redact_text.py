"""Finds secrets and personal data in a text and puts placeholders in their place.

Time is linear in the text; where no rule's literal occurs it is that of searching the literals.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence

from pipelines.curate.fences import fenced_blocks
from pipelines.curate.redact_addresses import find_emails, find_ipv4, find_ipv6
from pipelines.curate.redact_assignments import find_passwords, find_secrets
from pipelines.curate.redact_keys import RULES, Edit, find_keys, find_pem, find_url_credentials
from pipelines.syntax import BadSyntax, parse_python

KEY_KINDS = frozenset(rule.kind for rule in RULES)
ALL_KINDS = KEY_KINDS | {"pem", "url_credentials", "password", "secret", "email", "ipv4", "ipv6"}
MASK_READ = 1000
MASK_CHARS = 80

# No call: "Contact (bob@corp.com)" parses as one.
_CODE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
# What every one of them is written with. Parsing a text costs more than the search for secrets.
_CODE_WORD = re.compile(r"\b(?:def|class|import)\b")
# What holds more secrets than this is data, and redacted whether it parses then or not.
_MOST_SPARED = 500
_QUOTED_TOKENS = {tokenize.STRING, tokenize.COMMENT}
_ONE_BY_ONE = 50


def find_edits(text: str, kinds: frozenset[str], *, python: bool = False) -> list[Edit]:
    """Return what to replace in a text, in order and apart from each other.

    `python` says that the text is Python; else that is asked of what parses and defines or imports
    something, and of fenced blocks that are called Python.
    """
    edits = _settle(_find_all(text, kinds))
    if not edits:
        return edits
    edits = _spare_code(text, edits, 0, len(text), certain=python)
    for block in () if python else fenced_blocks(text):
        if block.language == "python":
            edits = _spare_code(text, edits, block.start, block.end, certain=True)
    return edits


def redact(text: str, edits: Iterable[Edit]) -> str:
    """Return the text with its edits made."""
    parts, at = [], 0
    for edit in edits:
        parts += [text[at : edit.start], edit.placeholder]
        at = edit.end
    return "".join([*parts, text[at:]])


def mask(text: str) -> str:
    """Return how a text begins, on one line and without any secret: what a sample may show."""
    head = text[:MASK_READ]
    shown = redact(head, _settle(_find_all(head, ALL_KINDS)))
    return " ".join(shown[: 4 * MASK_CHARS].split())[:MASK_CHARS]


def _find_all(text: str, kinds: frozenset[str]) -> Iterator[tuple[int, Edit]]:
    """Yield (rank, edit); of two that overlap the lower rank is right."""
    lower = text.lower() if kinds & {"password", "secret"} else ""
    if len(lower) != len(text):
        lower = text.replace("\u0130", "I").lower()  # the one letter that lower() makes two of
    finders: tuple[tuple[str, Callable[[], Iterator[Edit]]], ...] = (
        ("pem", lambda: find_pem(text)),
        ("", lambda: find_keys(text, kinds)),
        ("url_credentials", lambda: find_url_credentials(text)),
        ("secret", lambda: find_secrets(text, lower)),
        ("password", lambda: find_passwords(text, lower)),
        ("email", lambda: find_emails(text)),
        ("ipv4", lambda: find_ipv4(text)),
        ("ipv6", lambda: find_ipv6(text)),
    )
    for rank, (kind, find) in enumerate(finders):
        if not kind or kind in kinds:
            yield from ((rank, edit) for edit in find())


def _settle(found: Iterable[tuple[int, Edit]]) -> list[Edit]:
    kept: list[tuple[int, Edit]] = []
    for rank, edit in sorted(found, key=lambda each: (each[1].start, each[0], -each[1].end)):
        if kept and edit.start < kept[-1][1].end:
            if rank < kept[-1][0]:
                kept[-1] = (rank, edit)
            continue
        kept.append((rank, edit))
    return [edit for _, edit in kept]


def _spare_code(text: str, edits: list[Edit], start: int, end: int, *, certain: bool) -> list[Edit]:
    """Return the edits without those between start and end that break Python which parses."""
    inside = [edit for edit in edits if start <= edit.start and edit.end <= end]
    if all(_is_comment(text, edit) for edit in inside):
        return edits
    source = text[start:end]
    if len(inside) > _MOST_SPARED or not (certain or _CODE_WORD.search(source)):
        return edits
    local = [_shift(edit, -start) for edit in inside]
    if _parse(redact(source, local)) is not None:
        return edits
    tree = _parse(source)
    if tree is None or not (certain or any(isinstance(node, _CODE) for node in ast.walk(tree))):
        return edits
    spared = set(inside) - {_shift(edit, start) for edit in _quoted(source, local)}
    return [edit for edit in edits if edit not in spared]


def _is_comment(text: str, edit: Edit) -> bool:
    """Say whether an edit's line begins with #: Python has a comment or a string there."""
    line = text[text.rfind("\n", 0, edit.start) + 1 : edit.end]
    return line.lstrip().startswith("#") and "\n" not in line


def _quoted(source: str, edits: list[Edit]) -> Sequence[Edit]:
    """Return the edits inside of strings and comments that leave the source parsing."""
    spans = list(_quoted_spans(source))
    held: dict[tuple[int, int], list[Edit]] = {}
    number = 0
    for edit in edits:
        while number < len(spans) and spans[number][1] < edit.end:
            number += 1
        if number < len(spans) and spans[number][0] <= edit.start:
            held.setdefault(spans[number], []).append(edit)
    kept = [edit for inside in held.values() for edit in inside]
    if not kept or _parse(redact(source, kept)) is not None:
        return kept
    # Expressions inside of f-strings. Rare, so that a few parses cost nothing.
    kept = [
        edit
        for (start, end), inside in held.items()
        for edit in inside[:_ONE_BY_ONE]
        if _parse(redact(source[start:end], [_shift(edit, -start)])) is not None
    ]
    return kept if _parse(redact(source, kept)) is not None else ()


def _shift(edit: Edit, by: int) -> Edit:
    return edit._replace(start=edit.start + by, end=edit.end + by)


def _quoted_spans(source: str) -> Iterator[tuple[int, int]]:
    starts = [0]
    for line in io.StringIO(source):
        starts.append(starts[-1] + len(line))
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in _QUOTED_TOKENS:
                (row, column), (end_row, end_column) = token.start, token.end
                yield starts[row - 1] + column, starts[end_row - 1] + end_column
    except (tokenize.TokenError, IndentationError):
        return  # what parses can be tokenised, but for oddities as form feeds


def _parse(source: str) -> ast.Module | None:
    try:
        return parse_python(source)
    except BadSyntax:
        return None
