"""Keys and tokens that their issuers made recognisable: a prefix, an alphabet, a length.

Every pattern is searched only in texts that hold one of its literal anchors, and every repeat is
bounded, so that the time is linear in any text.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from pipelines.curate.redact_decoys import is_label, is_placeholder, is_random

EMAIL, IP_ADDRESS, KEY, PASSWORD = "<EMAIL>", "<IP_ADDRESS>", "<KEY>", "<PASSWORD>"


class Edit(NamedTuple):
    """A secret's place in a text, its kind and what is put there; ranks below 0 win an overlap."""

    start: int
    end: int
    kind: str
    placeholder: str
    counts: bool = True


class KeyRule(NamedTuple):
    """`pattern` finds keys in texts that hold an anchor; group 1, or all of it, is the secret."""

    kind: str
    anchors: tuple[str, ...]
    pattern: re.Pattern[str]


# A key begins where a word does, also after an escape as \n or %3D.
BEGIN = r"(?:(?<![A-Za-z0-9_\-])|(?<=\\[nrt])|(?<=%[23][0-9A-F]))"
END = r"(?![A-Za-z0-9])"
PEM_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
PEM_END = "-----END "
PEM_CHARS = 20_000
# Steps over escapes, so that the n of \n is no part of the base64 around it.
PEM_RUN = re.compile(r"\\[a-z]|([A-Za-z0-9+/=]+)")
PEM_RUN_CHARS = 16
PEM_GAP = 24  # quotes, commas and blanks between two lines
PEM_HEADERS = 160


def _rule(kind: str, anchors: str, pattern: str) -> KeyRule:
    return KeyRule(kind, tuple(anchors.split()), re.compile(pattern))


