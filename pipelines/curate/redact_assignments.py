"""Passwords and secrets that only their names give away: `password: ...`, `Bearer ...`.

A name is looked for by its literal parts; the value right after it has to look like what it is
called. Every repeat is bounded, so that the time is linear in any text.
"""

import re
from collections.abc import Iterator

from pipelines.curate.redact_decoys import is_password, is_placeholder, is_random
from pipelines.curate.redact_keys import KEY, PASSWORD, Edit

NAME_CHARS = 40
PASSWORD_PARTS = ("pass", "pwd")
SECRET_PARTS = ("secret", "token", "key")

# What may stand between a name and its value: quotes of JSON, an annotation, a call, XML's bracket.
_LINK = (
    r"(?:\\?[\"'`]?\]?\s{0,4}(?:=>|:=|={1,3}|:)\s{0,4}(?:[A-Za-z][\w\[\], |.]{0,30}+=\s?)?"
    r"|\\?[\"']\s?,\s{0,4}|\(\s?|>|\s(?=\S))"
)
_QUOTED = r"(?:[rbuRBU]{0,2}\\?(?P<q>[\"'`])(?P<quoted>[^\s\"'`\\]{6,512})\\?(?P=q))"
_PASSWORD_VALUE = re.compile(
    rf"(?:word|wd|phrase|code)?(?P<suffix>[\w\-]{{0,16}}+)(?P<link>{_LINK})"
    rf"(?:{_QUOTED}|(?P<bare>[^\s\"'`<>(){{}}\[\],;&|\\$]{{6,128}}+)(?=[\s&\"'`<\\|,;]|$))",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    rf"(?P<suffix>[\w\-]{{0,24}}+)(?P<link>{_LINK})"
    rf"(?:{_QUOTED}|(?P<bare>[A-Za-z0-9+/_\-.~]{{16,512}}+={{0,2}})(?=[\s&\"'`<\\|,;]|$))",
    re.IGNORECASE,
)
_SECRET_ALPHABET = re.compile(r"[A-Za-z0-9+/=_\-.~:%!@#$^&*]+")
# Fields about a secret, and keys that are public or no keys at all.
_ABOUT = re.compile(
    r"(?:hash|digest|checksum|hint|field|label|prompt|regex|pattern|policy|length|_len|format|file|path"
    r"|url|uri|type|name|version|fingerprint|mgr|manager|error|exception|class|validator|generator)s?$|(?:token|key|secret|pass|word|credential)s?[_-]?ids?$"
    r"|public|primary|foreign|publishable|idempotency|(?:sort|cache|index|partition)[_-]?key|tokeniz",
    re.IGNORECASE,
)
# "pass" has to be a word of its own: no bypass, compass, passport or passed.
_PASS_NAME = re.compile(
    r"passw|passphrase|passcode|pwd|(?<![a-z])pass(?![a-z])|(?:admin|api|auth|db|ftp|http|login|mail|my"
    r"|mongo|mysql|pg|proxy|redis|root|smtp|sql|ssh|user)pass(?![a-z])"
)
# What a call with a secret is named: password("..."), set_api_key("..."), not split_passwd("...").
_CALL_NAME = re.compile(
    r"(?:\w*\.)*(?:set|with|use|add)?_?(?:\w*?_)?(?:pass(?:word|wd|phrase)?|pwd|secret|token|\w*?key)",
    re.IGNORECASE,
)
_KEY_NAME = re.compile(
    r"(?:api|app|application|access|account|admin|aes|auth|client|consumer|crypt|deploy|encryption"
    r"|hmac|jwt|license|live|master|private|prod|project|root|rsa|secret|service|session|shared"
    r"|sign|signing|ssh|storage|subscription|webhook|write)[_\-. ]?key",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z_.]*[0-9]?")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BEFORE = re.compile(r"[\w.\-]*")  # on a slice of NAME_CHARS, reversed
