"""Signatures of records: what is compared instead of the texts, one file for each shard.

A signature file is an Arrow file of one batch: the bands of the record's sketch, two sums that
together are equal for texts with the same words in the same order, and what ranks the record. It
depends on the shard's bytes, the settings and the code alone, so it is kept under their digest:
when data grows, only new shards are signed.
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.curate.bodies import Bodies, read_bodies
from pipelines.curate.minhash import NUM_BINS, band_hashes, rows_per_band, sketch
from pipelines.curate.words import (
    MULTIPLIER,
    Hashes,
    hash_ngrams,
    hash_strings,
    hash_words,
    mix,
    pack,
)
from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts, sha256_file

LARGEST_BLOCK = 24_000_000
KEPT_SECONDS = 30 * 24 * 3600
LAST_COLUMNS = [
    ("sum", pa.uint64()),
    ("words_sum", pa.uint64()),
    ("id_hash", pa.uint64()),
    ("score", pa.float64()),
    ("shingles", pa.uint32()),
]


def signature_schema(rows: int) -> pa.Schema:
    """Return the columns of a signature file whose bands have `rows` sketch rows each."""
    bands = [(f"band_{number}", pa.uint64()) for number in range(NUM_BINS // rows)]
    return pa.schema([*bands, *LAST_COLUMNS])


def sign_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the signatures of a shard, or take the kept ones of a shard with the same bytes.

    `params`: ngram, seed, threshold, and `kept`, the file to keep them in by name of the shard.
    """
    place = params["kept"].get(inputs[0].name)
    kept = Path(place) if place else None
    if kept is not None and _is_whole(kept):
        shutil.copyfile(kept, output)
        os.utime(kept)
        return Outcome(Counts(), extra={"reused": True})
    rows = rows_per_band(params["threshold"])
    calm_allocator()
    every = read_bodies(inputs[0], ["id", "score"])
    parts = [sign_bodies(bodies, params, rows) for bodies in every]
    schema = signature_schema(rows)
    if parts:
        bands = np.concatenate([part.bands for part in parts], axis=1)
        others = [
            pa.concat_arrays(column) for column in zip(*(p.others for p in parts), strict=True)
        ]
    else:
        bands = np.empty((NUM_BINS // rows, 0), np.uint64)
        others = [pa.array([], kind) for _, kind in LAST_COLUMNS]
    with pa.OSFile(str(output), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        # One batch, empty or not, so that a column is one array.
        writer.write_batch(pa.record_batch([*bands, *others], schema=schema))
    if kept is not None:
        _keep(output, kept)
    return Outcome(Counts(), extra={"reused": False})


def calm_allocator() -> None:
    """Keep the C library from giving the memory of arrays back, only to fault it in again.

    glibc raises its limits to the size of the largest block that was freed.
    """
    block = np.empty(LARGEST_BLOCK, np.uint8)
    del block


class Signed(NamedTuple):
    """Signatures of some records: `bands` [bands, records], and the other columns."""

    bands: Hashes
    others: list[pa.Array]


def sign_bodies(bodies: Bodies, params: Params, rows: int) -> Signed:
    """Return the signatures of some records."""
    words = hash_words(pack(bodies.texts))
    grams = hash_ngrams(words, params["ngram"], params["seed"])
    salts = bodies.kinds.astype(np.uint64) + np.uint64(1)
    sums, words_sums = grams.sums(), words.sums()
    # Too few words for a shingle: such texts are compared as a whole.
    for place in np.flatnonzero(grams.counts == 0):
        digest = digest_text(bodies.texts[int(place)].as_py())
        sums[place], words_sums[place] = np.frombuffer(digest[:16], np.uint64)
    others = [
        pa.array(mix(sums + salts * MULTIPLIER)),
        pa.array(words_sums),
        pa.array(hash_strings(bodies.columns["id"])),
        bodies.columns["score"],
        pa.array(grams.counts.astype(np.uint32)),
    ]
    return Signed(band_hashes(sketch(grams), salts, rows), others)


def digest_text(text: str) -> bytes:
    """Return the sha256 of a text, equal for texts that differ in white space alone."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _digest_path(kept: Path) -> Path:
    return kept.with_suffix(".sha256")


def _is_whole(kept: Path) -> bool:
    try:
        return _digest_path(kept).read_text() == sha256_file(kept)
    except OSError:
        return False


def _keep(signatures: Path, kept: Path) -> None:
    """Keep a signature file, whole or not at all; the digest beside it is written last."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f".{kept.name}.{os.getpid()}-{threading.get_ident()}.part")
    shutil.copyfile(signatures, part)
    part.replace(kept)
    note = part.with_suffix(".digest")
    note.write_text(sha256_file(kept))
    note.replace(_digest_path(kept))


def forget_unused(folder: Path) -> None:
    """Remove kept signatures that no build has used for 30 days."""
    if not folder.is_dir():
        return
    os.utime(folder)
    for path in folder.glob("*.arrow"):
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            _digest_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


class Column(NamedTuple):
    """A column of one signature file; its first value is that of document number `first`."""

    first: int
    values: npt.NDArray[Any]


class Index:
    """The signature files of all shards, mapped. Documents are numbered through all of them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map the files; their order gives the numbers."""
        self.paths = paths
        self._batches = []
        for path in paths:
            with pa.memory_map(str(path)) as file:
                self._batches.append(pa.ipc.open_file(file).get_batch(0))
        sizes = [batch.num_rows for batch in self._batches]
        names = self._batches[0].schema.names if self._batches else []
        self.bands = [name for name in names if name.startswith("band_")]
        self.firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.size = sum(sizes)

    def columns(self, name: str) -> Iterator[Column]:
        """Yield a column's part in each file, without copying it."""
        for first, batch in zip(self.firsts, self._batches, strict=True):
            yield Column(first, batch[name].to_numpy(zero_copy_only=batch[name].null_count == 0))


def gather(columns: Iterator[Column], path: Path, kind: Any) -> None:
    """Write a column of all files as one plain array, to be mapped."""
    with path.open("wb") as file:
        for column in columns:
            column.values.astype(kind).tofile(file)


def mapped(path: Path, kind: Any, mode: Any = "r") -> npt.NDArray[Any]:
    """Map a plain array; an empty file is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, kind)
    return np.memmap(path, kind, mode)
