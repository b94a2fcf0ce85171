"""The walk over the tags of an HTML body, and the handlers of paragraphs and headings.

A handler takes its tag and the text after it; it gets the index of its tag and returns the index
of the next one, so an element without tags inside costs one call.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from pipelines.sources.html_blocks import BREAK, Blocks
from pipelines.sources.html_text import unescape

BLANK = " \t\n\f"
_ATTRIBUTE = re.compile(
    r"""([^\s"'<>/=]+)(?:\s*+=\s*+(?:"([^"]*+)"?|'([^']*+)'?|([^\s>]*+)))?""", re.DOTALL
)
_BLOCK_NAMES = frozenset(
    "p pre ul ol li dl dt dd blockquote h1 h2 h3 h4 h5 h6 hr table thead tbody tfoot tr td th "
    "caption div details summary section article main header footer aside nav figure "
    "figcaption address center fieldset form body html head hgroup menu dir search option "
    "optgroup select legend listing xmp".split()
)
_BLOCKS = _BLOCK_NAMES | {f"/{name}" for name in _BLOCK_NAMES}
_END = ("", "")
_SCOPES = frozenset("ul ol li blockquote td th tr table dl dd".split())

Handler = Callable[["Walker", int], int]


class RawTextFound(Exception):
    """An element was met whose content is no markup; it must be cut out first."""


class Gathered(NamedTuple):
    """The exact text of a code element, and where it ended.

    `end` is the index of its end tag where `closed`, else of the first tag outside it.
    """

    text: str
    end: int
    closed: bool
    breaks: bool


class Walker(Blocks):
    """Writes Markdown from names, attributes and texts of tags; `texts[i]` follows tag i.

    `tokens` are text, name and attributes in turn, `texts` the same texts ready for Markdown.
    """

    __slots__ = (
        "grid", "handlers", "hint", "hint_all", "hinted", "names", "rests", "texts", "tokens",
    )  # fmt: skip

    def __init__(self, tokens: list[str], texts: list[str], handlers: dict[str, Handler]) -> None:
        super().__init__()
        self.tokens, self.texts, self.handlers = tokens, texts, handlers
        self.hint = self.hint_all = ""
        self.hinted = False
        self.grid: object = None
        self.names, self.rests = tokens[1::3], tokens[2::3]
        self.names += _END  # handlers look up to two tags ahead

    def raw(self, i: int) -> str:
        """Return the text after tag i as it stands in the HTML."""
        return self.tokens[3 * i + 3]

    def convert(self, lead: str) -> str:
        """Walk all tags and return the document; `lead` is the text before the first."""
        names = self.names
        self.tail(lead)
        i, end = 0, len(names) - 2
        known = self.handlers.get
        while i < end:
            i = known(names[i], unknown)(self, i)
        if self.parts:
            self.flush()
        return "".join(self.out)

    def tail(self, text: str) -> None:
        """Take the text after the tag of a block; blanks between blocks mean nothing."""
        if text and not text.isspace():
            self.parts.append(text)

    def gather(self, i: int, closing: str) -> Gathered:
        """Return the exact text from tag i to the end tag `closing`.

        A block ends inline code; the end of a list item, quote or cell around it ends a `pre`.
        """
        names, rests = self.names, self.rests
        inline, depth, breaks = closing != "/pre", 0, False
        pieces = [self.raw(i)]
        for at in range(i + 1, len(names) - 2):
            name = names[at].lower()
            if name == closing:
                return Gathered(unescape("".join(pieces)), at, closed=True, breaks=breaks)
            if name in _BLOCKS:
                depth += (name in _SCOPES) - (name[1:] in _SCOPES)
                if inline or depth < 0:
                    return Gathered(unescape("".join(pieces)), at, closed=False, breaks=breaks)
            raw = self.raw(at)
            if name == "br":
                breaks = True
                raw = f"\n{raw.removeprefix(chr(10))}"
            elif rests[at][:1] == ">":
                pieces.append(rests[at][1:-6])
            pieces.append(raw)
        return Gathered(unescape("".join(pieces)), len(names) - 2, closed=False, breaks=breaks)


def attributes(rest: str) -> dict[str, str]:
    """Return the attributes of a tag, decoded; the first of two of one name counts."""
    found: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(rest):
        value = double or single or bare
        found.setdefault(name.lower(), unescape(value) if "&" in value else value)
    return found


def unknown(walker: Walker, i: int) -> int:
    """Take an element without meaning here; one in capitals is looked up in small letters."""
    name = walker.names[i]
    if not name.islower():
        walker.names[i] = name = name.lower()
        if name in walker.handlers:
            return walker.handlers[name](walker, i)
    walker.append(walker.texts[i])
    return i + 1


def block(walker: Walker, i: int) -> int:
    """Start or end a block that has no mark of its own."""
    if walker.parts:
        walker.flush()
    walker.tail(walker.texts[i])
    return i + 1


def _start_paragraph(walker: Walker, i: int) -> int:
    if walker.parts:
        walker.flush()
    stack = walker.stack
    if stack and stack[-1].name == "li" and len(stack) > 1:
        stack[-2].loose = True
    names, texts = walker.names, walker.texts
    text = texts[i]
    while names[i + 1] == "/p" and not walker.inline:  # nothing but text inside
        text = text.strip(BLANK)
        if text:
            walker.paragraph(text)
        i += 1
        text = texts[i]
        if text and not text.isspace():
            break
        if names[i + 1] != "p":
            return i + 1
        i += 1
        text = texts[i]
    if text:
        walker.parts.append(text)
    return i + 1


def _end_paragraph(walker: Walker, i: int) -> int:
    parts = walker.parts
    if walker.inline:
        walker.flush()
    elif parts:
        text = "".join(parts).strip(BLANK)
        parts.clear()
        if text:
            walker.paragraph(text)
    text = walker.texts[i]
    if text and not text.isspace():
        parts.append(text)
    return i + 1


def _start_heading(walker: Walker, i: int) -> int:
    walker.flush()
    walker.set_heading("#" * int(walker.names[i][1]))
    walker.tail(walker.texts[i])
    return i + 1


def _end_heading(walker: Walker, i: int) -> int:
    walker.flush()
    walker.set_heading("")
    walker.tail(walker.texts[i])
    return i + 1


def _rule(walker: Walker, i: int) -> int:
    walker.flush()
    if not walker.cells:
        walker.emit("---")
    walker.tail(walker.texts[i])
    return i + 1


def _break(walker: Walker, i: int) -> int:
    parts = walker.parts
    if parts:
        if parts[-1] == BREAK:
            walker.flush()
        else:
            parts[-1] = parts[-1].rstrip(BLANK)
            parts.append(BREAK)
    text = walker.texts[i].lstrip(BLANK)
    if text:
        parts.append(text)
    return i + 1


def _find_raw_text(walker: Walker, i: int) -> int:
    raise RawTextFound(walker.names[i])


HANDLERS: dict[str, Handler] = dict.fromkeys(_BLOCKS, block)
HANDLERS |= {f"h{level}": _start_heading for level in range(1, 7)}
HANDLERS |= {f"/h{level}": _end_heading for level in range(1, 7)}
HANDLERS |= {"p": _start_paragraph, "/p": _end_paragraph, "hr": _rule, "br": _break, "/br": _break}
RAW_TEXT = ("script", "style", "iframe", "template", "title")
HANDLERS |= dict.fromkeys(RAW_TEXT, _find_raw_text)
