"""Finds its way in a dump file: where rows begin and end, ranges of whole lines, line numbers."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from pipelines.errors import SourceError
from pipelines.sources.stack_exchange.rows import Line, PlainRows, read_chunk

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16
CHUNK_BYTES = 2 << 20  # small enough for the caches of a core
MAX_ROW_BYTES = 1 << 25
DECLARATION = re.compile(rb"\s*<\?xml\b[^>]*\?>")
COMMENT = re.compile(rb"\s*<!--.*?-->", re.DOTALL)
ENCODING = re.compile(rb"""encoding\s*=\s*["']([\w.-]+)["']""")
NEXT_ROW = re.compile(rb"\n(?=\s*<)")


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes of a file that its rows take, and the number of lines before them."""

    start: int
    end: int
    lines: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some whole lines of a file: the first one's number from 0, its offset, and the rows."""

    line: int
    offset: int
    content: bytes
    plain: PlainRows
    odd: list[Line]
    num_lines: int


def find_extent(path: Path, element: str) -> Extent:
    """Find the rows of a file `<element> ... </element>`; SourceError where it is not one.

    A document type is refused: it could define entities, and a dump has none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(max(0, size - HEAD_BYTES))
        tail = file.read()
    refuse_doctype(path, head.partition(b"<row")[0], 0)
    start, empty = _find_start(path, head, element)
    if empty:
        return Extent(start, start, head[:start].count(b"\n"))
    closing = f"</{element}>".encode()
    rows = tail.rstrip()
    if not rows.endswith(closing):
        whole = max(rows.rfind(b"/>"), 0) + 2 + max(0, size - HEAD_BYTES)
        _fail(
            path,
            f"is truncated: it ends at byte {size} without {closing.decode()} (its last whole row "
            f"ends near byte {min(whole, size)}); download or unpack it again",
        )
    end = max(0, size - HEAD_BYTES) + len(rows) - len(closing)
    return Extent(min(start, end), end, head[:start].count(b"\n"))


def _find_start(path: Path, head: bytes, element: str) -> tuple[int, bool]:
    """Return the offset of the first row, and whether the element is written as an empty one."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        _fail(path, "is UTF-16; dumps are UTF-8: convert it first")
    at = len(BOM) if head.startswith(BOM) else 0
    declaration = DECLARATION.match(head, at)
    if declaration:
        at = declaration.end()
        encoding = ENCODING.search(declaration[0])
        if encoding and encoding[1].lower() not in (b"utf-8", b"utf8", b"us-ascii"):
            _fail(path, f"declares encoding {encoding[1].decode()}; dumps are UTF-8")
    while comment := COMMENT.match(head, at):
        at = comment.end()
    root = re.compile(rf"\s*<{element}\s*(/?)>(?:[ \t\r]*\n)?".encode()).match(head, at)
    if not root:
        shown = head[at : at + 60].decode("utf-8", "backslashreplace").strip()
        _fail(path, f"is not a Stack Exchange dump: expected <{element}> at byte {at}: {shown!r}")
    return root.end(), bool(root[1])


def refuse_doctype(path: Path, content: bytes, offset: int) -> None:
    """Raise SourceError where markup declares a document type or an entity."""
    found = re.search(rb"<!(?:DOCTYPE|ENTITY)", content)
    if found:
        at = offset + found.start()
        _fail(
            path,
            f"has a document type ({found[0].decode()} at byte {at}), which may define entities "
            "and which no Stack Exchange dump has; it is not read",
        )


def _fail(path: Path, what: str) -> NoReturn:
    raise SourceError(f"{path} {what}")


def read_range(
    path: Path, extent: Extent, first: int, last: int, names: Sequence[str]
) -> Iterator[Chunk]:
    """Yield the rows that start from offset `first` on and before `last`, chunk by chunk.

    Ranges that touch share no row and miss none: a row belongs to the range its line starts in.
    """
    with path.open("rb") as file:
        start = _next_row(path, file, extent, first)
        end = _next_row(path, file, extent, last)
        line = 0
        for offset, content in _read_lines(path, file, start, end):
            plain, odd = read_chunk(content, names)
            for each in odd:
                refuse_doctype(path, each.content, offset + each.offset)
            num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
            yield Chunk(line, offset, content, plain, odd, num_lines)
            line += num_lines


def _next_row(path: Path, file: BinaryIO, extent: Extent, offset: int) -> int:
    """Return the offset of the first line from `offset` on that starts with `<`."""
    if offset <= extent.start:
        return extent.start
    if offset >= extent.end:
        return extent.end
    file.seek(offset - 1)
    seen = b""
    while more := file.read(max(HEAD_BYTES, len(seen))):
        seen += more
        found = NEXT_ROW.search(seen)
        if found:
            return min(offset - 1 + found.end(), extent.end)
        if len(seen) > MAX_ROW_BYTES:
            _fail_long(path, offset)
    return extent.end


def _read_lines(path: Path, file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, whole lines) of about CHUNK_BYTES; the last line need not end."""
    file.seek(start)
    at, held = start, b""
    while at + len(held) < end:
        more = file.read(min(CHUNK_BYTES, end - at - len(held)))
        if not more:
            _fail(path, f"became shorter while it was read: it ends at byte {at + len(held)}")
        held += more
        if at + len(held) >= end:
            yield at, held
            return
        cut = held.rfind(b"\n", 0, max(0, held.rfind(b"<row "))) + 1
        if cut:
            yield at, held[:cut]
            at, held = at + cut, held[cut:]
        elif len(held) > MAX_ROW_BYTES:
            _fail_long(path, at)


def _fail_long(path: Path, offset: int) -> NoReturn:
    _fail(
        path,
        f"has no end of line within {MAX_ROW_BYTES >> 20} MiB of byte {offset}; expected one "
        "<row .../> a line, as dumps have it",
    )
