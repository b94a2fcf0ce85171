"""The Markdown being written: blocks in containers, and the run of inline text being collected.

A container (quote, list item) contributes `first`, what stands before the next line, and `rest`,
what stands before each line after it. Blocks are separated by `gap`. All state is in one object
so that the walker over the tags needs no tree.
"""

import re
from dataclasses import dataclass

from pipelines.sources.html_text import (
    LINE_STARTS,
    RISKY,
    code_span,
    escape_brackets,
    escape_line_starts,
    settle_escapes,
)

# Deeper containers are flattened: each level widens every line, so unlimited depth is quadratic.
MAX_CONTAINERS = 40
_BLANK = " \t\n\f"
BREAK = "  \n"
_CLOSING_HASHES = re.compile(r"(?:(?<=[ \t])|\A)(#+)\Z")
MARKS = {
    "strong": ("**", "**"),
    "em": ("*", "*"),
    "del": ("~~", "~~"),
    "sub": ("<sub>", "</sub>"),
    "sup": ("<sup>", "</sup>"),
    "kbd": ("<kbd>", "</kbd>"),
    "q": ('"', '"'),
}


@dataclass(slots=True)
class Container:
    """An open quote, list, list item or other container, and the state to return to."""

    name: str
    first: str
    rest: str
    blank: str
    mark: int  # blocks written before it
    bullet: str = ""
    number: int = 0
    loose: bool = False


@dataclass(slots=True)
class Inline:
    """An open inline element; its text starts at `at` in the run."""

    kind: str
    at: int
    target: str = ""
    nested: int = 0


