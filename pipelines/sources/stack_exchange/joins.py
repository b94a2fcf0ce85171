"""Joins the questions and answers of one partition and writes their records."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts
from pipelines.records import RECORD_SCHEMA, Row
from pipelines.sources.stack_exchange.memory import frugal_memory
from pipelines.sources.stack_exchange.names import Names
from pipelines.sources.stack_exchange.partitions import question_ids, read_partition
from pipelines.sources.stack_exchange.posts import QUESTION
from pipelines.sources.stack_exchange.threads import Tally, read_thread

ROWS_AT_A_TIME = 1000
PIECE = re.compile(r"-(\d+)\.(?:arrow|parquet)\b")


@dataclass(frozen=True, slots=True)
class Thread:
    """The posts of one question id; the question is None where it is not among them."""

    question: Row | None
    answers: list[Row]
    repeated: int


def piece_number(output: Path) -> int:
    """Return the number in the name of a numbered file, which says what part of the whole it is."""
    return int(PIECE.findall(output.name)[-1])


@frugal_memory()
def join_partition(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the records of one partition of posts; rows count posts, ordered by question id.

    `inputs` are the files of partitioned posts, and last the names where `params["names"]`;
    `params` holds what `read_thread` needs, first (number of the first shard) and partitions.
    """
    paths = inputs[:-1] if params["names"] else inputs
    number = piece_number(output) - params["first"]
    posts, order = read_partition(paths, number, params["partitions"])
    tally = Tally()
    with (
        Names(inputs[-1] if params["names"] else None) as names,
        pq.ParquetWriter(
            output, RECORD_SCHEMA, compression="zstd", compression_level=1, write_page_checksum=True
        ) as writer,
    ):
        for records in _read_blocks(_split_threads(posts, order), names, params, tally):
            writer.write_table(pa.Table.from_pylist(records, schema=RECORD_SCHEMA))
    counts = Counts(
        rows_in=posts.num_rows,
        rows_out=tally.records,
        used=tally.used,
        dropped=dict(sorted(tally.dropped.items())),
        quarantined=dict(sorted(tally.quarantined.items())),
    )
    extra = {"licenses": dict(sorted(tally.licenses.items())), "unnamed": tally.unnamed}
    return Outcome(counts, rejects=tally.rejects(), extra=extra)


def _read_blocks(
    blocks: Iterable[list[Thread]], names: Names, params: Params, tally: Tally
) -> Iterator[list[Row]]:
    """Yield the records of a block of threads at a time; none for a block without any."""
    for threads in blocks:
        names.fill(threads)
        marked = names.find_duplicates(threads)
        records: list[Row] = []
        for thread in threads:
            tally.drop("repeated_id", thread.repeated)
            left = None if params["limit"] is None else params["limit"] - tally.records
            if thread.question is None:
                tally.drop("no_question", len(thread.answers))
            elif left == 0:
                tally.drop("max_records", 1 + len(thread.answers))
            else:
                given = {**params, "limit": left}
                records += read_thread(thread.question, thread.answers, marked, given, tally)
        if records:
            yield records


def _split_threads(posts: pa.Table, order: npt.NDArray[np.int64]) -> Iterator[list[Thread]]:
    """Yield blocks of whole threads, of about ROWS_AT_A_TIME posts each."""
    keys = question_ids(posts)[order]
    low = 0
    while low < posts.num_rows:
        high = min(low + ROWS_AT_A_TIME, posts.num_rows)
        while high < posts.num_rows and keys[high] == keys[high - 1]:
            high += 1
        rows = posts.take(pa.array(order[low:high])).to_pylist()
        marked = zip(keys[low:high].tolist(), rows, strict=True)
        yield [
            _make_thread([row for _, row in pairs])
            for _, pairs in groupby(marked, key=lambda pair: pair[0])
        ]
        low = high


def _make_thread(rows: list[Row]) -> Thread:
    """Put the posts of one question together; of rows with one id the first one counts."""
    unique = {row["id"]: row for row in reversed(rows)}
    posts = sorted(unique.values(), key=lambda row: (row["type"], row["id"]))
    question = posts.pop(0) if posts[0]["type"] == QUESTION else None
    return Thread(question, posts, len(rows) - len(unique))
