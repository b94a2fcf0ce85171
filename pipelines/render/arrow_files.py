"""The files between rendering's stages: Arrow streams, written batch by batch, read in place.

Lists of tokens or pieces cost ten times as much in Parquet. The store checks each file against its
sha256 before a stage that is found there is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa


@contextmanager
def open_writer(
    path: Path, schema: pa.Schema, *, compression: str | None = None
) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    """Open a stream to write batches of a schema to, by buffer compressed or as they are."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, schema, options=options) as writer,
    ):
        yield writer


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield a stream's batches, views of the mapped file where nothing is compressed."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader
