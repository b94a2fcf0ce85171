"""Reads the bodies of records as Arrow strings, without a Python object for each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BODY_COLUMNS = ["messages", "prompt", "completion", "text"]
KINDS = ("messages", "prompt", "text")
BATCH_ROWS = 256
BATCH_BYTES = 800_000


class Bodies(NamedTuple):
    """Some rows of a shard in order: the first one's number, texts, kinds and other columns."""

    first: int
    texts: pa.Array
    kinds: npt.NDArray[np.uint8]
    columns: pa.RecordBatch


def read_bodies(path: Path, columns: list[str]) -> Iterator[Bodies]:
    """Yield a shard's bodies, as `records.body_text` builds them, with other columns.

    A piece has BATCH_BYTES of text, or one larger text.
    """
    first = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        wanted = [*columns, *BODY_COLUMNS]
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
            texts, kinds = body_texts(batch)
            other = batch.select(columns)
            for start, stop in _pieces(texts):
                part = slice(start, stop)
                yield Bodies(first + start, texts[part], kinds[part], other[part])
            first += batch.num_rows


def body_texts(batch: pa.RecordBatch) -> tuple[pa.Array, npt.NDArray[np.uint8]]:
    """Return the text of each record, and which of KINDS it is."""
    text, completion = batch["text"], batch["completion"]
    if not text.null_count:
        return text, np.full(len(text), KINDS.index("text"), np.uint8)
    prompt = pc.fill_null(batch["prompt"], "")
    pairs = pc.binary_join_element_wise(prompt, completion, "\n")
    texts = pc.coalesce(text, pairs, _joined_messages(batch["messages"]))
    kinds = np.where(pc.is_valid(completion), KINDS.index("prompt"), KINDS.index("messages"))
    kinds = np.where(pc.is_valid(text), KINDS.index("text"), kinds)
    return texts, kinds.astype(np.uint8)


def _joined_messages(messages: pa.ListArray) -> pa.Array:
    """Return each dialogue's contents, less what it shares with another branch of its tree.

    Branches repeat the turns before them, untrained in all but one of them. Compared with these
    they would be near-duplicates, and answers that are trained nowhere else would go.
    """
    turns = messages.values
    shared = pc.and_(pc.equal(turns.field("role"), "assistant"), pc.invert(turns.field("train")))
    if pc.any(shared).as_py():
        texts = ["\n".join(_new_contents(row)) for row in messages.to_pylist()]
        return pa.array(texts, pa.string())
    contents = pc.fill_null(turns.field("content"), "")
    return pc.binary_join(pa.ListArray.from_arrays(messages.offsets, contents), "\n")


def _new_contents(row: Sequence[Mapping[str, Any]] | None) -> list[str]:
    turns = list(row or ())
    shared = [n for n, t in enumerate(turns) if t["role"] == "assistant" and t["train"] is False]
    start = shared[-1] + 1 if shared else 0
    # Nothing of its own: then it is what it repeats.
    return [turn["content"] or "" for turn in turns[start:] or turns]


def _pieces(texts: pa.Array) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows with about BATCH_BYTES of text."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False), dtype=np.int64)
    start = 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BATCH_BYTES, "right")))
        yield start, stop
        start = stop