class Blocks:
    """Collects inline text into blocks and blocks into a Markdown document."""

    __slots__ = (
        "blank", "cells", "first", "floor", "gap", "heading", "inline", "last_list", "out",
        "parts", "rest", "risky", "skipped", "special", "stack",
    )  # fmt: skip

    def __init__(self) -> None:
        self.out: list[str] = []
        self.parts: list[str] = []
        self.inline: list[Inline] = []
        self.stack: list[Container] = []
        self.skipped: dict[str, int] = {}
        self.gap = self.first = self.rest = self.heading = ""
        self.blank = "\n\n"
        self.floor = 0
        self.risky = self.special = self.cells = False
        self.last_list = (-1, "")

    # -- blocks

    def emit(self, block: str) -> None:
        """Write a finished block with the prefixes of its containers."""
        rest = self.rest
        if rest or self.first:
            if "\n" in block:
                block = _indent(block, rest)
            block = self.first + block
            self.first = rest
        self.out += (self.gap, block)
        self.gap = self.blank

    def flush(self) -> None:
        """End the run of inline text, if any, and write it as a paragraph or heading."""
        parts = self.parts
        if self.inline:
            self._suspend()
        text = (parts[0] if len(parts) == 1 else "".join(parts)).strip(_BLANK)
        parts.clear()
        if text:
            self.paragraph(text)

    def paragraph(self, text: str) -> None:
        """Write stripped inline text as a paragraph, a heading or a part of a table cell."""
        if self.special:
            text = self._finish(text)
        elif text[0] in LINE_STARTS or "\n" in text:
            text = escape_line_starts(text)
        if self.rest or self.first:
            self.emit(text)
        else:
            self.out += (self.gap, text)
            self.gap = self.blank

    def _finish(self, text: str) -> str:
        if self.heading:
            text = heading_line(self.heading, text)
            self.set_heading("")
        elif self.cells:
            text = text.replace(BREAK, "<br>").replace("\n", " ")
        else:
            text = escape_line_starts(text)
        return settle_escapes(text) if RISKY in text else text

    def set_heading(self, mark: str) -> None:
        """Make the next block a heading, or no heading."""
        self.heading = mark
        self.special = self.risky or self.cells or bool(mark)

    def open_container(self, name: str, first: str, rest: str) -> Container | None:
        """Open a container whose lines carry a prefix; None where it is too deep for one."""
        if len(self.stack) >= MAX_CONTAINERS:
            self.skipped[name] = self.skipped.get(name, 0) + 1
            return None
        container = Container(name, self.first, self.rest, self.blank, len(self.out))
        self.stack.append(container)
        if rest:
            self.first += first
            self.rest += rest
            self.blank = f"\n{self.rest.rstrip(' ')}\n"
        return container

    def close_container(self, name: str, barriers: frozenset[str] = frozenset()) -> bool:
        """Close the innermost container of a name and all within it; return whether one was open.

        Containers named in `barriers` hide what is outside them.
        """
        if self.skipped.get(name):
            self.skipped[name] -= 1
            return False
        stack = self.stack
        at = len(stack) - 1
        while at >= self.floor and stack[at].name != name:
            if stack[at].name in barriers:
                return False
            at -= 1
        if at < self.floor:
            return False
        self.close_down_to(at)
        return True

    def close_down_to(self, depth: int) -> None:
        """Close the innermost containers until `depth` of them are open."""
        while len(self.stack) > depth:
            container = self.stack.pop()
            self.rest, self.blank = container.rest, container.blank
            if len(self.out) > container.mark:
                self.first = container.rest
                self.gap = self.blank
            else:
                self.first = container.first
            if container.name in ("ul", "ol"):
                self.last_list = (len(self.out), container.bullet)

    # -- inline text

    def open_inline(self, kind: str, target: str = "") -> None:
        """Open an inline element; one within one of its own kind has no effect."""
        for entry in self.inline:
            if entry.kind == kind:
                entry.nested += 1
                return
        self.inline.append(Inline(kind, len(self.parts), target))

    def close_inline(self, kind: str) -> None:
        """Close an inline element, and reopen those opened within it that are still open."""
        for at in range(len(self.inline) - 1, -1, -1):
            if self.inline[at].kind == kind:
                break
        else:
            return
        if self.inline[at].nested:
            self.inline[at].nested -= 1
            return
        for entry in reversed(self.inline[at:]):
            self._wrap(entry)
        del self.inline[at]
        for entry in self.inline[at:]:
            entry.at = len(self.parts)

    def _suspend(self) -> None:
        for entry in reversed(self.inline):
            self._wrap(entry)
            entry.at = 0

    def _wrap(self, entry: Inline) -> None:
        """Put the marks of an element around its text; blanks at its ends go outside."""
        parts = self.parts
        inside = parts[entry.at :]
        del parts[entry.at :]
        content = inside[0] if len(inside) == 1 else "".join(inside)
        if entry.target and ("[" in content or "]" in content) and not _is_image(content):
            content = escape_brackets(inside)
            self.risky = self.special = True
        text = content.strip(_BLANK)
        if not text:
            self.append(content)
            return
        start = content.find(text[0])
        if start:
            self.append(content[:start])
        if entry.kind == "a" and entry.target:
            self.append_bracket(f"[{text}]({entry.target})")
        elif entry.kind == "a":
            parts.append(text)
        else:
            self.append_marked(entry.kind, text)
        if start + len(text) < len(content):
            parts.append(content[start + len(text) :])

    def append(self, text: str) -> None:
        """Append inline text; a blank does not follow a blank."""
        if text and text[0] in _BLANK and self.parts and self.parts[-1][-1:] in (" ", "\n"):
            text = text.lstrip(_BLANK)
        if text:
            self.parts.append(text)

    def append_marked(self, kind: str, text: str) -> None:
        """Append emphasised text; two neighbours of one kind become one."""
        opening, closing = MARKS[kind]
        parts = self.parts
        if parts and kind in ("strong", "em", "del") and self._ends_with_kind(closing):
            before = parts[-1][: -len(closing)]
            between = " " if before[-1] == "`" == text[0] else ""
            parts[-1] = f"{before}{between}{text}{closing}"
        else:
            parts.append(f"{opening}{text}{closing}")

    def _ends_with_kind(self, closing: str) -> bool:
        last = self.parts[-1]
        size = len(closing)
        return (
            len(last) > 2 * size
            and last.startswith(closing)
            and last.endswith(closing)
            and last[size] != closing[0]
            and last[-size - 1] not in (closing[0], "\\")
        )

    def append_code(self, code: str) -> None:
        """Append inline code, exactly; two neighbours become one, or their marks would merge."""
        parts = self.parts
        span = code_span(code)
        last = parts[-1] if parts else ""
        if last[-1:] == "`" and last[-2:] != f"{RISKY}`":
            if span == f"`{code}`" and last == f"`{last.strip('`')}`":
                parts[-1] = f"{last[:-1]}{code}`"
                return
            span = f" {span}"
        if span:
            parts.append(span)

    def append_bracket(self, text: str) -> None:
        """Append what begins with a bracket; an exclamation mark before it would change it."""
        parts = self.parts
        if parts and parts[-1][-1:] == "!":
            parts[-1] = f"{parts[-1][:-1]}\\!"
        parts.append(text)


def _is_image(text: str) -> bool:
    """Return whether the text of a link is one image, whose brackets are settled."""
    return text[:2] == "![" and text[-1] == ")" and text.count("](") == 1 and "\\](" not in text


def heading_line(mark: str, text: str) -> str:
    """Return a heading, or the summary of details, on one line."""
    text = text.replace(BREAK, " ").replace("\n", " ")
    if mark == "<summary>":
        return f"<summary>{text}</summary>"
    if text[-1] == "#":
        text = _CLOSING_HASHES.sub(r"\\\1", text)
    return f"{mark} {text}"


def _indent(block: str, rest: str) -> str:
    """Return the block with the prefix before each line after the first, none ends in blanks."""
    if "\n\n" not in block:
        return block.replace("\n", f"\n{rest}")
    bare = rest.rstrip(" ")
    return "\n".join(
        line if not at else f"{rest}{line}" if line else bare
        for at, line in enumerate(block.split("\n"))
    )
