"""Replaces XML character references in whole columns at once.

The references that a dump uses differ in their first four bytes. These are looked up for every `&`
of a buffer at a time, and the text between references is copied in one go.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

REFERENCES = {
    b"&lt;": b"<", b"&gt;": b">", b"&amp;": b"&", b"&quot;": b'"', b"&apos;": b"'",
    b"&#xA;": b"\n", b"&#xD;": b"\r", b"&#x9;": b"\t", b"&#10;": b"\n", b"&#13;": b"\r",
    b"&#9;": b"\t", b"&#39;": b"'", b"&#34;": b'"', b"&#xa;": b"\n", b"&#xd;": b"\r",
}  # fmt: skip
AMPERSAND = ord("&")
WINDOW = 8  # bytes compared; no reference above is longer
# The smallest odd factor for which the top byte of (first four bytes * factor) differs for all.
FACTOR = np.uint32(453)

Bytes = npt.NDArray[np.uint8]


def _slot(first: bytes) -> int:
    return (int.from_bytes(first[:4], "little") * int(FACTOR) & 0xFFFFFFFF) >> 24


def _make_table() -> npt.NDArray[np.void]:
    """Return 256 slots: the bytes of a reference, which bits count, its length, its character."""
    fields = [("text", "<u8"), ("mask", "<u8"), ("tail", "<i8"), ("char", "u1")]
    table = np.zeros(256, dtype=fields)
    table["text"] = np.iinfo(np.uint64).max  # no window masked with 0 equals it
    for reference, char in REFERENCES.items():
        mask = (1 << 8 * len(reference)) - 1
        text = int.from_bytes(reference, "little")
        table[_slot(reference)] = (text, mask, len(reference) - 1, ord(char))
    return table


TABLE = _make_table()
TEXT, MASK, TAIL, CHAR = (np.ascontiguousarray(TABLE[name]) for name in TABLE.dtype.names or ())


def replace_references(column: pa.StringArray) -> tuple[pa.StringArray, int] | None:
    """Return a column with its references replaced and their number; None if one is unknown."""
    _, offsets_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32, count=len(column) + 1)
    if data_buffer is None or offsets[-1] == offsets[0]:
        return column, 0
    data = np.frombuffer(data_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]
    found = _find(data)
    if found is None:
        return None
    starts, slots = found
    if not len(starts):
        return column, 0
    ends = starts + TAIL[slots]
    written = data.copy()
    # The last byte of a reference becomes its character: the text after it starts there.
    written[ends] = CHAR[slots]
    cuts = np.empty(2 * len(starts) + 2, dtype=np.int32)
    cuts[0], cuts[-1] = 0, len(data)
    cuts[1:-1:2], cuts[2:-1:2] = starts, ends
    pieces = pa.BinaryArray.from_buffers(
        pa.binary(), len(cuts) - 1, [None, pa.py_buffer(cuts), pa.py_buffer(written)]
    )
    kept = pieces.take(pa.array(np.arange(0, len(cuts) - 1, 2, dtype=np.int32)))
    # Where a value starts among the pieces that were kept: that far into the piece it starts in.
    old = offsets - offsets[0]
    piece = np.searchsorted(starts, old)
    if (ends[piece[1:] - 1][piece[1:] > 0] >= old[1:][piece[1:] > 0]).any():
        return None  # one value ends with "&am" and the next starts with "p;"
    begins = np.frombuffer(kept.buffers()[1], dtype=np.int32, count=len(kept) + 1)
    moved = begins[piece] + old - cuts[2 * piece]
    replaced = pa.StringArray.from_buffers(
        len(column), pa.py_buffer(moved), kept.buffers()[2], column.buffers()[0]
    )
    return replaced, len(starts)


def count_references(data: Bytes) -> int | None:
    """Return the number of references in some bytes, None where one is unknown."""
    found = _find(data)
    return None if found is None else len(found[0])


def _find(data: Bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]] | None:
    """Return the places of all references and their slots, None where one is unknown."""
    starts = np.flatnonzero(data == AMPERSAND)
    if not len(starts):
        return starts, np.empty(0, dtype=np.uint8)
    # Only the last few windows reach beyond the end; they are read from a padded copy.
    cut = max(0, len(data) - 2 * WINDOW)
    padded = np.concatenate([data[cut:], np.zeros(WINDOW, dtype=np.uint8)])
    split = int(np.searchsorted(starts, len(data) - WINDOW))
    windows = np.concatenate(
        [_windows(data, starts[:split]), _windows(padded, starts[split:] - cut)]
    )
    slots = (windows.astype(np.uint32) * FACTOR >> np.uint32(24)).astype(np.uint8)
    if not np.array_equal(windows & MASK[slots], TEXT[slots]):
        return None
    return starts, slots


def _windows(data: Bytes, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the eight bytes from each place on as one little-endian number."""
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    every = np.ndarray((len(data) - WINDOW + 1,), dtype="<u8", buffer=data, strides=(1,))
    found: npt.NDArray[np.uint64] = every[starts]
    return found
