"""Shard function of the dataset source: one unit of rows becomes one file of records."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import SAMPLES_PER_REASON, Outcome, Params, Reject
from pipelines.errors import SourceError
from pipelines.manifest import Counts, canonical
from pipelines.records import RECORD_SCHEMA, Row, clean_text, new_record
from pipelines.sources.dataset.bodies import BadRow, Body, Rules, UselessRow, read_bodies
from pipelines.sources.dataset.layout import SPDX, split_named
from pipelines.sources.dataset.schemas import Schema, get_value
from pipelines.sources.dataset.units import Numbered, Unit, read_unit

UNKNOWN_LICENSE = "unknown"
ROWS_AT_ONCE = 1000


class _Shard:
    """One shard in the making: what it reads, and what is counted on the way."""

    def __init__(self, plan: Mapping[str, Any], params: Params) -> None:
        self.unit = Unit(**plan["unit"])
        self.file: str = plan["file"]
        self.split: str | None = plan["split"]
        self.license: str | None = plan["license"]
        self.schema = Schema(**plan["schema"])
        self.rules = Rules(**params["rules"])
        self.params = params
        self.columns: list[str] | None = plan["columns"]
        self.rows = self.records = self.used = 0
        self.dropped: Counter[str] = Counter()
        self.quarantined: Counter[str] = Counter()
        self.licenses: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.rejects: list[Reject] = []
        self.ids: set[str] = set()

    def full(self) -> bool:
        return self.params["limit"] is not None and self.records >= self.params["limit"]

    def pass_over(self) -> None:
        """Count the rows beyond the cap, which are not read."""
        left = (self.unit.rows or self.rows) - self.rows
        self.dropped["max_records"] += left
        self.rows += left

    def reject(self, number: int, error: BadRow) -> None:
        counted = self.dropped if isinstance(error, UselessRow) else self.quarantined
        counted[error.reason] += 1
        if counted[error.reason] <= SAMPLES_PER_REASON:
            name = f"{self.params['id']}:{self.file}:{number}"
            shown = str(error).encode(errors="backslashreplace").decode()
            detail = f"row {number}: {shown[:300]}"
            self.rejects.append({"id": name, "reason": error.reason, "detail": detail})


def extract(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the records of one unit; rows_in counts rows, rows_out records.

    inputs[0] describes the unit, its file, split, license and schema, and the
    columns that are read of a table. `params` holds id, where,
    license, allow_unlicensed, openai_outputs, origin, max_bytes, rules, splits and limit (records
    at most, or None). Raises SourceError for a damaged file and for rows without a license.
    """
    shard = _Shard(json.loads(inputs[0].read_text(encoding="utf-8")), params)
    with pq.ParquetWriter(
        output, RECORD_SCHEMA, compression="zstd", compression_level=1, write_page_checksum=True
    ) as writer:
        batch: list[Row] = []
        for row in _records(shard):
            batch.append(row)
            if len(batch) >= ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, schema=RECORD_SCHEMA))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema=RECORD_SCHEMA))
    counts = Counts(
        rows_in=shard.rows,
        rows_out=shard.records,
        used=shard.used,
        dropped=dict(sorted(shard.dropped.items())),
        quarantined=dict(sorted(shard.quarantined.items())),
    )
    extra = {
        "licenses": dict(sorted(shard.licenses.items())),
        "splits": dict(sorted(shard.splits.items())),
    }
    return Outcome(counts, rejects=tuple(shard.rejects), extra=extra)


def _records(shard: _Shard) -> Iterator[Row]:
    for numbered in read_unit(shard.unit, shard.columns):
        if shard.full():
            shard.pass_over()
            return
        shard.rows += 1
        try:
            made = _read_row(numbered, shard)
        except BadRow as error:
            shard.reject(numbered.number, error)
            continue
        shard.used += 1
        limit = shard.params["limit"]
        for row in made if limit is None else made[: limit - shard.records]:
            shard.records += 1
            shard.licenses[row["license"]] += 1
            yield row


