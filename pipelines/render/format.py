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

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import TemplateError
from pipelines.fim_settings import Fim
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import Row, read_rows
from pipelines.render.code_rows import CodeFormatter, make_row
from pipelines.render.drops import Drops
from pipelines.render.encode import in_batches, open_tokenizer, prove_fast
from pipelines.render.fim import is_permuted
from pipelines.render.fragments import Splitter
from pipelines.render.piece_columns import piece_column
from pipelines.render.pieces import PIECE
from pipelines.render.sentinels import STARCODER, find_sentinels
from pipelines.render.splits import TRAIN, list_extra_splits
from pipelines.render.templates import Template, Unrenderable, get_template
from pipelines.render.text_encoder import SAMPLED_ROWS, SAMPLED_SHARDS
from pipelines.template_settings import Template as Settings

DEPENDS = ("tokenizers", "pyarrow")

# No dictionary of texts, which hardly repeat.
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": ["source", "fim", "pieces.list.element.control"],
    "write_page_checksum": True,
}
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
        jobs = [Job(file, (path,), split) for file, path in splits[split]]
        made += work.map(format_shard, jobs, arguments if split == TRAIN else held_out)
    extra: list[ShardReport] = []
    for split, origin, changes in list_extra_splits(recipe.fim):
        jobs = [
            Job(f"{split}{file.removeprefix(origin)}", (path,), split)
            for file, path in splits.get(origin, ())
        ]
        given = arguments if origin == TRAIN else held_out
        extra += work.map(format_shard, jobs, {**given, **changes})
    counts = sum((report.counts for report in made), Counts())
    return Built((*made, *extra), _report((*made, *extra), counts), counts)


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
    with pq.ParquetWriter(output, FORMAT_SCHEMA, **WRITE_OPTIONS) as writer:
        for batch in in_batches(read_rows(inputs[0], list(COLUMNS)), _characters):
            records = [r for r in batch if r["text"] is not None] if params["twin"] else batch
            groups = _format_records(records, shard)
            rows = [row for group in groups for row in group]
            writer.write_table(_table(rows))
            used = sum(bool(group) for group in groups)
            counts += Counts(rows_in=len(records), rows_out=len(rows), used=used)
    counts += Counts(dropped=dict(shard.drops.counts))
    extra = {
        "records": counts.rows_in,
        "rows": counts.rows_out,
        **shard.code.report(),
    }
    return Outcome(counts, rejects=tuple(shard.drops.samples), extra=extra)


def _characters(record: Row) -> int:
    turns = (turn["content"] for turn in record["messages"] or ())
    return sum(len(text or "") for text in (record["text"], record["completion"], *turns))


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
