"""Reads the rows of one raw file, one at a time, each with where it stands.

A row that cannot be decoded is handed on as Unread; a file that cannot is a SourceError.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from pipelines.errors import SourceError
from pipelines.sources.oasst.nested_json import decode, skip_space

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MAX_LINE_BYTES = 64 * 2**20
ROWS_PER_BATCH = 1000
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Unread:
    """A row that is no JSON value; `reason` is what it is counted under."""

    reason: str
    detail: str


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (position, decoded row or Unread) of a file; the suffix says how it is read.

    Raises SourceError for a file that is damaged as a whole.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _read_parquet(path)
        elif path.name.endswith((".json", ".json.gz")):
            yield from _read_document(path)
        else:
            yield from _read_lines(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(
            f"{path}: damaged or cut short ({error}); expected a whole gzip file, get it again"
        ) from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                detail = f"over {MAX_LINE_BYTES} bytes"
                yield f"line {number}", Unread("long_line", detail)
                continue
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                yield f"line {number}", _decode_line(line)


def _decode_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unread("invalid_utf8", f"byte {error.start}: {error.reason}")
    try:
        value, end = decode(text)
    except ValueError as error:
        return Unread("invalid_json", str(error))
    if text[end:].strip():
        return Unread("invalid_json", f"more after the value, at character {end}")
    return value


def _read_document(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of one array, or the values one after the other."""
    with _open(path) as file:
        data = file.read()
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    start = skip_space(text, 0)
    array = text.startswith("[", start)
    index, number = start + array, 0
    while (index := skip_space(text, index)) < len(text) or array:
        if array and text.startswith("]", index):
            # What follows the array, if anything, is read as values of their own.
            array, index = False, index + 1
            continue
        number += 1
        try:
            value, index = decode(text, index)
            index = _after_element(text, index) if array else index
        except ValueError as error:
            raise SourceError(
                f"{path}: not valid JSON ({error}); expected an array of messages or trees"
            ) from error
        yield f"element {number}", value


def _after_element(text: str, index: int) -> int:
    index = skip_space(text, index)
    if text.startswith("]", index):
        return index
    if not text.startswith(",", index):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, index)
    return index + 1


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{path}: no readable Parquet file after row {number} ({cause}); get it again"
        ) from error
