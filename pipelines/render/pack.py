"""The `pack` stage: whole examples are packed into rows of at most a block. This is the dataset.

Invariant: every example is in exactly one row, whole, with its length beside it, so that unpacking
gives the examples back and attention can be kept within each. Best-fit decreasing over the whole
split; no padding is stored. Tokens are gathered through a memory map, a shard in memory at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import TemplateError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.render.arrow_files import open_writer, read_batches
from pipelines.render.encode import EXAMPLE_SCHEMA, NAMES, UINT16_IDS, open_tokenizer
from pipelines.render.pieces import IGNORE_INDEX
from pipelines.render.reports import audit_mask, choose_audited, report_tokens
from pipelines.render.splits import SPLITS, TRAIN, is_extra, origin_of

DEPENDS = ("pyarrow", "numpy")

# The mask audit chooses from as many examples.
AUDITED_FROM = 50_000
# Tokens gathered at once, so that the arrays stay in the processor's cache.
GATHERED = 1 << 17

NAMES_SCHEMA = pa.schema([EXAMPLE_SCHEMA.field(name) for name in NAMES])
PLAN_SCHEMA = pa.schema(
    [
        ("record_ids", pa.list_(pa.string())),
        ("starts", pa.list_(pa.int64())),
        ("lengths", pa.list_(pa.int32())),
        # The further records of each document; null where no document of the split has any.
        ("joined_ids", pa.list_(pa.list_(pa.string()))),
    ]
)

Plan = list[list[int]]
Array = np.ndarray[Any, np.dtype[Any]]


class Examples(NamedTuple):
    """The examples of a split: their columns in memory, their tokens in a file.

    `names` has the columns record_id, source and fim; the file holds int32, id of a trained token
    and ~id of another.
    """

    names: pa.Table
    lengths: Array
    tokens: Path

    @property
    def starts(self) -> Array:
        """Return where each example begins in the file, int64."""
        found: Array = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        return found


def params(recipe: Recipe) -> dict[str, Any]:
    """Return what the rows depend on; the training seed does not belong to it."""
    return {
        "block_size": recipe.tokenization.block_size,
        "rows_per_shard": recipe.tokenization.rows_per_shard,
        "seed": recipe.split.seed,
        "packing": recipe.tokenization.packing,
    }


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Pack every split; TemplateError where no example is left to train on."""
    settings = params(recipe)
    tokenizer, _ = open_tokenizer(inputs["tokenizer"].folder, fast=False)
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    shards: list[ShardReport] = []
    rows: dict[str, int] = {}
    lengths: dict[str, Array] = {}
    found = {shard.split: None for shard in inputs["tokenize"].shards}
    given = {"wide_ids": vocab_size > UINT16_IDS, "mixing": settings["packing"] != "best-fit"}
    audit: list[dict[str, Any]] = []
    for split in dict.fromkeys((*SPLITS, *found)):
        paths = [path for _, path in inputs["tokenize"].paths(split)]
        examples = gather_examples(paths, work.path, split)
        lengths[split] = examples.lengths
        rows[split], jobs = _plan_split(examples, split, settings, work.path)
        shards += work.map(pack_shard, jobs, given)
        if split == TRAIN:
            audit = _audit(tokenizer, examples)
        examples.tokens.unlink()
    dropped = inputs["tokenize"].report["dropped"]
    if not rows["train"]:
        raise TemplateError(
            f"no example is left to train on (dropped: {dropped or 'none'}); "
            f"raise tokenization.block_size ({settings['block_size']}) or loosen the filters"
        )
    report = {
        "packing": settings["packing"],
        "token_report": report_tokens(
            inputs["tokenize"].report, lengths, rows, settings["block_size"]
        ),
        "mask_audit": audit,
    }
    counts = sum((r.counts for r in shards if not is_extra(r.shard.split)), Counts())
    return Built(tuple(shards), report, counts)


def _plan_split(
    examples: Examples, split: str, settings: Params, folder: Path
) -> tuple[int, list[Job]]:
    """Write the plans of a split's shards; return the number of its rows, and the jobs."""
    block_size, per_shard = settings["block_size"], settings["rows_per_shard"]
    if settings["packing"] == "best-fit":
        plan = plan_rows(examples.lengths, block_size)
        segments = whole_examples(order_rows(plan, split, settings), examples)
    else:
        order = order_rows([[i] for i in range(len(examples.lengths))], split, settings)
        segments = cut_stream([row[0] for row in order], examples, block_size)
    return len(segments.rows) - 1, list(write_plans(segments, examples, split, per_shard, folder))


