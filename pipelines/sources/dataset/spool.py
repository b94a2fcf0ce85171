"""Turns files that cannot be read from the middle into plain JSON lines: documents, tables, gzip.

A line is a row, or `!` and the JSON of [reason, detail] where there is none.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from pipelines.engine import Outcome, Params
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.sources.dataset.json_values import Item, read_document
from pipelines.sources.dataset.layout import JSON, LINES, compression_of

PROBLEM = b"!"
SPOOL_REASONS = ("bad_table_row", "invalid_json", "nested_too_deep")
MAX_ROW_BYTES = 16 << 20
CHUNK = 1 << 20
DELIMITERS = ",\t;|"


def needs_spool(path: Path, kind: str) -> bool:
    """Say whether a text file has to be turned into JSON lines first."""
    if kind == LINES:
        return bool(compression_of(path.name)) or not holds_lines(path)
    return not (kind == JSON and not compression_of(path.name) and holds_lines(path))


def holds_lines(path: Path) -> bool:
    """Say whether a file that is not compressed holds one JSON object a line.

    A `.jsonl` does unless it starts like an array; a `.json` where one of its first lines is an
    object and no other text than such lines can follow.
    """
    try:
        with path.open("rb") as file:
            lines = [file.readline(MAX_ROW_BYTES) for _ in range(3)]
            more = bool(file.read(1)) or sum(bool(line.strip()) for line in lines) > 1
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    first = next((line for line in lines if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    if first.lstrip().startswith(b"["):
        return False
    if compression_of(path.name) == "" and path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    return more and any(_is_object(line) for line in lines)


def _is_object(line: bytes) -> bool:
    try:
        return bool(parse_object(line.decode("utf-8")))
    except UnicodeDecodeError:
        return False


def spool(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the rows of one file as lines; `params` holds kinds: {file: kind}.

    Raises SourceError for a file that is cut off or no such file at all.
    """
    [path] = inputs
    kind = params["kinds"][str(path)]
    rows = 0
    with refuse_damage(path), open_plain(path) as stream, output.open("wb") as file:
        head = stream.peek(2)[:2]  # type: ignore[attr-defined]
        if head in (b"\xff\xfe", b"\xfe\xff"):
            raise SourceError(f"{path}: is UTF-16; convert it to UTF-8")
        if kind == LINES and head[:1] != b"[":
            while chunk := stream.read(CHUNK):
                file.write(chunk)
        else:
            items = read_table(stream, path) if kind not in (JSON, LINES) else None
            for item in items or read_document(stream, str(path)):
                rows += 1
                file.write(_line(item) + b"\n")
    return Outcome(Counts(rows_in=rows, rows_out=rows, used=rows))


@contextmanager
def refuse_damage(path: Path) -> Iterator[None]:
    """Turn what a damaged compressed file raises while it is read into a SourceError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise SourceError(
            f"{path}: damaged or cut off ({error or 'unexpected end'}); download it again"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise SourceError(f"{path}: damaged ({error}); download it again") from error


def open_plain(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed by its suffix; the stream can `peek`."""
    compression = compression_of(path.name)
    if compression == ".zst":
        try:
            from backports import zstd
        except ImportError as error:
            raise SourceError(
                f"{path}: .zst needs the package backports.zstd; install it or decompress the file"
            ) from error
        return io.BufferedReader(cast(Any, zstd.ZstdFile(path)))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        stream = openers[compression](path) if compression else path.open("rb")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    return io.BufferedReader(stream) if compression else cast(IO[bytes], stream)


def read_head(path: Path, kind: str, most: int) -> list[dict[str, Any]]:
    """Return the first rows of a text file that are objects, without turning all of it to lines.

    Raises SourceError for a compressed file that is damaged or cut off.
    """
    with refuse_damage(path), open_plain(path) as stream:
        if kind == LINES or (kind == JSON and holds_lines(path)):
            texts: Iterator[str] = (
                line.decode("utf-8", "replace")
                for line in iter(partial(stream.readline, MAX_ROW_BYTES), b"")
            )
        else:
            items = read_document(stream, str(path)) if kind == JSON else read_table(stream, path)
            texts = (item.text for item in items)
        rows = (parse_object(text) for text in islice(texts, most))
        return [row for row in rows if row]


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the object that JSON text holds, None where it holds none."""
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _line(item: Item) -> bytes:
    if item.reason:
        return PROBLEM + json.dumps([item.reason, item.detail]).encode()
    # Line ends of valid JSON lie between its tokens only.
    text = item.text.replace("\n", " ").replace("\r", " ")
    if item.split and text.startswith("{") and '"split"' not in text:
        rest = text[1:].lstrip()
        text = f'{{"split": "{item.split}"{"" if rest.startswith("}") else ","} {rest}'
    return text.encode("utf-8", "surrogateescape")


def read_table(stream: IO[bytes], path: Path) -> Iterator[Item]:
    """Yield the rows of a CSV or TSV file with a header; SourceError where that is no header."""
    # The limit belongs to the process, and no row that is read may exceed ours anyway.
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    first = text.readline(MAX_ROW_BYTES)
    tabs = ".tsv" in path.name.lower()
    delimiter = "\t" if tabs else max(DELIMITERS, key=first.count)
    [header] = csv.reader([first], delimiter=delimiter) if first.strip() else [[]]
    if len(header) != len(set(header)) or not all(name.strip() for name in header):
        raise SourceError(
            f"{path}: line 1 is no header of different column names: {', '.join(header)[:200]!r}"
        )
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 2
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise SourceError(
                    f"{path}: a quote opened in the row at line {line} is never closed"
                ) from error
            yield Item("", "bad_table_row", f"line {line}: {error}")
            continue
        if len(fields) == len(header):
            yield Item(json.dumps(dict(zip(header, fields, strict=True)), ensure_ascii=False))
        elif fields:
            detail = f"line {line}: {len(fields)} fields, the header has {len(header)}"
            yield Item("", "bad_table_row", detail)