def _read_row(numbered: Numbered, shard: _Shard) -> list[Row]:
    """Return the records of a row; raises BadRow."""
    number, row = numbered.number, numbered.row
    if row is None:
        raise BadRow(numbered.reason, numbered.detail)
    params, columns = shard.params, shard.schema.columns
    split = _split(row, shard)
    if params["splits"] and split not in params["splits"]:
        raise UselessRow("other_split", f"split {split or 'unnamed'} is not among `splits`")
    bodies = list(read_bodies(row, shard.schema, shard.rules))
    _check_size(bodies, params["max_bytes"])
    native = _native(row, columns.get("id")) or str(number)
    if "id" in columns and native in shard.ids:
        native = f"{native}~{number}"
    shard.ids.add(native) if "id" in columns else None
    name = f"{params['id']}:{shard.file}:{native}"
    group = _native(row, columns.get("group"))
    origin = params["origin"]
    common = {
        "group": f"{params['id']}:{group}" if group else name,
        "source": params["id"],
        "revision": origin["revision"],
        "url": _short(row, columns.get("url")) or f"{origin['blob']}{shard.file}",
        "author": _short(row, columns.get("author")) or origin["author"],
        "license": _license(row, number, shard),
        "created": _created(row, columns.get("created")),
        "score": _number(row, columns.get("score")),
    }
    meta = {"file": shard.file, "row": number, **_notes(row, columns)}
    if split:
        meta["split"] = split
        shard.splits[split] += 1
    if params["openai_outputs"]:
        meta["openai_outputs"] = True
    return [
        new_record(
            **{**common, **body.fields},
            id=f"{name}{body.part}",
            meta=canonical({**meta, **body.meta}),
        )
        for body in bodies
    ]


def _check_size(bodies: Sequence[Body], most: int) -> None:
    for body in bodies:
        text = body.fields.get("text")
        if text is not None and len(text.encode()) > most:
            detail = f"{len(text.encode())} bytes, curation.max_file_bytes is {most}"
            raise UselessRow("too_large", detail)


def _split(row: Mapping[str, Any], shard: _Shard) -> str | None:
    column = shard.schema.columns.get("split")
    value = get_value(row, column) if column else None
    found = split_named(value.strip()) if isinstance(value, str) else None
    return found or shard.split


def _native(row: Mapping[str, Any], column: str | None) -> str | None:
    value = get_value(row, column) if column else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _short(row, column) if isinstance(value, str) else None


def _short(row: Mapping[str, Any], column: str | None) -> str | None:
    """Return a column's text, None where it is empty, none, or cannot be stored."""
    value = get_value(row, column) if column else None
    return (clean_text(value.strip()) or None) if isinstance(value, str) else None


def _license(row: Mapping[str, Any], number: int, shard: _Shard) -> str:
    params, column = shard.params, shard.schema.columns.get("license")
    value = get_value(row, column) if column else None
    named = value if isinstance(value, list) else [value]
    texts = [text.strip() for text in named if isinstance(text, str) and clean_text(text)]
    found = " AND ".join(SPDX.get(text.lower(), text) for text in texts if text)
    license_ = found or params["license"] or shard.license
    if not license_ and not params["allow_unlicensed"]:
        raise SourceError(
            f"source {params['id']!r}: no license found for row {number} of {shard.file}; say "
            f"which one it has with {params['where']}.license, e.g. license: CC-BY-SA-4.0, or set "
            f"{params['where']}.allow_unlicensed: true"
        )
    return license_ or UNKNOWN_LICENSE


def _created(row: Mapping[str, Any], column: str | None) -> str | None:
    """Return when a row was written as ISO 8601; numbers are seconds since 1970 (UTC)."""
    value = get_value(row, column) if column else None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, int | float) and not isinstance(value, bool) and 1e8 < value < 1e10:
        return datetime.fromtimestamp(value, UTC).isoformat()
    return _short(row, column)


def _number(row: Mapping[str, Any], column: str | None) -> float | None:
    value = get_value(row, column) if column else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _notes(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Return what is kept beside the body of a row of code."""
    found = {part: _short(row, columns.get(part)) for part in ("path", "repository", "language")}
    return {part: text for part, text in found.items() if text}
