"""Reads the rows of a dump file: many plain ones at a time, each odd one by a hardened parser.

A dump is one `<row NAME="VALUE" ... />` a line. Values hold no raw double quote, so the quotes of a
chunk cut it into values and the gaps between them, and the distinct gaps, a few dozen, say which
value is what: the work in Python is per chunk, not per row. A chunk where anything is unusual is
sorted line by line, and what is not plain goes through lxml. What the fast way returns is what
lxml returns for the same line, tested row by row.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.sources.stack_exchange.entities import count_references, replace_references

QUOTE, LESS, AMPERSAND, SPACE = b'"<& '
GAP = re.compile(rb'" ([A-Za-z]+)="')
BREAK = re.compile(rb'" ?/>\r?\n(?:  )?<row ([A-Za-z]+)="')
FIRST = re.compile(rb'(?:  )?<row ([A-Za-z]+)="')
LAST = re.compile(rb'" ?/>\r?\n')
PLAIN = re.compile(rb'(?:  )?<row(?: [A-Za-z]+="[^"<\x00-\x1f]*")+ ?/>\r?\n')
NAMES = re.compile(rb' ([A-Za-z]+)="[^"]*"')
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
NOT_CHARACTERS = (b"\xef\xbf\xbe", b"\xef\xbf\xbf")  # U+FFFE and U+FFFF are not XML

Attributes = dict[str, str]


class BadRow(Exception):
    """A row that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Line:
    """A line with its number and its byte offset in the chunk, both from 0."""

    number: int
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Values of the rows by attribute, null where a row has none, and each row's line."""

    values: dict[str, pa.StringArray]
    lines: npt.NDArray[np.int64]


def read_chunk(chunk: bytes, names: Sequence[str]) -> tuple[PlainRows, list[Line]]:
    """Return the named attributes of the plain rows in whole lines, and the lines that are odd."""
    if chunk and not chunk.endswith(b"\n"):
        chunk += b"\n"
    values = read_plain(chunk, names)
    if values is not None:
        return PlainRows(values, np.arange(_num_rows(values))), []
    lines = list(split_lines(chunk))
    plain = [line for line in lines if _is_plain(line.content)]
    values = read_plain(b"".join(line.content for line in plain), names)
    if values is None:
        # A reference that XML does not know, say: which line has it, lxml finds out.
        empty = {name: pa.array([], pa.string()) for name in names}
        return PlainRows(empty, np.arange(0)), lines
    numbers = {line.number for line in plain}
    odd = [line for line in lines if line.number not in numbers]
    return PlainRows(values, np.array(sorted(numbers), dtype=np.int64)), odd


def _num_rows(values: dict[str, pa.StringArray]) -> int:
    return len(next(iter(values.values())))


def split_lines(chunk: bytes) -> Iterator[Line]:
    """Yield the lines of a chunk; one that does not start with `<` belongs to the one before."""
    held: Line | None = None
    offset = 0
    for number, content in enumerate(chunk.split(b"\n")):
        line = Line(number, offset, content + b"\n")
        offset += len(line.content)
        if held and content.strip() and not content.lstrip().startswith(b"<"):
            held = Line(held.number, held.offset, held.content + line.content)
            continue
        if held:
            yield held
        held = line if content.strip() else None
    if held:
        yield held


def pick_lines(chunk: bytes, numbers: npt.NDArray[np.int64]) -> list[Line]:
    """Return the lines of a chunk that have these numbers."""
    wanted = set(numbers.tolist())
    return [line for line in split_lines(chunk) if line.number in wanted] if wanted else []


def _is_plain(line: bytes) -> bool:
    if not PLAIN.fullmatch(line):
        return False
    names = NAMES.findall(line)
    return len(names) == len(set(names)) and b"xmlns" not in names and _is_text(line)


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not any(bad in content for bad in NOT_CHARACTERS)


def read_plain(chunk: bytes, names: Sequence[str]) -> dict[str, pa.StringArray] | None:
    """Return the named attributes of every row of a chunk, or None where a row is not plain."""
    buffer = np.frombuffer(chunk, dtype=np.uint8)
    quotes = np.flatnonzero(buffer == QUOTE)
    if not chunk:
        return {name: pa.array([], pa.string()) for name in names}
    if not len(quotes) or len(quotes) % 2 or not _is_valid(chunk, buffer):
        return None
    segments = _split_at(quotes, chunk)
    layout = _read_layout(chunk, buffer, quotes, segments)
    if layout is None:
        return None
    codes, rows, known = layout
    order = np.argsort(codes, kind="stable")
    codes, rows = codes[order], rows[order]
    if ((codes[1:] == codes[:-1]) & (rows[1:] == rows[:-1])).any():
        return None  # a row with an attribute twice
    num_rows = int(rows.max()) + 1
    found: dict[str, pa.StringArray] = {}
    for name in names:
        place = np.full(num_rows, -1, dtype=np.int32)
        if name in known:
            low, high = np.searchsorted(codes, [known[name], known[name] + 1])
            place[rows[low:high]] = 2 * order[low:high] + 1
        found[name] = segments.take(pa.array(place, mask=place < 0))
    return _replace_all(buffer, found)


