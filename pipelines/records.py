"""The canonical record: one Arrow schema for every source.

A record carries exactly one body: `messages`, or `prompt` with `completion`, or `text`. Nothing
downstream may lose id, url, author or license. `id` is stable (source + native id); `group` is
what must not cross a split (file, question, tree).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("train", pa.bool_())])

RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("revision", pa.string()),
        pa.field("url", pa.string()),
        pa.field("author", pa.string()),
        pa.field("license", pa.string()),
        pa.field("created", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("messages", pa.list_(MESSAGE)),
        pa.field("prompt", pa.string()),
        pa.field("completion", pa.string()),
        pa.field("text", pa.string()),
        pa.field("meta", pa.string()),
    ]
)
PROVENANCE = ("id", "group", "source", "revision", "url", "author", "license", "created")

Row = dict[str, Any]


def new_record(**fields: Any) -> Row:
    """Return a row with every schema field, missing ones None; unknown names raise TypeError."""
    row: Row = dict.fromkeys(RECORD_SCHEMA.names)
    unknown = fields.keys() - row.keys()
    if unknown:
        raise TypeError(f"not record fields: {sorted(unknown)}")
    row.update(fields)
    return row


def body_text(row: Mapping[str, Any]) -> str:
    """Return all the text of a record, parts joined by newlines (for filters and deduplication)."""
    if row["text"] is not None:
        return str(row["text"])
    if row["completion"] is not None:
        return f"{row['prompt'] or ''}\n{row['completion']}"
    return "\n".join(message["content"] for message in row["messages"] or ())


def clean_text(value: str) -> str | None:
    """Return the text, or None where UTF-8 cannot hold it (lone surrogates) or it has NUL bytes."""
    if "\0" in value:
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return value


def write_rows(path: Path, rows: Iterable[Row], schema: pa.Schema = RECORD_SCHEMA) -> int:
    """Write rows as one Parquet file with page checksums; return their number.

    `pq.write_table` on a native path raises OSError on a full disk, where `Dataset.to_parquet`
    aborts the process.
    """
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, path, compression="zstd", compression_level=1, write_page_checksum=True)
    return int(table.num_rows)


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of one Parquet shard as dicts, a batch in memory at a time."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
