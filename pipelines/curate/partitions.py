"""Cuts the candidate pairs into partitions that share no document, each small enough for memory.

Documents that pairs connect get one label by union-find over arrays; a partition is the labels
of one hash class. What verification needs of a document (its shingles, a digest, its id) is then
written once, shard by shard, ordered by partition.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.curate.bodies import read_bodies
from pipelines.curate.candidates import REPEAT, REPEATED, SIMILAR, Pairs
from pipelines.curate.signatures import Index, digest_text, mapped
from pipelines.curate.words import Integers, hash_ngrams, hash_words, mix, pack
from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts

PAIRS_AT_ONCE = 1_000_000
# Verification holds a document's shingles and what Python adds to it.
BYTES_PER_SHINGLE = 8
BYTES_PER_DOCUMENT = 1000
# From this size on there are enough partitions to keep several workers busy.
WORTH_CUTTING = 32_000_000
MOST_AT_ONCE = 16
SPILL_SCHEMA = pa.schema(
    [
        ("document", pa.int64()),
        ("score", pa.float64()),
        ("id", pa.string()),
        ("group", pa.string()),
        ("digest", pa.binary()),
        ("shingles", pa.large_list(pa.uint64())),
    ]
)


def read_pairs(path: Path) -> Iterator[Pairs]:
    """Yield a file of pairs in pieces."""
    pairs = mapped(path, np.int64).reshape(-1, 2)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        yield np.array(pairs[start : start + PAIRS_AT_ONCE])


def find(labels: Integers, members: Integers) -> Integers:
    """Return the root of each member, and make the members point to it."""
    roots = labels[members]
    while True:
        above = labels[roots]
        # All members jump at once, so the way of any of them halves each time.
        labels[members] = above
        if (above == roots).all():
            return roots
        roots = above


def unite(labels: Integers, pairs: Pairs) -> None:
    """Join the sets of both members of each pair; a set's root is its smallest member."""
    left, right = pairs[:, 0], pairs[:, 1]
    while len(left):
        a, b = find(labels, left), find(labels, right)
        differ = a != b
        low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
        np.minimum.at(labels, high, low)
        left, right = left[differ], right[differ]


def label_documents(repeats: Sequence[Path], similar: Sequence[Path], flags_file: Path) -> Path:
    """Write a label for each document, equal where pairs connect them; flag the similar ones."""
    flags = mapped(flags_file, np.uint8, "r+")
    path = flags_file.with_name("labels.bin")
    np.arange(len(flags), dtype=np.int64).tofile(path)
    labels = mapped(path, np.int64, "r+")
    for file in (*repeats, *similar):
        for pairs in read_pairs(file):
            unite(labels, pairs)
            if file in similar:
                flags[pairs.reshape(-1)] |= SIMILAR
    for start in range(0, len(labels), PAIRS_AT_ONCE):
        find(labels, np.arange(start, min(start + PAIRS_AT_ONCE, len(labels))))
    return path


