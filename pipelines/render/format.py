"""Records become rows of pieces; the `format` stage.

Pairs and dialogues go through the recipe's template; code (`text`) is cut into fragments that fit a
block. Invariant: every record is in the rows, whole, or counted with the reason why not.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import TemplateError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import Row, read_rows
from pipelines.render.arrow_files import open_writer
from pipelines.render.code_rows import CodeFormatter, make_row
from pipelines.render.drops import Drops
from pipelines.render.encode import open_tokenizer, prove_fast
from pipelines.render.fim import is_permuted
from pipelines.render.fragments import Splitter
from pipelines.render.pair_columns import find_pairs, render_pairs
from pipelines.render.piece_columns import piece_column
from pipelines.render.pieces import PIECE
from pipelines.render.prompt_templates import PromptTemplate
from pipelines.render.repositories import (
    Separators,
    cut_series,
    find_place,
    find_separators,
)
from pipelines.render.sentinels import STARCODER, find_sentinels
from pipelines.render.splits import TRAIN, list_extra_splits
from pipelines.render.templates import Template, Unrenderable, get_template
from pipelines.render.text_encoder import SAMPLED_ROWS, SAMPLED_SHARDS
from pipelines.settings.fim import Fim
from pipelines.settings.template import Template as Settings

DEPENDS = ("tokenizers", "pyarrow")

# Uncompressed bytes of the records that are rendered at once.
BATCH_BYTES = 2_000_000
COLUMNS = ("id", "source", "meta", "messages", "prompt", "completion", "text")

FORMAT_SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("fim", pa.string(), nullable=False),
        pa.field("pieces", pa.list_(PIECE), nullable=False),
        # The number of pieces in a dialogue's head and in each question with its answer; null where
        # a row is never shortened.
        pa.field("parts", pa.list_(pa.int32())),
        # Where code is cut once it is tokens, as shares of them; null where pieces are cut.
        pa.field("cuts", pa.list_(pa.float64())),
        # The further records of a row: files of one repository.
        pa.field("joined", pa.list_(pa.string())),
    ]
)


@dataclass(slots=True)
class _Shard:
    """One shard in the making: its settings, and what is counted on the way."""

    params: Params
    template: Template
    code: CodeFormatter
    cuts_turns: bool
    drops: Drops = field(default_factory=Drops)


def params(recipe: Recipe) -> dict[str, Any]:
    """Return what the pieces depend on beyond the records and the tokenizer."""
    return {
        # What a template's file says counts, not where it lies; a .jinja file is read otherwise.
        "template": {
            **recipe.template.model_dump(),
            "file": Path(recipe.template.file or "").name or None,
        },
        "fim": recipe.fim.model_dump(),
        "block_size": recipe.tokenization.block_size,
        "truncation": recipe.tokenization.truncation,
    }


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Render every shard. Only in the train split code is permuted and system turns are left out.

    Where code is permuted, `fim.fim_passes` passes over the train split are rendered, and three
    twins of the held-out code, one for each order, that are the same in every run. Raises
    TemplateError for the first record that cannot be rendered, where the recipe says so.
    """
    folder = inputs["tokenizer"].folder
    paths = inputs["split"].paths()
    code = list(_sample_code([path for _, path in paths]))
    fast = bool(code) and prove_fast(folder, code)
    arguments = {**params(recipe), "tokenizer": str(folder), "fast": fast, "pass": 0, "twin": None}
    held_out = {
        **arguments,
        "fim": {**arguments["fim"], "fim_rate": 0.0, "source_rates": {}},
        "template": {**arguments["template"], "system_dropout": 0.0},
    }
    splits: dict[str, list[tuple[str, Path]]] = {shard.split: [] for shard, _ in paths}
    for shard, path in paths:
        splits[shard.split].append((shard.file, path))
    made: list[ShardReport] = []
    for split in sorted(splits, key=lambda name: name != TRAIN):
        jobs = [Job(_arrow(file), (path,), split) for file, path in splits[split]]
        made += work.map(format_shard, jobs, arguments if split == TRAIN else held_out)
    extra: list[ShardReport] = []
    for split, origin, changes in list_extra_splits(recipe.fim):
        jobs = [
            Job(_arrow(f"{split}{file.removeprefix(origin)}"), (path,), split)
            for file, path in splits.get(origin, ())
        ]
        given = arguments if origin == TRAIN else held_out
        extra += work.map(format_shard, jobs, {**given, **changes})
    counts = sum((report.counts for report in made), Counts())
    return Built((*made, *extra), _report((*made, *extra), counts), counts)


