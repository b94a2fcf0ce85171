"""Stage `decontaminate`: records that hold the texts of benchmarks go, from every split.

What a model has seen in training cannot measure it, and what a benchmark publishes must not be in
the held-out rows either. Prompts, all turns of a dialogue and plain text are searched alike. The
side file hits.parquet shows each hit with both texts; the joined groups of deduplication are passed
on for the splits. Without lists in the recipe
(`curation.decontaminate.against`) every record stays.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.curate.benchmarks import digest_lists, find_lists, read_items
from pipelines.curate.contamination import HIT_SCHEMA, find_hits, index_items
from pipelines.curate.redact_text import mask
from pipelines.curate.rows import sum_sources
from pipelines.curate.selection import drop_rows
from pipelines.engine import Built, Input, Job, Outcome, Params, Work
from pipelines.recipe import Recipe

DEPENDS = ("numpy", "pyarrow")
HITS = "hits.parquet"


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the settings and the digests of the lists; SourceError where one is missing."""
    settings = recipe.curation.decontaminate
    if not settings.against:
        return {"against": []}
    return {**settings.model_dump(mode="json"), "against": digest_lists(settings.against)}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Write each shard without the records that hold a benchmark's text."""
    shards = inputs["dedup"].paths()
    settings = recipe.curation.decontaminate
    side = work.keep(HITS)
    items, grams = index_items(
        (item for path in find_lists(settings.against) for item in read_items(path)),
        settings.ngram,
        settings.min_words,
    )
    index = (work.path / "items.parquet", work.path / "grams.parquet")
    for table, path in zip((items, grams), index, strict=True):
        pq.write_table(table, path)
    found = HIT_SCHEMA.empty_table()
    if len(items):
        jobs = [
            Job(f"hits-{number:05d}.parquet", (path, *index))
            for number, (_, path) in enumerate(shards)
        ]
        reports = work.map(find_hits, jobs, {"coverage": settings.coverage})
        tables = [pq.read_table(work.path / report.shard.file) for report in reports]
        found = pa.concat_tables([found, *tables])
    pq.write_table(found, side)
    made = work.map(drop_hits, [Job(shard.file, (path, side)) for shard, path in shards], {})
    benchmarks = pc.value_counts(items["benchmark"]).to_pylist()
    report = {
        "texts": {each["values"]: each["counts"] for each in benchmarks},
        "problems_found": len(found.group_by(["benchmark", "problem"]).aggregate([])),
        "sources": sum_sources(made),
    }
    return Built(made, report)


def drop_hits(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy a shard (first input) without the records with hits (second); the best hit tells why."""
    shard, hits = inputs
    drops: dict[int, tuple[str, str]] = {}
    found = pq.read_table(hits, filters=[("file", "=", shard.name)], use_threads=False)
    order = [("row", "ascending"), ("coverage", "descending"), ("ngrams", "descending")]
    for hit in found.sort_by(order).to_pylist():
        drops.setdefault(hit["row"], (f"benchmark:{hit['benchmark']}", explain(hit)))
    return drop_rows(shard, output, drops)


def explain(hit: Mapping[str, Any]) -> str:
    """Return what was found where, with the beginnings of both texts."""
    theirs, ours = mask(hit["benchmark_text"]), mask(hit["record_text"])
    share = f"{hit['coverage']:.0%} of {hit['ngrams']} n-grams"
    return f"{hit['problem']} {hit['field']} ({share}): {theirs!r} is in {ours!r}"