_AUTHORIZATION = re.compile(
    r"(?:bearer|basic|token)\s{1,3}(?P<bare>[A-Za-z0-9+/=_\-.~]{16,1024})(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_COMMAND = re.compile(r"--?[\w\-]*$")


def find_passwords(text: str, lower: str) -> Iterator[Edit]:
    """Yield what is assigned to names with `pass` or `pwd`; `lower` is the text in lower case.

    Without quotes only what ends like a value of a configuration, a URL or a log line: in code it
    would be an expression.
    """
    for start in _positions(lower, PASSWORD_PARTS):
        part = 4 if lower[start] == "p" and lower[start + 1] == "a" else 3
        found = _PASSWORD_VALUE.match(text, start + part)
        if found is None:
            continue
        group = "quoted" if found["quoted"] is not None else "bare"
        # Values first, which are remembered: looking at a name costs more.
        if not is_password(found[group]) or not _is_named(text, start, found):
            continue
        name = _name_before(text, start) + text[start : found.start("link")]
        if _PASS_NAME.search(_words(name)):
            yield Edit(*found.span(group), "password", PASSWORD)


def find_secrets(text: str, lower: str) -> Iterator[Edit]:
    """Yield random values assigned to tokens, secrets and keys, or sent as authorization."""
    for start in _positions(lower, SECRET_PARTS):
        part = 3 if lower.startswith("key", start) else 5 if lower[start] == "t" else 6
        found = _SECRET_VALUE.match(text, start + part)
        if found is None:
            continue
        group = "quoted" if found["quoted"] is not None else "bare"
        # Values first: most names are repeated without one, and looking at a name costs more.
        if not is_random(found[group]) or not _is_named(text, start, found):
            continue
        if part == 3 and not _KEY_NAME.search(_name_before(text, start) + "key"):
            continue
        if _SECRET_ALPHABET.fullmatch(found[group]):
            yield Edit(*found.span(group), "secret", KEY)
    yield from _find_authorization(text, lower)


def _find_authorization(text: str, lower: str) -> Iterator[Edit]:
    for start in _positions(lower, ("bearer ", "authorization")):
        at = start if lower[start] == "b" else _scheme_after(lower, start)
        found = _AUTHORIZATION.match(text, at)
        if found and (is_random(found["bare"]) or _is_basic(found[0])):
            yield Edit(*found.span("bare"), "secret", KEY)


def _scheme_after(lower: str, start: int) -> int:
    """Return where `basic` or `token` begins in `authorization": "Basic ...`."""
    head = lower[start : start + 24]
    return start + max(head.find("basic "), head.find("token "), 0)


def _is_basic(value: str) -> bool:
    return value[:5].lower() == "basic" and not is_placeholder(value[6:])


def _positions(lower: str, parts: tuple[str, ...]) -> Iterator[int]:
    for part in parts:
        at = lower.find(part)
        while at >= 0:
            yield at
            at = lower.find(part, at + len(part))


def _is_expression(text: str, found: re.Match[str]) -> bool:
    """Say whether a value without quotes is a variable: `input2` before a comma, `a:` in an if."""
    value = found["bare"]
    return (
        value.endswith(":")
        or "==" in value
        or (
            text[found.end() : found.end() + 1] in {",", ";"}
            and _VARIABLE.fullmatch(value) is not None
        )
    )


def _words(name: str) -> str:
    """Return a name in lower case with its words apart: smtpPass -> smtp_pass."""
    return _HUMP.sub("_", name).lower()


def _name_before(text: str, start: int) -> str:
    found = _BEFORE.match(text[max(0, start - NAME_CHARS) : start][::-1])
    return found[0][::-1] if found else ""


def _is_named(text: str, start: int, found: re.Match[str]) -> bool:
    """Say whether the name is one of a secret, and the link one that such a value may follow."""
    before = _name_before(text, start)
    name = before + text[start : found.start("link")]
    link = found["link"]
    if _ABOUT.search(name):
        return False
    if link.isspace():  # --password hunter2
        return bool(_COMMAND.fullmatch(before)) and before.startswith("-")
    opened = text[start - len(before) - 1 : start - len(before)]
    if found["bare"] is not None and ("==" in link or _is_expression(text, found)):
        return False
    if "(" in link:
        return found["quoted"] is not None and bool(_CALL_NAME.fullmatch(name))
    if "," in link:  # getenv("PASSWORD", "hunter2"), not a list of names
        return (
            opened in {'"', "'"} and text[start - len(before) - 2 : start - len(before) - 1] == "("
        )
    if link == ">":  # <password>hunter2</password>
        return opened == "<" and text[found.end() : found.end() + 1] == "<"
    return True
