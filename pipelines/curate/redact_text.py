"""Finds secrets and personal data in a text and puts placeholders in their place.

Time is linear in the text; where no rule's literal occurs it is that of searching the literals.
"""

from collections.abc import Callable, Iterable, Iterator

from pipelines.curate.redact_addresses import find_emails, find_ipv4, find_ipv6
from pipelines.curate.redact_assignments import find_passwords, find_secrets
from pipelines.curate.redact_keys import RULES, Edit, find_keys, find_pem, find_url_credentials
from pipelines.curate.redact_python import find_code

KEY_KINDS = frozenset(rule.kind for rule in RULES)
ALL_KINDS = KEY_KINDS | {"pem", "url_credentials", "password", "secret", "email", "ipv4", "ipv6"}
MASK_READ = 1000
MASK_CHARS = 80


def find_edits(text: str, kinds: frozenset[str], *, python: bool = False) -> list[Edit]:
    """Return what to replace in a text, in order and apart from each other.

    `python` says that the text is Python; else that is asked of what parses and defines or imports
    something, and of fenced blocks that are called Python.
    """
    edits = _settle(_find_all(text, kinds))
    code = find_code(text, edits, python=python)
    return [edit for edit in edits if edit not in code] if code else edits


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