def plan_rows(lengths: Sequence[int] | Array, block_size: int) -> Plan:
    """Assign examples to rows by best-fit decreasing; return the example numbers of each row.

    Longest first (ties in order), each into the fullest row that still takes it. The free spaces
    in use are the bits of one integer, so the best fit is found by a shift: 1 M examples take
    seconds. Source: D. S. Johnson, "Near-optimal bin packing algorithms" (1973).
    """
    rows: Plan = []
    with_space: list[list[int]] = [[] for _ in range(block_size + 1)]
    spaces = 0
    sizes = np.asarray(lengths, np.int64)
    assert ((sizes > 0) & (sizes <= block_size)).all(), f"an example is not 1 to {block_size} long"
    order = np.argsort(-sizes, kind="stable")
    for example, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            spaces ^= (not with_space[space]) << space
        else:
            space, row = block_size, len(rows)
            rows.append([])
        rows[row].append(example)
        left = space - length
        if left:
            with_space[left].append(row)
            spaces |= 1 << left
    return rows


def order_rows(plan: Plan, split: str, settings: Params) -> Plan:
    """Return train rows in an order drawn from the split seed, held-out ones as records come.

    Packing puts the longest first; a model must not meet its data sorted by length.
    """
    if origin_of(split) != TRAIN:
        return sorted(plan, key=min)
    seed = f"{settings['seed']}{split.removeprefix(TRAIN)}"
    return sorted(plan, key=lambda row: hashlib.sha256(f"{seed}\0{min(row)}".encode()).digest())


class Segments(NamedTuple):
    """Stretches of examples, row after row: `rows` holds where each row's begin, and their end."""

    rows: Array
    examples: Array
    starts: Array
    lengths: Array


def whole_examples(plan: Plan, examples: Examples) -> Segments:
    """Return the segments of a plan: every example whole."""
    chosen = np.fromiter(chain.from_iterable(plan), np.int64)
    rows = np.concatenate([[0], np.cumsum(list(map(len, plan)), dtype=np.int64)])
    return Segments(rows, chosen, examples.starts[chosen], examples.lengths[chosen])


def cut_stream(order: Sequence[int], examples: Examples, block_size: int) -> Segments:
    """Return the examples one after the other, cut into rows of exactly a block; a rest is lost.

    This is the constant-length chunking of the seed systems: it cuts examples at row borders, and
    a row is one document to attention, so that examples mix.
    """
    chosen = np.array(order, np.int64)
    ends = np.cumsum(examples.lengths[chosen], dtype=np.int64)
    total = int(ends[-1]) // block_size * block_size if len(ends) else 0
    borders = np.unique(np.concatenate([np.arange(0, total + 1, block_size), ends[ends < total]]))
    begins = borders[:-1]
    at = np.searchsorted(ends, begins, side="right")
    within = begins - (ends - examples.lengths[chosen])[at]
    rows = np.searchsorted(begins, np.arange(0, total + 1, block_size))
    return Segments(
        rows, chosen[at], examples.starts[chosen[at]] + within, np.diff(borders).astype(np.int32)
    )


def gather_examples(paths: Sequence[Path], folder: Path, split: str) -> Examples:
    """Copy the tokens of the split's Parquet shards to files that can be read at any place."""
    names, lengths = [NAMES_SCHEMA.empty_table()], [np.empty(0, np.int32)]
    tokens = folder / f".{split}.tokens"
    with tokens.open("wb") as file:
        for batch in (batch for path in paths for batch in read_batches(path)):
            columns = [batch[name] for name in NAMES_SCHEMA.names]
            names.append(pa.Table.from_arrays(columns, schema=NAMES_SCHEMA))
            lengths.append(batch["input_ids"].value_lengths().to_numpy())
            ids = batch["input_ids"].flatten().to_numpy().astype(np.int32)
            trained = batch["trained"].flatten().to_numpy(zero_copy_only=False)
            # ~id is id ^ -1.
            file.write(ids ^ (trained.view(np.int8) - np.int8(1)))
    table = pa.concat_tables(names).combine_chunks()
    return Examples(table, np.concatenate(lengths), tokens)


def map_tokens(path: Path) -> Array:
    """Return a file of tokens as an array that is read when it is used."""
    if path.stat().st_size == 0:
        return np.empty(0, np.int32)
    # A plain array: slicing a memmap object costs more than the copy of an example.
    return np.asarray(np.memmap(path, np.int32, mode="r"))