def count_partitions(index: Index, flags_file: Path, budget: int) -> int:
    """Return how many partitions keep each below the budget in bytes."""
    flags = mapped(flags_file, np.uint8)
    size = 0
    for first, shingles in index.columns("shingles"):
        mine = flags[first : first + len(shingles)]
        size += BYTES_PER_DOCUMENT * int(np.count_nonzero(mine & (SIMILAR | REPEATED)))
        size += BYTES_PER_SHINGLE * int(shingles[(mine & (SIMILAR | REPEAT)) == SIMILAR].sum())
    return max(-(-size // budget), MOST_AT_ONCE if size > WORTH_CUTTING else 1)


def partition_of(labels: Integers, partitions: int) -> Integers:
    """Return the partition of each label."""
    return (mix(labels.astype(np.uint64)) % np.uint64(partitions)).astype(np.int64)


def scatter_pairs(
    files: Sequence[Path], labels_file: Path, partitions: int, stem: Path
) -> list[Path]:
    """Write the pairs of each partition into a file `<stem>-<partition>.bin`."""
    labels = mapped(labels_file, np.int64)
    paths = [stem.with_name(f"{stem.name}-{number:05d}.bin") for number in range(partitions)]
    for path in paths:
        path.write_bytes(b"")
    for file in files:
        for pairs in read_pairs(file):
            chosen = partition_of(labels[pairs[:, 0]], partitions)
            order = np.argsort(chosen, kind="stable")
            bounds = np.searchsorted(chosen[order], np.arange(partitions + 1))
            for number in np.flatnonzero(np.diff(bounds)).tolist():
                with paths[number].open("ab") as part:
                    pairs[order[bounds[number] : bounds[number + 1]]].tofile(part)
    return paths


def spill_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write what verification needs of a shard's documents that are in pairs.

    Inputs: the shard, flags, labels; `params`: ngram, seed, `partitions`, and `firsts`, the number
    of the first document by shard. The Arrow file has one batch for each partition, in order.
    """
    first = params["firsts"][inputs[0].name]
    flags, labels = mapped(inputs[1], np.uint8), mapped(inputs[2], np.int64)
    partitions = params["partitions"]
    parts: list[pa.RecordBatch] = []
    last = first + pq.read_metadata(inputs[0]).num_rows
    # Most shards of a refresh have nothing to compare, and need not be read.
    is_needed = (flags[first:last] & (SIMILAR | REPEATED)).any()
    for bodies in read_bodies(inputs[0], ["id", "group", "score"]) if is_needed else ():
        start = first + bodies.first
        mine = np.array(flags[start : start + len(bodies.texts)])
        places = np.flatnonzero(mine & (SIMILAR | REPEATED))
        if len(places):
            rows = bodies.columns.take(pa.array(places))
            texts = bodies.texts.take(pa.array(places))
            parts.append(_spill(rows, texts, mine[places], places + start, params))
    table = pa.Table.from_batches(parts, SPILL_SCHEMA)
    documents = table["document"].to_numpy()
    chosen = partition_of(labels[documents], partitions)
    order = np.argsort(chosen, kind="stable")
    bounds = np.searchsorted(chosen[order], np.arange(partitions + 1))
    ordered = table.take(pa.array(order)).combine_chunks()
    with pa.OSFile(str(output), "wb") as file, pa.ipc.new_file(file, SPILL_SCHEMA) as writer:
        for low, high in pairwise(bounds):
            columns = [_only_chunk(column) for column in ordered.slice(low, high - low).columns]
            writer.write_batch(pa.record_batch(columns, schema=SPILL_SCHEMA))
    return Outcome(Counts())


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _spill(
    rows: pa.RecordBatch, texts: pa.Array, flags: np.ndarray, documents: Integers, params: Params
) -> pa.RecordBatch:
    digests = [
        digest_text(text.as_py()) if flag & REPEATED else None
        for text, flag in zip(texts, flags, strict=True)
    ]
    # Documents with the same words share the shingles of the best one.
    wanted = (flags & SIMILAR).astype(np.bool_) & ~(flags & REPEAT).astype(np.bool_)
    sets = shingle_sets(texts.filter(pa.array(wanted)), params)
    bounds = np.zeros(len(documents) + 1, np.int64)
    sizes = np.zeros(len(documents), np.int64)
    sizes[wanted] = [len(values) for values in sets]
    np.cumsum(sizes, out=bounds[1:])
    values = np.concatenate([np.empty(0, np.uint64), *sets])
    return pa.record_batch(
        [
            pa.array(documents),
            rows["score"],
            rows["id"],
            rows["group"],
            pa.array(digests, pa.binary()),
            pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(values)),
        ],
        schema=SPILL_SCHEMA,
    )


def shingle_sets(texts: pa.Array, params: Params) -> list[np.ndarray]:
    """Return the sorted set of shingle hashes of each text."""
    grams = hash_ngrams(hash_words(pack(texts)), params["ngram"], params["seed"])
    sets = []
    for start, stop in pairwise(grams.bounds):
        values = np.sort(grams.hashes[start:stop])
        is_new = np.ones(len(values), np.bool_)
        np.not_equal(values[1:], values[:-1], out=is_new[1:])
        sets.append(values[is_new])
    return sets