def _replace_all(
    buffer: npt.NDArray[np.uint8], found: dict[str, pa.StringArray]
) -> dict[str, pa.StringArray] | None:
    seen = 0
    for name, column in found.items():
        replaced = replace_references(column)
        if replaced is None:
            return None
        found[name], count = replaced
        seen += count
    # Attributes nobody asked for must be well-formed, too.
    if seen != int(np.count_nonzero(buffer == AMPERSAND)) and count_references(buffer) is None:
        return None
    return found


def _is_valid(chunk: bytes, buffer: npt.NDArray[np.uint8]) -> bool:
    """Say whether a chunk is UTF-8 without the two code points that XML excludes."""
    try:
        # Arrow's check is several times as fast as bytes.decode.
        pa.array([chunk], pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        return False
    if not (buffer == NOT_CHARACTERS[0][0]).any():
        return True
    return not any(bad in chunk for bad in NOT_CHARACTERS)


def _split_at(quotes: npt.NDArray[np.int64], chunk: bytes) -> pa.StringArray:
    """Cut a chunk into gap, value, gap, ..., gap without copying it; gaps keep the quotes."""
    offsets = np.empty(len(quotes) + 2, dtype=np.int32)
    offsets[0], offsets[-1] = 0, len(chunk)
    offsets[1:-1] = quotes
    offsets[1:-1:2] += 1
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(chunk)]
    return pa.StringArray.from_buffers(len(quotes) + 1, buffers[1], buffers[2], buffers[0])


def _read_layout(
    chunk: bytes,
    buffer: npt.NDArray[np.uint8],
    quotes: npt.NDArray[np.int64],
    segments: pa.StringArray,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], dict[str, int]] | None:
    """Return each value's attribute code and row, and the codes by name; None if odd."""
    first = FIRST.fullmatch(chunk[: int(quotes[0]) + 1])
    last = LAST.fullmatch(chunk[int(quotes[-1]) :])
    if not first or not last:
        return None
    between = segments.take(pa.array(np.arange(2, len(segments) - 1, 2, dtype=np.int32)))
    gaps = between.dictionary_encode()
    parsed = [_parse_gap(gap.encode()) for gap in gaps.dictionary.to_pylist()]
    if None in parsed:
        return None
    shapes = [shape for shape in parsed if shape is not None]
    names = [first[1].decode(), *(name for name, _, _ in shapes)]
    known = {name: code for code, name in enumerate(dict.fromkeys(names))}
    if len(known) > 255 or "xmlns" in known:
        return None
    which = gaps.indices.to_numpy(zero_copy_only=False)
    codes = np.empty(len(which) + 1, dtype=np.uint8)
    rows = np.zeros(len(which) + 1, dtype=np.int64)
    codes[0] = known[names[0]]
    if shapes:
        codes[1:] = np.array([known[name] for name, _, _ in shapes], dtype=np.uint8)[which]
        rows[1:] = np.cumsum(np.array([starts for _, starts, _ in shapes], dtype=np.int64)[which])
        ends = int(np.array([ends for _, _, ends in shapes], dtype=np.int64)[which].sum())
    else:
        ends = 0
    # Values hold neither control characters nor "<": all of these are where rows end and start.
    controls = ends + len(last[0]) - len(last[0].rstrip(b"\r\n"))
    if int(np.count_nonzero(buffer < SPACE)) != controls:
        return None
    if int(np.count_nonzero(buffer == LESS)) != int(rows[-1]) + 1:
        return None
    return codes, rows, known


@cache
def _parse_gap(gap: bytes) -> tuple[str, bool, int] | None:
    """Return (attribute, whether it starts a row, line end bytes) of what lies between values."""
    inside = GAP.fullmatch(gap)
    if inside:
        return inside[1].decode(), False, 0
    start = BREAK.fullmatch(gap)
    if start:
        return start[1].decode(), True, gap.count(b"\n") + gap.count(b"\r")
    return None


def read_line(line: bytes) -> list[Attributes]:
    """Return the attributes of the rows on a line, parsed by lxml with nothing switched on.

    Raises BadRow for a line that is not well-formed or holds anything but rows.
    """
    from lxml import etree

    try:
        root = etree.fromstring(b"<rows>" + line.strip() + b"</rows>", _make_parser())
    except (etree.XMLSyntaxError, ValueError) as error:
        raise BadRow(_reason_of(line), " ".join(str(error).split())) from None
    strays = [root.text, *(node.tail for node in root)]
    rows = [node for node in root if isinstance(node.tag, str)]  # comments are none
    if any(row.tag != "row" or len(row) for row in rows) or any(s and s.strip() for s in strays):
        raise BadRow("not_a_row", f"expected <row .../>, found {line[:60]!r}")
    return [{str(name): str(value) for name, value in row.items()} for row in rows]


@cache
def _make_parser() -> Any:
    from lxml import etree

    return etree.XMLParser(
        resolve_entities=False, load_dtd=False, no_network=True, dtd_validation=False,
        huge_tree=False, recover=False,
    )  # fmt: skip


def _reason_of(line: bytes) -> str:
    if CONTROL.search(line):
        return "control_character"
    return "malformed_xml" if _is_text(line) else "invalid_utf8"
