"""Posts on disk by partition: all posts of a question are in one, whatever their order was.

A file holds groups of record batches, one batch for each partition in order, so that the batches
of partition p are p, p + n, p + 2n, ... of n. Memory holds one group, however large the input is.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources.stack_exchange.posts import POST_SCHEMA, QUESTION

PARTITION_BYTES = 32 << 20  # of raw input that one join holds in memory
GROUP_BYTES = 16 << 20
MIX = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: neighbouring ids fall far apart


def count_partitions(raw_bytes: int) -> int:
    """Return into how many partitions raw input of this size is split."""
    return max(1, -(-raw_bytes // PARTITION_BYTES))


def partition_of(questions: npt.NDArray[np.int64], partitions: int) -> npt.NDArray[np.int64]:
    """Return the partition of each question id."""
    mixed = (questions.astype(np.uint64) * MIX) >> np.uint64(32)
    return (mixed % np.uint64(partitions)).astype(np.int64)


def question_ids(posts: pa.Table) -> npt.NDArray[np.int64]:
    """Return the id of the question that each post is or answers."""
    found: npt.NDArray[np.int64] = pc.if_else(
        pc.equal(posts["type"], QUESTION), posts["id"], posts["parent"]
    ).to_numpy()
    return found


class PartitionWriter:
    """Writes batches of posts to one file, sorted into partitions group by group."""

    def __init__(self, path: Path, partitions: int) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._file = pa.ipc.new_file(str(path), POST_SCHEMA, options=options)
        self._partitions = partitions
        self._held: list[pa.RecordBatch] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Take a batch of POST_SCHEMA."""
        self._held.append(batch)
        self._bytes += batch.get_total_buffer_size()
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        posts = pa.Table.from_batches(self._held, POST_SCHEMA).combine_chunks()
        self._held, self._bytes = [], 0
        places = partition_of(question_ids(posts), self._partitions)
        order = np.argsort(places, kind="stable")
        cuts = np.searchsorted(places[order], np.arange(self._partitions + 1))
        for low, high in pairwise(cuts.tolist()):
            batches = posts.take(pa.array(order[low:high])).combine_chunks().to_batches()
            self._file.write_batch(batches[0] if batches else _empty())


def _empty() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=POST_SCHEMA)


def read_partition(
    paths: Sequence[Path], partition: int, partitions: int
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Return the posts of one partition from all files, and their order.

    In order, posts are by question, the question first, then by id. They are not copied into it:
    a partition fills much of the memory there is.
    """
    batches: list[pa.RecordBatch] = []
    for path in paths:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            numbers: Iterable[int] = range(partition, reader.num_record_batches, partitions)
            batches += [reader.get_batch(number) for number in numbers]
    posts = pa.Table.from_batches(batches, POST_SCHEMA).combine_chunks()
    del batches
    order = np.lexsort([posts["id"].to_numpy(), posts["type"].to_numpy(), question_ids(posts)])
    return posts, order
