"""Handlers of inline elements and of code."""

import re

from pipelines.sources.html_text import (
    escape_brackets,
    escape_label,
    fenced_block,
    link_target,
    unescape,
)
from pipelines.sources.html_walk import BLANK, Handler, Walker, attributes, block

_KINDS = {
    "strong": "strong", "b": "strong", "em": "em", "i": "em", "cite": "em", "dfn": "em",
    "var": "em", "del": "del", "s": "del", "strike": "del", "sub": "sub", "sup": "sup",
    "kbd": "kbd", "q": "q",
}  # fmt: skip
# Nearly every link of a post; what the address needs to be quoted for is not in it.
_SIMPLE_LINK = re.compile(
    r' href="([^"\\<>()&\x00-\x20\x7f]++)"(?: class="[^"]*+")?'
    r'(?: title="([^"\\&\x00-\x1f]*+)")?(?: rel="[^"]*+")?'
)
_SIMPLE_IMAGE = re.compile(
    r' src="([^"\\<>()&:\x00-\x20\x7f]*+(?:(?<!data):[^"\\<>()&\x00-\x20\x7f]*+)?)"'
    r' alt="([^"\x00-\x1f\\*_`~<&$\[\]]*+)" ?/?'
)
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>\x00-\x20\x7f]*+\Z")
_LANGUAGE = re.compile(
    r"(?:[\s\"'=](?:lang|language|highlight-source)-"
    r"|\s(?:lang|data-lang|data-language)\s*+=\s*+[\"']?)([\w+#.-]+)"
)
_HIGHLIGHTED = re.compile(r"[\"' ]hljs +([\w+#.-]+)|[\"' ]([\w+#.-]+) +hljs[\"' ]")
_NO_LANGUAGE = frozenset(("none", "default", "nohighlight", "s-code-block", "prettyprint"))


def _start_mark(walker: Walker, i: int) -> int:
    names, text = walker.names, walker.texts[i]
    name = names[i]
    if (
        names[i + 1][1:] == name
        and not walker.inline
        and text
        and text[0] not in BLANK
        and text[-1] not in BLANK
    ):
        walker.append_marked(_KINDS[name], text)
        i += 1
        text = walker.texts[i]
    else:
        walker.open_inline(_KINDS[name])
    if text:
        walker.parts.append(text)
    return i + 1


def _end_mark(walker: Walker, i: int) -> int:
    walker.close_inline(_KINDS[walker.names[i][1:]])
    walker.append(walker.texts[i])
    return i + 1


def _start_link(walker: Walker, i: int) -> int:
    text = walker.texts[i]
    simple = _SIMPLE_LINK.fullmatch(walker.rests[i])
    if simple:
        target = url = simple[1]
        if simple[2]:
            target = f'{url} "{simple[2]}"'
    else:
        given = attributes(walker.rests[i])
        url = given.get("href", "")
        target = link_target(url, given.get("title", ""))
    if walker.inline:
        walker.close_inline("a")
    if not (
        url
        and walker.names[i + 1] == "/a"
        and text
        and text[0] not in BLANK
        and text[-1] not in BLANK
    ):
        walker.open_inline("a", target)
        walker.append(text)
        return i + 1
    if (walker.tokens[3 * i + 3] == url or not simple or url[:7] == "mailto:") and _is_address(
        walker.raw(i), url
    ):
        walker.parts.append(f"<{url.removeprefix('mailto:')}>")
    else:
        if "[" in text or "]" in text:
            text = escape_brackets([text])
            walker.risky = walker.special = True
        walker.append_bracket(f"[{text}]({target})")
    i += 1
    text = walker.texts[i]
    if text:
        walker.parts.append(text)
    return i + 1


def _is_address(raw: str, url: str) -> bool:
    """Return whether a link's text is its own absolute address, or that of a mail."""
    text = unescape(raw)
    own = text == url or (url == f"mailto:{text}" and "@" in text)
    return own and _ABSOLUTE.match(url) is not None


def _end_link(walker: Walker, i: int) -> int:
    walker.close_inline("a")
    walker.append(walker.texts[i])
    return i + 1


def _image(walker: Walker, i: int) -> int:
    simple = _SIMPLE_IMAGE.fullmatch(walker.rests[i])
    if simple:
        target, label = simple[1], simple[2]
    else:
        given = attributes(walker.rests[i])
        label = escape_label(given.get("alt", ""))
        target = link_target(given.get("src", ""), given.get("title", ""))
        if "[" in label or "]" in label:
            walker.risky = walker.special = True
    if target or label:
        walker.append_bracket(f"![{label}]({target})")
    text = walker.texts[i]
    if text:
        walker.append(text)
    return i + 1


def _code(walker: Walker, i: int) -> int:
    rest = walker.rests[i]
    if rest[:1] == ">":  # the whole element is one token
        code = rest[1:-6]
        walker.append_code(unescape(code) if "&" in code else code)
    else:
        code, i, closed, breaks = walker.gather(i, f"/{walker.names[i]}")
        free = not (walker.inline or walker.heading or walker.cells)
        if breaks and free and "\n" in code.strip(BLANK):
            walker.flush()
            walker.emit(fenced_block(code.strip("\n"), ""))
        else:
            walker.append_code(code)
        if not closed:
            return i
    text = walker.texts[i]
    if text:
        walker.parts.append(text)
    return i + 1


def _pre(walker: Walker, i: int) -> int:
    if walker.parts:
        walker.flush()
    names, rests = walker.names, walker.rests
    given, closed = rests[i], True
    inner = rests[i + 1] if names[i + 1] == "code" else ""
    if inner[:1] == ">" and names[i + 2] == "/pre" and not walker.raw(i) + walker.raw(i + 1):
        code = inner[1:-6]
        if "&" in code:
            code = unescape(code)
        i += 2
    else:
        given += inner
        code, i, closed = _gather_block(walker, i)
    if code and not code.isspace():
        language = _language(walker, given) if given or walker.hinted else ""
        walker.emit(fenced_block(code, language))
    if not closed:
        return i
    walker.tail(walker.texts[i])
    return i + 1


def _gather_block(walker: Walker, i: int) -> tuple[str, int, bool]:
    code, end, closed, _ = walker.gather(i, "/pre")
    if walker.raw(i)[:1] == "\n":  # HTML ignores a line end right behind the tag
        code = code[1:]
    return code, end, closed


def _language(walker: Walker, given: str) -> str:
    """Return the language by class, else by the hint before the block, else by the page's."""
    hint, walker.hint = walker.hint, ""
    language = hint or walker.hint_all
    if given and given[0] != ">":
        found = _LANGUAGE.search(given) or _HIGHLIGHTED.search(given)
        if found:
            language = found[1] or found[2]
    return "" if language in _NO_LANGUAGE else language


def _hint(walker: Walker, i: int) -> int:
    fields = walker.rests[i].split(" ")
    if len(fields) == 3 and fields[1] == "-all":
        walker.hint_all = fields[2]
    elif len(fields) == 3:
        walker.hint = fields[2]
    walker.hinted = True
    walker.append(walker.texts[i])
    return i + 1


HANDLERS: dict[str, Handler] = dict.fromkeys(_KINDS, _start_mark)
HANDLERS |= dict.fromkeys([f"/{name}" for name in _KINDS], _end_mark)
HANDLERS |= {"a": _start_link, "/a": _end_link, "img": _image, "x-language": _hint}
HANDLERS |= {"code": _code, "tt": _code, "samp": _code, "pre": _pre, "/pre": block}