def pack_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write one Arrow stream of packed rows; the inputs are its plan and the file of tokens."""
    plan = pq.read_table(inputs[0], schema=PLAN_SCHEMA).combine_chunks()
    lengths = plan["lengths"].combine_chunks()
    starts = plan["starts"].combine_chunks().flatten().to_numpy()
    sizes = lengths.flatten().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(sizes)])[lengths.offsets.to_numpy()]
    input_ids = np.empty(int(sizes.sum()), np.int32 if params["wide_ids"] else np.uint16)
    labels = np.empty(len(input_ids), np.int32)
    num_trained = _collect(map_tokens(inputs[1]), starts, sizes, input_ids, labels)
    columns = [
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
        for values in (input_ids, labels)
    ]
    if params["mixing"]:  # to attention each row is one document
        ends = np.arange(len(lengths) + 1, dtype=np.int32)
        lengths = pa.ListArray.from_arrays(ends, pa.array(np.diff(offsets), pa.int32()))
    names = ["input_ids", "labels", "lengths", "record_ids"]
    columns += [lengths, plan["record_ids"].combine_chunks()]
    if plan["joined_ids"].null_count < len(lengths):
        names.append("joined_ids")
        columns.append(plan["joined_ids"].combine_chunks())
    batch = pa.record_batch(columns, names=names)
    with open_writer(output, batch.schema) as writer:
        writer.write_batch(batch)
    counts = Counts(rows_in=len(sizes), rows_out=batch.num_rows, used=len(sizes))
    return Outcome(counts, tokens=len(input_ids), trained_tokens=num_trained)


def unpack(row: Mapping[str, Any]) -> list[tuple[str, list[int], list[int]]]:
    """Return (record id, input_ids, labels) of each example in a packed row, in the row's order."""
    found, start = [], 0
    for record_id, length in zip(row["record_ids"], row["lengths"], strict=True):
        stop = start + length
        found.append((record_id, row["input_ids"][start:stop], row["labels"][start:stop]))
        start = stop
    return found


def _collect(tokens: Array, starts: Array, sizes: Array, input_ids: Array, labels: Array) -> int:
    """Fill ids and labels with stretches of tokens one after the other; return what is trained."""
    ends = np.cumsum(sizes, dtype=np.int64)
    # What is added to a place in the row to get the place in the file.
    shifts = starts - (ends - sizes)
    first = done = num_trained = 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(ends, done + GATHERED, side="right")))
        stop = int(ends[last - 1])
        places = np.repeat(shifts[first:last], sizes[first:last])
        places += np.arange(done, stop)
        found = tokens.take(places)
        trained = found >= 0
        input_ids[done:stop] = found ^ (found >> 31)
        labels[done:stop] = np.where(trained, found, IGNORE_INDEX)
        num_trained += int(np.count_nonzero(trained))
        first, done = last, stop
    return num_trained


def _audit(tokenizer: Tokenizer, examples: Examples) -> list[dict[str, Any]]:
    tokens = map_tokens(examples.tokens)
    first = examples.names.slice(0, AUDITED_FROM)
    lengths, starts = examples.lengths[:AUDITED_FROM].tolist(), examples.starts
    record_ids, sources, orders = (
        first[name].to_pylist() for name in ("record_id", "source", "fim")
    )
    found = []
    for i in choose_audited(record_ids, sources, orders, lengths):
        span = tokens[int(starts[i]) : int(starts[i]) + lengths[i]]
        mask = np.where(span >= 0, 0, IGNORE_INDEX).tolist()
        found.append(audit_mask(tokenizer, record_ids[i], (span ^ (span >> 31)).tolist(), mask))
    return found


def write_plans(
    segments: Segments, examples: Examples, split: str, rows_per_shard: int, folder: Path
) -> Iterator[Job]:
    """Write which stretches each shard's rows hold; yield the job of each shard."""
    rows = segments.rows
    joins = examples.names["joined"].null_count < len(examples.names)
    for number, first in enumerate(range(0, len(rows) - 1, rows_per_shard)):
        borders = rows[first : first + rows_per_shard + 1]
        part = slice(int(borders[0]), int(borders[-1]))
        offsets = pa.array(borders - borders[0], pa.int32())
        chosen = examples.names.take(pa.array(segments.examples[part]))
        record_ids, joined = (chosen[name].combine_chunks() for name in ("record_id", "joined"))
        values = (record_ids, segments.starts[part], segments.lengths[part])
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(column, field.type.value_type))
            for column, field in zip(values, PLAN_SCHEMA, strict=False)
        ]
        columns.append(
            pa.ListArray.from_arrays(offsets, joined.fill_null(pa.scalar([], joined.type)))
            if joins
            else pa.nulls(len(borders) - 1, PLAN_SCHEMA.field("joined_ids").type)
        )
        path = folder / f".{split}-{number:05d}.plan"
        pq.write_table(pa.Table.from_arrays(columns, schema=PLAN_SCHEMA), path)
        yield Job(f"{split}-{number:05d}.arrow", (path, examples.tokens), split)
