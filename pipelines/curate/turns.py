"""The texts of a batch of records, without an object for each row, and changes to its columns."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.curate.rows import Kind
from pipelines.manifest import canonical


class Turns:
    """What people wrote in each record of a batch: prompts, or the messages of dialogues."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        """Read prompts and messages; code and completions stay in Arrow."""
        self.batch = batch
        is_text, is_pair = (pc.is_valid(batch[name]).to_pylist() for name in ("text", "completion"))
        self.kinds: list[Kind] = [
            "text" if text else "prompt" if pair else "messages"
            for text, pair in zip(is_text, is_pair, strict=True)
        ]
        self._prompts = batch["prompt"].to_pylist()
        lengths = pc.fill_null(pc.list_value_length(batch["messages"]), 0).to_numpy()
        self._lengths = lengths
        self._bounds: list[int] = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        self._messages = pc.list_flatten(batch["messages"])
        contents = pc.fill_null(pc.struct_field(self._messages, "content"), "")
        self._contents: list[str] = contents.to_pylist()

    def prose(self, row: int) -> Sequence[str]:
        """Return the texts of a record that are in a human language: its prompt or messages."""
        if self.kinds[row] == "prompt":
            return (self._prompts[row] or "",)
        return self._contents[self._bounds[row] : self._bounds[row + 1]]

    def answers(self, row: int, number: int) -> list[int]:
        """Return which of the first messages of a dialogue are an assistant's and trained."""
        start = self._bounds[row]
        first = self._messages.slice(start, number)
        roles = pc.struct_field(first, "role").to_pylist()
        trained = pc.struct_field(first, "train").to_pylist()
        return [
            index
            for index, (role, train) in enumerate(zip(roles, trained, strict=True))
            if role == "assistant" and train is not False
        ]

    def fenced(self, ends: Mapping[int, int]) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows with texts that may hold a fenced block, of dialogues up to their end."""
        completions = self.batch["completion"]
        fences = pc.fill_null(
            pc.or_(pc.match_substring(completions, "```"), pc.match_substring(completions, "~~~")),
            False,
        ).to_pylist()
        rows = zip(self._prompts, fences, itertools.pairwise(self._bounds), strict=True)
        for row, (prompt, completion, (low, high)) in enumerate(rows):
            texts = [prompt] if prompt else []
            if completion:
                texts.append(completions[row].as_py())
            if high > low:
                texts += self._contents[low : low + ends.get(row, high - low)]
            texts = [text for text in texts if "```" in text or "~~~" in text]
            if texts:
                yield row, texts

    def cut(self, ends: Mapping[int, int]) -> pa.RecordBatch:
        """Return the batch with some dialogues ended after so many messages."""
        if not ends:
            return self.batch
        lengths = self._lengths.copy()
        rows = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(rows)) - np.array(self._bounds)[rows]
        lengths[list(ends)] = list(ends.values())
        kept = self._messages.filter(pa.array(place < lengths[rows]))
        column = self.batch["messages"]
        bounds = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        messages = pa.ListArray.from_arrays(bounds, kept, type=column.type, mask=pc.is_null(column))
        return _set_column(self.batch, "messages", messages)


def note_meta(batch: pa.RecordBatch, notes: Mapping[int, Mapping[str, Any]]) -> pa.RecordBatch:
    """Return the batch with keys added to the meta of some rows."""
    if not any(notes.values()):
        return batch
    metas = batch["meta"].to_pylist()
    for row, values in notes.items():
        if values:
            before = metas[row]
            metas[row] = canonical({**json.loads(before), **values} if before else values)
    return _set_column(batch, "meta", pa.array(metas, pa.string()))


def _set_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    place = batch.schema.get_field_index(name)
    return batch.set_column(place, batch.schema.field(name), column)
