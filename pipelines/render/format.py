"""Records become rows of pieces; the `format` stage.

Pairs and dialogues go through the recipe's template; code (`text`) is cut into fragments that fit a
block. Invariant: every record is in the rows, whole, or counted with the reason why not.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import TemplateError
from pipelines.manifest import Counts
from pipelines.recipe import Fim, Recipe
from pipelines.records import Row, read_rows
from pipelines.render.drops import Drops
from pipelines.render.encode import in_batches, load_tokenizer
from pipelines.render.fragments import Fragment, split_files
from pipelines.render.pieces import PIECE, Piece
from pipelines.render.templates import Template, Unrenderable, get_template
from pipelines.template_settings import Template as Settings

DEPENDS = ("tokenizers", "pyarrow")

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
    ]
)


@dataclass(slots=True)
class _Shard:
    """One shard in the making: its settings, and what is counted on the way."""

    params: Params
    tokenizer: Tokenizer
    template: Template
    fim: Fim
    cuts_turns: bool
    drops: Drops = field(default_factory=Drops)
    orders: Counter[str] = field(default_factory=Counter)
    tally: Counter[str] = field(default_factory=Counter)


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

    Raises TemplateError for the first record that cannot be rendered, where the recipe says so.
    """
    arguments = {**params(recipe), "tokenizer": str(inputs["tokenizer"].folder)}
    held_out = {
        **arguments,
        "fim": {**arguments["fim"], "fim_rate": 0.0},
        "template": {**arguments["template"], "system_dropout": 0.0},
    }
    jobs = [Job(shard.file, (path,), shard.split) for shard, path in inputs["split"].paths()]
    train = work.map(format_shard, [job for job in jobs if job.split == "train"], arguments)
    rest = work.map(format_shard, [job for job in jobs if job.split != "train"], held_out)
    return Built((*train, *rest), _report((*train, *rest)))


def format_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Render one Parquet shard of records into one of pieces."""
    folder = Path(params["tokenizer"])
    shard = _Shard(
        params,
        load_tokenizer(folder),
        get_template(Settings(**params["template"]), folder),
        Fim(**params["fim"]),
        cuts_turns=params["truncation"] != "drop",
    )
    counts = Counts()
    with pq.ParquetWriter(
        output, FORMAT_SCHEMA, compression="zstd", compression_level=1, write_page_checksum=True
    ) as writer:
        for records in in_batches(read_rows(inputs[0]), _characters):
            groups = _format_records(records, shard)
            rows = [row for group in groups for row in group]
            writer.write_table(pa.Table.from_pylist(rows, schema=FORMAT_SCHEMA))
            used = sum(bool(group) for group in groups)
            counts += Counts(rows_in=len(records), rows_out=len(rows), used=used)
    counts += Counts(dropped=dict(shard.drops.counts))
    extra = {
        "records": counts.rows_in,
        "rows": counts.rows_out,
        "cut_files": shard.tally["cut_files"],
        "fragments": shard.tally["fragments"],
        "fim": {order: shard.orders[order] for order in ("none", "psm", "spm")},
        "fim_did_not_fit": shard.tally["fim_did_not_fit"],
    }
    return Outcome(counts, rejects=tuple(shard.drops.samples), extra=extra)


def _characters(record: Row) -> int:
    turns = (turn["content"] for turn in record["messages"] or ())
    return sum(len(text or "") for text in (record["text"], record["completion"], *turns))


def _format_records(records: Sequence[Row], shard: _Shard) -> list[list[Row]]:
    """Return the rows of each record, none for a dropped one."""
    code = iter(_format_code([record for record in records if record["text"] is not None], shard))
    return [
        _format_pair(record, shard) if record["text"] is None else next(code) for record in records
    ]


def _format_pair(record: Row, shard: _Shard) -> list[Row]:
    try:
        if not shard.cuts_turns:
            return [_row(record, 0, "none", shard.template.render(record))]
        parts = shard.template.render_parts(record)
    except Unrenderable as error:
        if shard.params["template"]["bad_records"] == "error":
            raise TemplateError(
                f"{error} (template.bad_records: drop leaves such records out and counts them)"
            ) from error
        shard.drops.add(record["id"], f"template:{error.why}", str(error))
        return []
    row = _row(record, 0, "none", [piece for part in parts for piece in part])
    return [{**row, "parts": [len(part) for part in parts]}]


def _format_code(records: Sequence[Row], shard: _Shard) -> list[list[Row]]:
    """Return the rows of each record of code: one for every fragment."""
    files = [(_drawn_as(record), record["text"]) for record in records]
    groups = split_files(shard.tokenizer, files, shard.params["block_size"], shard.fim)
    return [
        _format_file(record, fragments, shard)
        for record, fragments in zip(records, groups, strict=True)
    ]


def _drawn_as(record: Row) -> str:
    """Return the name that decides how code is permuted: a copy of a record is drawn anew."""
    if '"copy":' not in (record["meta"] or ""):
        return str(record["id"])
    return f"{record['id']}#{json.loads(record['meta']).get('copy', 0)}"


def _format_file(record: Row, fragments: Sequence[Fragment], shard: _Shard) -> list[Row]:
    if not record["text"].strip():
        shard.drops.add(record["id"], "empty_text", "no code but blanks")
        return []
    if not fragments:
        shard.drops.add(record["id"], "uncuttable", "no cut makes its parts fit a block")
    shard.tally["cut_files"] += len(fragments) > 1
    shard.tally["fragments"] += len(fragments)
    for fragment in fragments:
        shard.orders[fragment.draw.order] += 1
        shard.tally["fim_did_not_fit"] += fragment.was_too_long
    return [
        _row(record, part, fragment.draw.order, fragment.pieces)
        for part, fragment in enumerate(fragments)
    ]


def _row(record: Row, part: int, order: str, pieces: Sequence[Piece]) -> Row:
    return {
        "record_id": record["id"],
        "source": record["source"],
        "part": part,
        "fim": order,
        "pieces": [piece._asdict() for piece in pieces],
        "parts": None,
    }


def _report(shards: Sequence[ShardReport]) -> dict[str, Any]:
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
        "dropped": sum((report.counts for report in shards), Counts()).dropped,
    }
