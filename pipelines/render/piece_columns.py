"""Pieces as Arrow columns, so that a shard is encoded without a Python object for each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.render.pieces import PIECE, Piece
from pipelines.render.text_encoder import TextEncoder

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tokens:
    """The tokens of some rows, one row after the other: ids, int32, and which are trained, bool.

    `rows` holds where the tokens of each row begin, and the end of the last one.
    """

    input_ids: Array
    is_trained: Array
    rows: Array

    @cached_property
    def lengths(self) -> Array:
        """Return the number of tokens of each row."""
        return np.diff(self.rows)

    @cached_property
    def num_trained(self) -> Array:
        """Return how many tokens of each row are trained."""
        found = np.zeros(len(self.rows) - 1, np.int64)
        filled = np.flatnonzero(self.lengths)
        if len(filled):
            found[filled] = np.add.reduceat(self.is_trained, self.rows[filled], dtype=np.int64)
        return found

    @property
    def num_predicted(self) -> Array:
        """Return how many trained tokens of each row have a token before them in it."""
        filled = np.flatnonzero(self.lengths)
        found: Array = self.num_trained.copy()
        found[filled] -= self.is_trained[self.rows[filled]]
        return found

    def take(self, kept: Array, kind: pa.DataType) -> tuple[pa.ListArray, pa.ListArray]:
        """Return the rows where `kept` is True as list columns: ids of a kind, and what trains."""
        tokens = slice(None) if kept.all() else np.repeat(kept, self.lengths)
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.lengths[kept])]), pa.int32())
        ids = self.input_ids[tokens].astype(kind.to_pandas_dtype())
        return (
            pa.ListArray.from_arrays(offsets, pa.array(ids)),
            pa.ListArray.from_arrays(offsets, pa.array(self.is_trained[tokens])),
        )


def piece_column(rows: Sequence[Sequence[Piece]]) -> pa.ListArray:
    """Return rows of pieces as a list<PIECE> column."""
    flat = [piece for row in rows for piece in row]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    columns = [
        pa.array([piece[number] for piece in flat], field.type)
        for number, field in enumerate(PIECE)
    ]
    pieces = pa.StructArray.from_arrays(columns, fields=list(PIECE))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pieces)


def control_names(column: pa.ListArray) -> list[str]:
    """Return the control tokens in a list<PIECE> column, sorted."""
    names = pc.unique(pc.struct_field(column.flatten(), "control")).to_pylist()
    return sorted(name for name in names if name is not None)


def encode_column(
    column: pa.ListArray, encoder: TextEncoder, controls: Mapping[str, int]
) -> Tokens:
    """Encode a list<PIECE> column, each piece by itself; `controls` has the id of every control."""
    pieces = column.flatten()
    data, offsets = text_spans(pc.struct_field(pieces, "text"))
    ids, counts = encoder.encode_spans(data, offsets)
    control = pc.struct_field(pieces, "control").dictionary_encode()
    is_control = control.is_valid().to_numpy(zero_copy_only=False)
    codes = control.indices.drop_null().to_numpy()
    known = np.array([controls[name] for name in control.dictionary.to_pylist()], np.int32)
    counts = counts + is_control
    ends = np.cumsum(counts)
    input_ids = np.empty(int(counts.sum()), np.int32)
    of_control = np.zeros(len(input_ids), bool)
    of_control[(ends - counts)[is_control]] = True
    input_ids[of_control] = known[codes]
    input_ids[~of_control] = ids
    trained = pc.struct_field(pieces, "trained").to_numpy(zero_copy_only=False).astype(bool)
    rows = column.offsets.to_numpy() - column.offsets[0].as_py()
    return Tokens(input_ids, np.repeat(trained, counts), np.concatenate([[0], ends])[rows])


def text_spans(texts: pa.StringArray) -> tuple[Array, Array]:
    """Return a string column as UTF-8, uint8, and the offsets of its values; null is empty."""
    if texts.null_count:
        texts = pc.fill_null(texts, "")
    _, ends, values = texts.buffers()
    offsets = np.frombuffer(ends, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(values, np.uint8) if values else np.empty(0, np.uint8)
    return data[int(offsets[0]) : int(offsets[-1])], (offsets - offsets[0]).astype(np.int64)