def _arrow(file: str) -> str:
    return f"{file.removesuffix('.parquet')}.arrow"


def _sample_code(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a few files of code of some shards: nothing else is encoded here."""
    for path in paths[:: max(1, len(paths) // SAMPLED_SHARDS)]:
        for row in islice(read_rows(path, ["text"]), SAMPLED_ROWS):
            if row["text"]:
                yield row["text"]


def format_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Render one Parquet shard of records into one of pieces."""
    folder = Path(params["tokenizer"])
    tokenizer, encoder = open_tokenizer(folder, fast=params["fast"])
    settings, twin = Fim(**params["fim"]), params["twin"]
    permutes = twin is not None or is_permuted(settings)
    shard = _Shard(
        params,
        get_template(Settings(**params["template"]), folder),
        CodeFormatter(
            Splitter(tokenizer, encoder, params["block_size"]),
            settings,
            find_sentinels(tokenizer, settings.sentinels) if permutes else STARCODER,
            params["pass"],
            twin,
        ),
        cuts_turns=params["truncation"] != "drop",
    )
    counts = Counts()
    joins = settings.repository_order and twin is None
    separators = find_separators(tokenizer) if joins else None
    with open_writer(output, FORMAT_SCHEMA, compression="lz4") as writer:
        for table, each in _format_file(inputs[0], shard, separators):
            writer.write_table(table)
            counts += each
    counts += Counts(dropped=dict(shard.drops.counts))
    extra = {
        "records": counts.rows_in,
        "rows": counts.rows_out,
        **shard.code.report(),
    }
    return Outcome(counts, rejects=tuple(shard.drops.samples), extra=extra)


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the records of a Parquet shard, about BATCH_BYTES at a time."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        meta = file.metadata
        size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        number = max(1, BATCH_BYTES * meta.num_rows // max(1, size))
        yield from file.iter_batches(batch_size=number, columns=list(COLUMNS))


def _format_file(
    path: Path, shard: _Shard, separators: Separators | None
) -> Iterator[tuple[pa.Table, Counts]]:
    """Yield the rows of a Parquet shard; its code comes last where files are joined."""
    code: list[pa.RecordBatch] = []
    for batch in _read_batches(path):
        is_code = batch["text"].is_valid()
        chosen = batch
        if separators:
            code.append(batch.filter(is_code))
            chosen = batch.filter(pc.invert(is_code))
        elif shard.params["twin"]:
            chosen = batch.filter(is_code)
        table, used = _format_batch(chosen, shard)
        yield table, Counts(rows_in=len(chosen), rows_out=table.num_rows, used=used)
    if separators and code:
        yield from _format_repositories(pa.Table.from_batches(code), shard, separators)


def _format_batch(batch: pa.RecordBatch, shard: _Shard) -> tuple[pa.Table, int]:
    """Return the rows of a batch of records, and how many of these have any."""
    pairs = find_pairs(batch, shard.template)
    left = pc.invert(pairs)
    chosen = batch.filter(pairs)
    groups = _format_records(batch.filter(left).to_pylist(), shard)
    used = len(chosen) + sum(bool(group) for group in groups)
    parts = []
    if len(chosen):
        parts.append(_pair_table(chosen, shard))
    if len(groups):
        parts.append(_table([row for group in groups for row in group]))
    if len(parts) < 2:
        return (parts[0] if parts else FORMAT_SCHEMA.empty_table()), used
    sizes = [len(group) for group in groups]
    places = np.concatenate(
        [
            np.flatnonzero(pairs.to_numpy(False)),
            np.repeat(np.flatnonzero(left.to_numpy(False)), sizes),
        ]
    )
    return pa.concat_tables(parts).take(np.argsort(places, kind="stable")), used


def _format_repositories(
    table: pa.Table, shard: _Shard, separators: Separators
) -> Iterator[tuple[pa.Table, Counts]]:
    """Yield the rows of a shard's code, files of a repository joined, and what is counted."""
    places = [find_place(row) for row in table.select(["id", "source", "meta"]).to_pylist()]
    sizes = pc.binary_length(table["text"]).to_pylist()
    for numbers in cut_series(places, sizes, BATCH_BYTES):
        groups = shard.code.format(table.take(numbers).to_pylist(), shard.drops)
        rows = [row for group in groups for row in group]
        of_rows = [places[n] for n, group in zip(numbers, groups, strict=True) for _ in group]
        examples = list(shard.code.join(rows, of_rows, separators))
        used = sum(bool(group) for group in groups)
        yield _table(examples), Counts(rows_in=len(numbers), rows_out=len(examples), used=used)


def _pair_table(batch: pa.RecordBatch, shard: _Shard) -> pa.Table:
    """Return the rows of prompts with their completions, one each."""
    assert isinstance(shard.template, PromptTemplate)
    number = len(batch)
    pieces = render_pairs(batch["prompt"], batch["completion"], shard.template)
    parts = pa.nulls(number, pa.list_(pa.int32()))
    if shard.cuts_turns:
        sizes = np.stack([np.zeros(number, np.int32), pieces.value_lengths().to_numpy()], 1)
        ends = pa.array(np.arange(number + 1, dtype=np.int32) * 2)
        parts = pa.ListArray.from_arrays(ends, pa.array(sizes.ravel()))
    columns = {
        "record_id": batch["id"],
        "source": batch["source"],
        "part": pa.array(np.zeros(number, np.int32)),
        "fim": pa.array(["none"] * number),
        "pieces": pieces,
        "parts": parts,
        "cuts": pa.nulls(number, pa.list_(pa.float64())),
        "joined": pa.nulls(number, pa.list_(pa.string())),
    }
    return pa.Table.from_arrays(list(columns.values()), schema=FORMAT_SCHEMA)


def _format_records(records: Sequence[Row], shard: _Shard) -> list[list[Row]]:
    """Return the rows of each record, none for a dropped one."""
    texts = [record for record in records if record["text"] is not None]
    code = iter(shard.code.format(texts, shard.drops))
    return [
        _format_pair(record, shard) if record["text"] is None else next(code) for record in records
    ]


def _format_pair(record: Row, shard: _Shard) -> list[Row]:
    try:
        if not shard.cuts_turns:
            return [make_row(record, 0, "none", shard.template.render(record))]
        parts = shard.template.render_parts(record)
    except Unrenderable as error:
        if shard.params["template"]["bad_records"] == "error":
            raise TemplateError(
                f"{error} (template.bad_records: drop leaves such records out and counts them)"
            ) from error
        shard.drops.add(record["id"], f"template:{error.why}", str(error))
        return []
    row = make_row(record, 0, "none", [piece for part in parts for piece in part])
    return [{**row, "parts": [len(part) for part in parts]}]


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = [
        piece_column([row["pieces"] for row in rows])
        if field.name == "pieces"
        else pa.array([row[field.name] for row in rows], field.type)
        for field in FORMAT_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=FORMAT_SCHEMA)


def _report(shards: Sequence[ShardReport], counts: Counts) -> dict[str, Any]:
    """Return the sums over the shards of each split, and what was dropped."""
    splits: dict[str, dict[str, Any]] = {}
    for report in shards:
        total = splits.setdefault(report.shard.split, {"fim": Counter()})
        for name, value in report.extra.items():
            if name == "fim":
                total["fim"].update(value)
            else:
                total[name] = total.get(name, 0) + value
    for total in splits.values():
        total["fim"] = dict(total["fim"])
    return {
        "splits": splits,
        "dropped": counts.dropped,
    }