RULES = (
    _rule("aws", "AKIA ASIA ABIA ACCA", rf"{BEGIN}A(?:KI|SI|BI|CC)A[A-Z0-9]{{16}}{END}"),
    _rule("gcp", "AIza", rf"AIza[A-Za-z0-9_\-]{{35}}{END}"),
    _rule("gcp", "GOCSPX-", r"GOCSPX-[A-Za-z0-9_\-]{28}"),
    _rule("gcp", "ya29.", rf"{BEGIN}ya29\.[A-Za-z0-9_\-]{{20,1024}}"),
    _rule("azure", "Key=", r"Key=([A-Za-z0-9+/]{42,88}={1,2})"),
    _rule("azure", "Q~", r"[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.\-]{31,34}"),
    _rule("azure", "sig=", r"[?&;]sig=([A-Za-z0-9%+/]{43,90}(?:%3[Dd]|=))"),
    _rule("github", "ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36,255}"),
    _rule("github", "github_pat_", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    _rule("gitlab", "glpat-", r"glpat-[A-Za-z0-9_\-]{20,64}"),
    _rule("huggingface", "hf_ api_org_", rf"(?:hf|api_org)_[A-Za-z0-9]{{34}}{END}"),
    _rule(
        "openai", "sk-",
        rf"sk-(?:(?<=\W.{{3}})|(?<=\\[nrt].{{3}})|(?<=^.{{3}}))[A-Za-z0-9]{{40,64}}{END}",
    ),
    _rule(
        "openai", "sk-",
        r"sk-(?:proj|svcacct|admin|None)-[A-Za-z0-9_\-]{20,250}",
    ),
    _rule("anthropic", "sk-", r"sk-ant-(?:[a-z]{2,8}[0-9]{2}-)?[A-Za-z0-9_\-]{32,160}"),
    _rule(
        "slack", "xox",
        rf"{BEGIN}xox[abeoprs]-(?:[0-9A-Za-z]{{1,80}}-){{0,5}}[0-9A-Za-z]{{10,160}}",
    ),
    _rule("slack", "xapp-", r"xapp-[0-9]-[A-Z0-9]{8,16}-[0-9]{8,16}-[0-9a-f]{32,80}"),
    _rule(
        "slack", "hooks.slack.com/",
        r"hooks\.slack\.com/(?:services|workflows)/([A-Z0-9]{8,14}/[A-Z0-9]{8,14}/[A-Za-z0-9]{20,40})",
    ),
    _rule("stripe", "k_live_ k_test_", rf"{BEGIN}[sr]k_(?:live|test)_[A-Za-z0-9]{{16,128}}"),
    _rule("stripe", "whsec_", r"whsec_[A-Za-z0-9+/]{32,64}"),
    _rule("npm", "npm_", rf"npm_[A-Za-z0-9]{{36}}{END}"),
    _rule("pypi", "pypi-AgE", r"pypi-AgE[A-Za-z0-9_\-]{50,1024}"),
    _rule(
        "jwt", "eyJ",
        rf"{BEGIN}eyJ[A-Za-z0-9_\-]{{10,1024}}\.eyJ[A-Za-z0-9_\-]{{10,4096}}\.[A-Za-z0-9_\-]{{16,1024}}",
    ),
)  # fmt: skip

_ANCHORS = sorted({anchor for rule in RULES for anchor in rule.anchors})
# Half of the anchors end with an underscore, which a long run follows: one search for all of them.
_UNDERSCORED = tuple(anchor for anchor in _ANCHORS if anchor.endswith("_"))
_OTHERS = tuple(anchor for anchor in _ANCHORS if not anchor.endswith("_"))
_LONG_RUN = re.compile(r"_[A-Za-z0-9+/]{16}")
URL_PASSWORD = re.compile(
    r"://([^\s/:@\"'`<>{}()$]{0,64}):([^\s/@\"'`<>{}()$]{3,128})@(?=[A-Za-z0-9\[])"
)
URL_TOKEN = re.compile(r"://([A-Za-z0-9_\-]{20,128})(?::x-oauth-basic)?@(?=[A-Za-z0-9])")


def find_keys(text: str, kinds: frozenset[str]) -> Iterator[Edit]:
    """Yield keys with a known prefix, kind by kind."""
    present = {anchor for anchor in _OTHERS if anchor in text}
    if _LONG_RUN.search(text):
        present.update(anchor for anchor in _UNDERSCORED if anchor in text)
    for kind, anchors, pattern in RULES:
        if kind not in kinds or present.isdisjoint(anchors):
            continue
        for found in pattern.finditer(text):
            group = pattern.groups
            if not is_placeholder(found[0]) and not is_placeholder(found[group]):
                yield Edit(*found.span(group), kind, KEY)


def find_pem(text: str) -> Iterator[Edit]:
    """Yield the base64 of private keys; markers, quotes and line comments around it stay.

    The first run becomes the placeholder; the rest goes with it, or is emptied where anything but
    white space lies between, as in a key that is written as a string for each line.
    """
    if "PRIVATE KEY" not in text:
        return
    begins = [found.end() for found in PEM_BEGIN.finditer(text)]
    for begin, following in pairwise([*begins, len(text)]):
        limit = min(following, begin + PEM_CHARS)
        end = text.find(PEM_END, begin, limit)
        body = PEM_RUN.finditer(text, begin, end if end >= 0 else limit)
        yield from _edit_runs(text, _key_runs(body, begin, end))


def _key_runs(body: Iterator[re.Match[str]], begin: int, end: int) -> list[tuple[int, int]]:
    """Return where base64 lies: long runs close together, and a short last one."""
    runs: list[tuple[int, int]] = []
    previous = begin
    for found in body:
        if not found[1]:
            continue
        start, stop = found.span()
        if start - previous > (PEM_GAP if runs else PEM_HEADERS):
            break
        if stop - start >= PEM_RUN_CHARS or (runs and 0 <= end - stop <= PEM_GAP):
            runs.append((start, stop))
        elif runs:
            break
        previous = stop if runs else begin
    return runs


def _edit_runs(text: str, runs: list[tuple[int, int]]) -> Iterator[Edit]:
    if not runs:
        return
    start, end = runs[0][0], runs[-1][1]
    between = text[start:end].replace("\\n", " ").replace("\\r", " ")
    if re.fullmatch(r"[A-Za-z0-9+/=\s]*", between):
        yield Edit(start, end, "pem", KEY)
        return
    yield Edit(*runs[0], "pem", KEY)
    for run in runs[1:]:
        yield Edit(*run, "pem", "", counts=False)


def find_url_credentials(text: str) -> Iterator[Edit]:
    """Yield the password, or the token in the user's place, of URLs."""
    if "://" not in text or "@" not in text:
        return
    for found in URL_PASSWORD.finditer(text):
        user, password = found.groups()
        if password != user and not is_placeholder(password) and not is_label(password):
            yield Edit(*found.span(2), "url_credentials", PASSWORD)
    for found in URL_TOKEN.finditer(text):
        if is_random(found[1]):
            yield Edit(*found.span(1), "url_credentials", KEY)
