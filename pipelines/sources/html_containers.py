"""Handlers of lists, quotes, definition lists and details."""

from pipelines.sources.html_walk import BLANK, Handler, Walker, attributes

_LISTS = frozenset(("ul", "ol"))
# What hides an open list item from a new one or from an end tag.
_ITEM_SCOPE = frozenset(("ul", "ol", "blockquote", "dl", "details"))
_OUTER_SCOPE: frozenset[str] = frozenset()
_MAX_NUMBER = 999_999_000  # CommonMark allows nine digits


def _start_list(walker: Walker, i: int) -> int:
    written = len(walker.out)
    walker.flush()
    name, stack = walker.names[i], walker.stack
    if stack and stack[-1].name in _LISTS:  # a list right in a list belongs to the item before
        indent = " " * (2 if stack[-1].name == "ul" else 3)
        if walker.open_container("li", indent, indent) and len(walker.out) > stack[-2].mark:
            walker.gap = "\n"
    start = 1
    if name == "ol" and walker.rests[i]:
        start = _number(attributes(walker.rests[i]).get("start", ""), 1)
    tight = bool(stack) and stack[-1].name == "li" and len(walker.out) > written
    opened = walker.open_container(name, "", "")
    if opened:
        if start != 1 and walker.out:  # only a list from 1 may follow text without a blank line
            walker.gap = walker.blank
        elif tight:
            walker.gap = "\n"
        opened.number = start
        bullets = ("-", "*") if name == "ul" else (".", ")")
        # Two lists in a row are one unless their marks differ.
        opened.bullet = bullets[walker.last_list == (len(walker.out), bullets[0])]
    walker.tail(walker.texts[i])
    return i + 1


def _number(text: str, default: int) -> int:
    text = text.strip(BLANK)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default
    return min(number, _MAX_NUMBER)


def _end_list(walker: Walker, i: int) -> int:
    walker.flush()
    walker.close_container(walker.names[i][1:], frozenset(("blockquote",)))
    walker.tail(walker.texts[i])
    return i + 1


def _start_item(walker: Walker, i: int) -> int:
    if walker.parts:
        walker.flush()
    stack = walker.stack
    if stack and stack[-1].name not in _LISTS and not walker.skipped:
        walker.close_container("li", _ITEM_SCOPE)
    if not stack or stack[-1].name not in _LISTS or walker.skipped:
        if walker.skipped or not (implied := walker.open_container("ul", "", "")):
            walker.tail(walker.texts[i])
            return i + 1
        implied.bullet = "-"
    marker = _marker(walker, i)
    text = walker.texts[i]
    if walker.names[i + 1] == "/li" and not walker.inline:
        text = text.strip(BLANK)
        if text:
            rest = walker.rest
            walker.first += marker
            walker.rest += " " * len(marker)
            walker.paragraph(text)
            walker.first = walker.rest = rest
        i += 1
        text = walker.texts[i]
    else:
        walker.open_container("li", marker, " " * len(marker))
    walker.tail(text)
    return i + 1


def _marker(walker: Walker, i: int) -> str:
    """Return the mark of the next item of the innermost list and set the gap before it."""
    around = walker.stack[-1]
    if len(walker.out) > around.mark:
        starts_block = walker.names[i + 1] == "p" and not walker.texts[i].strip(BLANK)
        walker.gap = walker.blank if around.loose or starts_block else "\n"
    if around.name == "ul":
        return f"{around.bullet} "
    number = around.number
    if walker.rests[i]:
        number = _number(attributes(walker.rests[i]).get("value", ""), number)
    around.number = min(number + 1, _MAX_NUMBER)
    return f"{number}{around.bullet} "


def _end_item(walker: Walker, i: int) -> int:
    if walker.parts:
        walker.flush()
    walker.close_container("li", _ITEM_SCOPE)
    text = walker.texts[i]
    if text and not text.isspace():
        walker.parts.append(text)
    return i + 1


def _start_quote(walker: Walker, i: int) -> int:
    walker.flush()
    prefix = ">! " if "spoiler" in walker.rests[i] else "> "
    walker.open_container("blockquote", prefix, prefix)
    walker.tail(walker.texts[i])
    return i + 1


def _end_container(walker: Walker, i: int) -> int:
    walker.flush()
    walker.close_container(walker.names[i][1:], _OUTER_SCOPE)
    walker.tail(walker.texts[i])
    return i + 1


def _start_definitions(walker: Walker, i: int) -> int:
    walker.flush()
    walker.open_container("dl", "", "")
    walker.tail(walker.texts[i])
    return i + 1


def _start_term(walker: Walker, i: int) -> int:
    walker.flush()
    walker.close_container("dd", frozenset(("dl", "blockquote", "li")))
    walker.tail(walker.texts[i])
    return i + 1


def _start_definition(walker: Walker, i: int) -> int:
    walker.flush()
    walker.close_container("dd", frozenset(("dl", "blockquote", "li")))
    if walker.open_container("dd", ": ", "  ") and walker.out:
        walker.gap = "\n"
    walker.tail(walker.texts[i])
    return i + 1


def _start_details(walker: Walker, i: int) -> int:
    walker.flush()
    if not walker.cells and walker.open_container("details", "", ""):
        walker.emit("<details>")
    walker.tail(walker.texts[i])
    return i + 1


def _end_details(walker: Walker, i: int) -> int:
    walker.flush()
    if walker.close_container("details", frozenset(("li", "blockquote"))):
        walker.emit("</details>")
    walker.tail(walker.texts[i])
    return i + 1


def _start_summary(walker: Walker, i: int) -> int:
    walker.flush()
    if walker.stack and walker.stack[-1].name == "details":
        walker.set_heading("<summary>")
        if walker.out and walker.out[-1].endswith("<details>"):
            walker.gap = "\n"
    walker.tail(walker.texts[i])
    return i + 1


def _end_summary(walker: Walker, i: int) -> int:
    walker.flush()
    walker.set_heading("")
    walker.tail(walker.texts[i])
    return i + 1


HANDLERS: dict[str, Handler] = {
    "ul": _start_list,
    "ol": _start_list,
    "/ul": _end_list,
    "/ol": _end_list,
    "li": _start_item,
    "/li": _end_item,
    "blockquote": _start_quote,
    "/blockquote": _end_container,
    "dl": _start_definitions,
    "/dl": _end_container,
    "dt": _start_term,
    "dd": _start_definition,
    "/dd": _end_container,
    "details": _start_details,
    "/details": _end_details,
    "summary": _start_summary,
    "/summary": _end_summary,
}
