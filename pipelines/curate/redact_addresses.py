"""E-mail addresses and public IP addresses; those of documentation and private nets stay.

Each pattern starts at a character that every match has (the @, the first dot, a colon), which
makes it many times faster than one that starts anywhere, and linear in any text.
"""

import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache

from pipelines.curate.redact_keys import EMAIL, IP_ADDRESS, Edit

LOCAL_CHARS = 64
DOMAIN = re.compile(
    r"@(?<=[A-Za-z0-9_.+%\-]@)((?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,6}[A-Za-z]{2,24})"
    r"(?![A-Za-z0-9_(\[]|\.[A-Za-z0-9]|-[A-Za-z0-9])"
)
LOCAL = re.compile(r"[A-Za-z0-9_.+%\-]+")  # on a slice of LOCAL_CHARS, reversed
# Two letters are a country. Others are those in wide use: `a@b.dot` is Python.
TOP_LEVEL = frozenset(
    "academy aero agency app art asia biz blog cat center city cloud club com company consulting"
    " coop dev digital edu education email engineering expert global gmbh gov group guru health"
    " host inc info institute int international jobs legal life live ltd mail media mil mobi money"
    " museum name net network news ninja one online org page plus post press pro codes school"
    " science services shop site social software solutions space store studio systems team tech"
    " technology tel today tools travel university website wiki work world xxx xyz zone".split()
)
# Country codes that are file name extensions as well: `icon@2x.py` is no address.
EXTENSIONS = frozenset("cc gz hs js md mk mm pl pm ps pt py rb rs sh so sql tf ts vb".split()) - {
    "pl", "pt",
}  # fmt: skip
NOBODY = re.compile(
    r"(?:.*\.)?(?:example(?:\.(?:com|org|net|edu|co\.[a-z]{2}|[a-z]{2}))?|test|invalid|localhost|local"
    r"|localdomain|internal|lan|home|corp|openssh\.com|libssh\.org|your.*|.*\.your.*|[0-9]x\..*)"
)
NO_PERSON = frozenset({"git", "hg", "svn"})

IPV4 = re.compile(r"\.(?<=[0-9]\.)[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?!\w|\.\w|-[A-Za-z]|\+)")
IPV6 = re.compile(
    r":(?<=(?:(?<![\w:.])|(?<=\\[nrt]))[23][0-9a-fA-F]{3}:)(?:[0-9a-fA-F]{0,4}:){1,7}[0-9a-fA-F]{0,4}(?![\w:])"
)
CONTEXT_CHARS = 32
VERSION = re.compile(
    r"(?:(?:\b|_)v(?:er)?\.?|version\w{0,4}|\brelease[ds]?|\bbuild|\brev\w{0,6}|firmware|assembly"
    r"|upgraded?|upgrade to|\bsec(?:tion)?s?\.?|\bchapter|\u00a7|\bfig(?:ure)?\.?|\btable|\boid"
    r"|\bclause|\bappendix|requires?|\bstep|\bparagraph)$",
    re.IGNORECASE,
)
PINNED = re.compile(r"(?:[=~>!]=|[\^~])\s?[\"']?$|[a-zA-Z][-_]v?$|@v$|##\s\[?$")
PUNCTUATION = " \t\"'=:()[]<>~^!,*`"
WORD_CHARS = 14
NETWORK = re.compile(
    r"\bip(?:v4|s|_?addr\w*)?\b|addr|dns|server|resolver|host|ping|peer|client|gateway|route|proxy"
    r"|remote|listen|connect|from|://",
    re.IGNORECASE,
)


def find_emails(text: str) -> Iterator[Edit]:
    """Yield e-mail addresses of people and firms.

    `git@github.com`, `me@example.com`, `react@18.2.0`, `x@W.dot` and `icon@2x.png` stay.
    """
    if "@" not in text:
        return
    for found in DOMAIN.finditer(text):
        at = found.start()
        before = text[max(0, at - LOCAL_CHARS) : at][::-1]
        local = LOCAL.match(before)
        assert local is not None, "the pattern looks behind for one character"
        name = _after_escape(text, at, local[0][::-1]).lstrip(".-+%")
        if name and _is_address(name, found[1]) and not _is_url_password(text, at - len(name)):
            yield Edit(at - len(name), found.end(), "email", EMAIL)


def _after_escape(text: str, at: int, name: str) -> str:
    r"""Return a name before `at` without the letter that belongs to an escape: `\nbob@...`."""
    start = at - len(name)
    return name[1:] if text[start - 1 : start + 1] in ESCAPES else name


def _is_address(name: str, domain: str) -> bool:
    if name.lower() in NO_PERSON or not any(map(str.isalnum, name)) or name.endswith("."):
        return False
    return _is_domain(domain)


@lru_cache(4096)
def _is_domain(domain: str) -> bool:
    lower = domain.lower()
    labels = lower.split(".")
    top = labels[-1]
    if not (domain.rpartition(".")[2] in {top, top.upper()} and NOBODY.fullmatch(lower) is None):
        return False
    if top in EXTENSIONS:
        return len(labels) > 2
    return len(top) == 2 or top in TOP_LEVEL


def _is_url_password(text: str, start: int) -> bool:
    """Say whether what stands before the @ is a user or password of a URL: `://u:PASS@host`."""
    before = text[max(0, start - 10) : start]
    if before.endswith("://"):
        return "mailto" not in before
    if not before.endswith(":"):
        return False
    return "://" in text[max(0, start - LOCAL_CHARS) : start].rsplit(maxsplit=1)[-1]


def find_ipv4(text: str) -> Iterator[Edit]:
    """Yield public IPv4 addresses; versions, section numbers and private nets stay."""
    for found in IPV4.finditer(text):
        dot = found.start()
        start = dot - 1
        while start > dot - 3 and text[start - 1 : start].isdigit():
            start -= 1
        previous = text[start - 1 : start] if start else ""
        if (
            previous
            and (previous.isalnum() or previous in "._")
            and text[start - 2 : start] not in ESCAPES
        ):
            continue
        if _is_public(text[start : found.end()]) and not _is_version(text, start, found.end()):
            yield Edit(start, found.end(), "ipv4", IP_ADDRESS)


ESCAPES = frozenset({"\\n", "\\r", "\\t"})


@lru_cache(65536)
def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _is_version(text: str, start: int, end: int) -> bool:
    """Say whether four numbers are a version: by the word before them, or all of one digit.

    `release 4.2.1.8`, `foo==1.2.3.4`, `foo-1.2.3.4.tar.gz` and `1.2.3.4`, not `ping 1.1.1.1`.
    """
    before = text[max(0, start - CONTEXT_CHARS) : start]
    if end - start == 7 and not NETWORK.search(before):
        return True
    word = before.rstrip(PUNCTUATION)[-WORD_CHARS:]
    if (word and not word[-1].isdigit() and VERSION.search(word)) or PINNED.search(before[-4:]):
        return True
    # A product in a user agent.
    return before[-1:] == "/" and before[-2:-1].isalnum() and text[end : end + 1] != ":"


def find_ipv6(text: str) -> Iterator[Edit]:
    """Yield global IPv6 addresses of three groups or more; `x[a::2]` and `2001:db8::1` stay."""
    for found in IPV6.finditer(text):
        start = found.start() - 4
        address = text[start : found.end()]
        if sum(map(bool, address.split(":"))) >= 3 and _is_public(address):
            yield Edit(start, found.end(), "ipv6", IP_ADDRESS)
