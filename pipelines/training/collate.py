"""Packed rows from disk to batches in which documents cannot see each other.

A batch carries input_ids, labels and position_ids that restart with every document, and never an
attention_mask: with one, transformers would let packed documents attend to each other.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipelines.errors import StoreError
from pipelines.manifest import Manifest, Shard, sha256_file

IGNORE_INDEX = -100
COLUMNS = ("input_ids", "labels", "lengths")
UNNAMED = "unnamed"  # the source of records whose ids name none


class PackedRow(NamedTuple):
    """One row: token ids and labels, both [n], and the documents' lengths, which sum to n."""

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]


class PackedDataset:
    """One split of a packed dataset, memory-mapped and read without copies."""

    def __init__(self, folder: Path, split: str, *, rehash: bool = True) -> None:
        """Open the shards of a split after checking each against the manifest.

        Sizes and row counts are always checked, the sha256 unless `rehash` is False. Raises
        StoreError naming the shard that differs, or the split that has no rows.
        """
        shards = [s for s in _read_manifest(folder).shards if s.split == split and s.rows]
        if not shards:
            raise StoreError(
                f"{folder}: split {split!r} holds no rows; give it a larger share or more data"
            )
        self._batches: list[dict[str, _Lists]] = []
        self._record_ids: list[Any] = []
        self._ends: list[int] = []
        for shard in shards:
            self._open(folder / shard.file, shard, rehash=rehash)

    def _open(self, path: Path, shard: Shard, *, rehash: bool) -> None:
        if not path.exists():
            raise StoreError(f"{path}: missing; run the same command again to rebuild it")
        if path.stat().st_size != shard.bytes or (rehash and sha256_file(path) != shard.sha256):
            raise StoreError(
                f"{path}: does not match its manifest; run the same command again to rebuild it"
            )
        before = len(self)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                self._batches.append({name: _Lists(batch.column(name)) for name in COLUMNS})
                self._record_ids.append(batch.column("record_ids"))
                self._ends.append(len(self) + batch.num_rows)
        if len(self) - before != shard.rows:
            raise StoreError(f"{path}: holds {len(self) - before} rows, expected {shard.rows}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> PackedRow:
        number, row = self._find(index)
        return PackedRow(*(self._batches[number][name][row] for name in COLUMNS))

    def sources(self, index: int) -> list[str]:
        """Return the source of each document of a row: record ids are <source>:<native id>."""
        number, row = self._find(index)
        return [
            record_id.partition(":")[0] if ":" in record_id else UNNAMED
            for record_id in self._record_ids[number][row].as_py()
        ]

    @property
    def most_documents(self) -> int:
        """Return the documents of the row that holds most of them."""
        return max(batch["lengths"].longest for batch in self._batches)

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


class PassedDataset:
    """The passes over the train split, code permuted anew in each: epoch e reads pass e mod n.

    As long as the longest pass; a shorter one begins anew, so that no row is ever left out.
    """

    def __init__(self, folder: Path, *, rehash: bool = True) -> None:
        """Open `train`, `train.1`, ... as PackedDataset does; a dataset may have one pass only."""
        names = ["train"]
        found = splits_of(folder)
        while f"train.{len(names)}" in found:
            names.append(f"train.{len(names)}")
        self._passes = [PackedDataset(folder, name, rehash=rehash) for name in names]
        self._number = 0

    def set_epoch(self, epoch: int) -> None:
        """Read the pass of this epoch from now on."""
        self._number = epoch % len(self._passes)

    def __len__(self) -> int:
        return max(map(len, self._passes))

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self._passes[self._number]
        return rows[index % len(rows)]

    @property
    def most_documents(self) -> int:
        """Return the documents of the row that holds most of them, in any pass."""
        return max(rows.most_documents for rows in self._passes)


def splits_of(folder: Path) -> set[str]:
    """Return the splits of a dataset that hold rows; StoreError where there is no dataset."""
    return {shard.split for shard in _read_manifest(folder).shards if shard.rows}


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder}: no readable manifest of a packed dataset") from error


class _Lists:
    """A list column as numpy views: [] slices the values of one row without a copy."""

    def __init__(self, column: Any) -> None:
        self._values = column.values.to_numpy(zero_copy_only=True)
        self._offsets = column.offsets.to_numpy(zero_copy_only=True)

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        view: np.ndarray[Any, Any] = self._values[self._offsets[row] : self._offsets[row + 1]]
        return view

    @property
    def longest(self) -> int:
        """Return the size of the longest list; the values are not read."""
        return int(np.diff(self._offsets).max(initial=0))


class FlatShape(NamedTuple):
    """One shape for all flat batches, so that torch.compile does not compile anew for each.

    What a batch lacks is made up with documents of pad tokens, then with empty ones.
    """

    tokens: int
    documents: int  # at most
    longest: int  # tokens of a document, at most


class Collator:
    """Rows to a batch of int64 tensors: input_ids, labels and position_ids.

    The label of each document's first token is IGNORE_INDEX: after the model's shift it would be
    predicted from the document before. Two layouts:

    - padded (the default): [rows, longest row]; short rows end in one more document of pad tokens.
    - flat: all rows in one, [1, tokens], nothing padded, with the boundaries of the documents as
      cu_seq_lens_q/k (int32, [documents + 1]) and max_length_q/k, which `varlen` attention needs.
    """

    def __init__(self, pad_id: int, *, flat: bool = False, fixed: FlatShape | None = None) -> None:
        """Keep the id that fills what is missing; `fixed` gives every flat batch one shape."""
        self._pad_id = pad_id
        self._fixed = fixed
        self._collate = self._flatten if flat or fixed else self._pad

    def __call__(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        """Return the batch of some rows."""
        return self._collate(rows)

    def _pad(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            size = len(row.input_ids)
            starts = np.cumsum(row.lengths, dtype=np.int64) - row.lengths
            input_ids[number, :size] = row.input_ids
            labels[number, :size] = row.labels
            labels[number, starts] = IGNORE_INDEX
            firsts = np.repeat(starts, row.lengths)
            position_ids[number, :size] = np.arange(size) - firsts
            position_ids[number, size:] = np.arange(shape[1] - size)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }

    def _flatten(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        lengths = np.concatenate([row.lengths for row in rows]).astype(np.int64)
        total = int(lengths.sum())
        shape = self._fixed or FlatShape(total, len(lengths), int(lengths.max()))
        tokens = shape.tokens
        while total < tokens:  # documents of pad tokens, none longer than the longest
            lengths = np.append(lengths, min(tokens - total, shape.longest))
            total += int(lengths[-1])
        if total > tokens or len(lengths) > shape.documents or lengths.max() > shape.longest:
            raise ValueError(f"{len(rows)} rows do not fit into {shape}")
        input_ids = np.full((1, tokens), self._pad_id, dtype=np.int64)
        labels = np.full((1, tokens), IGNORE_INDEX, dtype=np.int64)
        real = sum(len(row.input_ids) for row in rows)
        np.concatenate([row.input_ids for row in rows], out=input_ids[0, :real])
        np.concatenate([row.labels for row in rows], out=labels[0, :real])
        ends = np.cumsum(lengths)
        starts = ends - lengths
        labels[0, starts] = IGNORE_INDEX
        position_ids = np.arange(tokens) - np.repeat(starts, lengths)
        boundaries = np.full(shape.documents + 1, tokens, dtype=np.int32)
        boundaries[0] = 0
        boundaries[1 : len(ends) + 1] = ends
        cu_seq_lens = torch.from_numpy(boundaries)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids[None]),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": shape.longest,
            "max_length_k": shape.longest,
        }
