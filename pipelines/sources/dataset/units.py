"""Units of reading: a range of bytes, row groups or batches of one file; rows keep their numbers.

What a unit is depends on the file alone, so any number of workers reads the same.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import Outcome, Params
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.sources.dataset.json_values import drop_trailing_commas
from pipelines.sources.dataset.layout import LINES, PARQUET
from pipelines.sources.dataset.spool import MAX_ROW_BYTES, PROBLEM, SPOOL_REASONS

RANGE_BYTES = 32 << 20
UNIT_ROWS = 20_000
BATCH_ROWS = 1000
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a file: bytes [start, end) of lines, else row groups or batches [start, end).

    `first` is the number of its first row, counted from 1; `rows` is None where not counted yet.
    """

    path: str
    kind: str
    start: int
    end: int
    first: int = 1
    rows: int | None = None


class Numbered(NamedTuple):
    """A row with its number (of the line in JSON lines), or the reason why there is none."""

    number: int
    row: dict[str, Any] | None
    reason: str = ""
    detail: str = ""


def plan_units(path: Path, kind: str) -> list[Unit]:
    """Cut a file into units; SourceError where it is no such file."""
    try:
        if kind == LINES:
            size = path.stat().st_size
            starts = range(0, max(size, 1), RANGE_BYTES)
            return [Unit(str(path), kind, at, min(at + RANGE_BYTES, size)) for at in starts]
        return _group(path, kind, _block_rows(path, kind))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f"{path}: damaged or no {kind} file ({_first_line(error)}); download it again"
        ) from error


def _block_rows(path: Path, kind: str) -> list[int]:
    """Return the rows of each row group of a Parquet file, each batch of an Arrow file."""
    if kind == PARQUET:
        with pq.ParquetFile(path) as file:
            about = file.metadata
            return [about.row_group(n).num_rows for n in range(about.num_row_groups)]
    return [batch.num_rows for batch in _arrow_batches(path)]


def _group(path: Path, kind: str, blocks: Sequence[int]) -> list[Unit]:
    units: list[Unit] = []
    start, rows, first = 0, 0, 1
    for number, block in enumerate(blocks):
        rows += block
        if rows >= UNIT_ROWS or number == len(blocks) - 1:
            units.append(Unit(str(path), kind, start, number + 1, first, rows))
            start, first, rows = number + 1, first + rows, 0
    return units


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an IPC stream or file, mapped rather than read."""
    mapped = pa.memory_map(str(path))
    if mapped.size() >= 6 and mapped.read_at(6, 0) == b"ARROW1":
        file = pa.ipc.open_file(mapped)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from pa.ipc.open_stream(mapped)


def column_names(unit: Unit) -> list[str] | None:
    """Return the columns of a Parquet or Arrow file, None for lines."""
    if unit.kind == LINES:
        return None
    if unit.kind == PARQUET:
        with pq.ParquetFile(unit.path) as file:
            return list(file.schema_arrow.names)
    return next((list(batch.schema.names) for batch in _arrow_batches(Path(unit.path))), [])


def count_lines(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Count the lines and rows of a unit, described by the file inputs[0], into `extra`."""
    unit = Unit(**json.loads(inputs[0].read_text(encoding="utf-8"))["unit"])
    lines = rows = 0
    for line in _lines(unit):
        lines += 1
        rows += not line.isspace()
    output.write_text(f"{lines} {rows}\n")
    return Outcome(Counts(), extra={"lines": lines, "rows": rows})


def read_unit(unit: Unit, columns: Sequence[str] | None = None) -> Iterator[Numbered]:
    """Yield the rows of a unit; blank lines are none. Raises SourceError for a damaged file."""
    if unit.kind == LINES:
        for number, line in enumerate(_lines(unit), unit.first):
            if not line.isspace():
                yield _parse_line(number, line)
        return
    number = unit.first
    try:
        for batch in _batches(unit, columns):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield from _plain_rows(number, part)
                number += part.num_rows
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f"{unit.path}: damaged near row {number} ({_first_line(error)}); download it again"
        ) from error


def _batches(unit: Unit, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    if unit.kind == PARQUET:
        with pq.ParquetFile(unit.path) as file:
            groups = list(range(unit.start, unit.end))
            yield from file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns)
        return
    for number, batch in enumerate(_arrow_batches(Path(unit.path))):
        if number >= unit.end:
            return
        if number >= unit.start:
            yield batch.select(columns) if columns is not None else batch


def _plain_rows(number: int, batch: pa.RecordBatch) -> Iterator[Numbered]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check what it calls text, so the bad rows are found one by one.
        for at in range(batch.num_rows):
            try:
                [row] = batch.slice(at, 1).to_pylist()
                yield Numbered(number + at, row)
            except UnicodeDecodeError as error:
                yield Numbered(number + at, None, "invalid_utf8", str(error))
        return
    for at, row in enumerate(rows):
        yield Numbered(number + at, row)


def _lines(unit: Unit) -> Iterator[bytes]:
    """Yield the lines that start inside a range of bytes; of an endless one its beginning."""
    with Path(unit.path).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            _skip_line(file)
        at = file.tell()
        while at < unit.end:
            line = file.readline(MAX_ROW_BYTES + 1)
            at += len(line)
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                at = file.tell()
            yield line


def _skip_line(file: io.BufferedReader) -> None:
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def _parse_line(number: int, line: bytes) -> Numbered:
    if line.startswith(PROBLEM):
        found = _attempt(json.loads, line[len(PROBLEM) :])
        if isinstance(found, list) and found[:1] in ([reason] for reason in SPOOL_REASONS):
            return Numbered(number, None, *map(str, found))
    if len(line) > MAX_ROW_BYTES:
        return Numbered(number, None, "row_too_long", f"more than {MAX_ROW_BYTES >> 20} MiB")
    try:
        text = line.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return Numbered(number, None, "invalid_utf8", f"byte {error.start}: {error.reason}")
    try:
        row = json.loads(text)
    except RecursionError:
        return Numbered(number, None, "nested_too_deep", "brackets beyond what is read")
    except ValueError as error:
        row = _attempt(json.loads, drop_trailing_commas(text))
        if row is None:
            return Numbered(number, None, "invalid_json", str(error))
    if not isinstance(row, dict):
        return Numbered(number, None, "not_an_object", f"a JSON {type(row).__name__}")
    return Numbered(number, row)


def _attempt(load: Callable[[Any], Any], text: str | bytes) -> Any:
    try:
        return load(text)
    except (ValueError, RecursionError):
        return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
