"""Stage `collect`: the raw input of every source becomes shards of canonical records.

The key holds a digest over all raw paths and bytes: changed input is collected again, input that
only moved is not. Rows in are files, rows out are records.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pipelines.engine import Built, Input, Job, Params, ShardReport, Work
from pipelines.manifest import Counts
from pipelines.recipe import Recipe, Source
from pipelines.sources import SourceModule, get_source
from pipelines.sources.raw import Raw, digest_raw

DEPENDS = ("pyarrow",)
FILES_PER_SHARD = 50


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the sources with the digest of their raw input; SourceError where there is none."""
    found = []
    for source in recipe.sources:
        raw = get_source(source).locate(source)
        # Where the input lies does not decide what it holds.
        settings = source.model_dump(mode="json", exclude={"path"})
        found.append({**settings, "origin": asdict(raw.origin), "digest": digest_raw(raw)})
    return {"sources": found, "max_file_bytes": recipe.curation.max_file_bytes}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Read every source; the report names revision, license, files and records of each."""
    reports: list[ShardReport] = []
    unread = Counts()
    about = {}
    for index, source in enumerate(recipe.sources):
        module = get_source(source)
        raw = module.locate(source)
        given = {
            "root": str(raw.root),
            "id": source.id,
            "where": f"sources.{index}",
            "license": source.license,
            "allow_unlicensed": source.allow_unlicensed,
            "origin": asdict(raw.origin),
            "max_bytes": recipe.curation.max_file_bytes,
            "limit": None,
        }
        jobs = list(_jobs(raw, len(reports)))
        made = _extract(module, jobs, given, source.max_records, work)
        left = len(raw.names) - sum(report.counts.rows_in for report in made)
        if left:
            unread += Counts(rows_in=left, dropped={"max_records": left})
        reports.extend(made)
        about[source.id] = _describe(source, raw, made)
    counts = sum((report.counts for report in reports), unread)
    return Built(tuple(reports), {"sources": about}, counts)


def _jobs(raw: Raw, first: int) -> Iterator[Job]:
    paths = raw.paths
    for number, start in enumerate(range(0, len(paths), FILES_PER_SHARD), first):
        yield Job(f"records-{number:05d}.parquet", paths[start : start + FILES_PER_SHARD])


def _extract(
    module: SourceModule, jobs: list[Job], given: Params, max_records: int | None, work: Work
) -> list[ShardReport]:
    if max_records is None:
        return list(work.map(module.extract, jobs, given, runner="processes"))
    # What a shard may still hold depends on those before it, so a capped source is read in order.
    made: list[ShardReport] = []
    for job in jobs:
        left = max_records - sum(report.shard.rows for report in made)
        if left <= 0:
            break
        made.append(work.one(module.extract, job, {**given, "limit": left}))
    return made


def _describe(source: Source, raw: Raw, made: list[ShardReport]) -> dict[str, Any]:
    licenses: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for report in made:
        licenses.update(report.extra["licenses"])
        skipped.update(report.extra["skipped"])
    return {
        "type": source.type,
        "revision": raw.origin.revision,
        "url": raw.origin.url,
        "author": raw.origin.author,
        "license": licenses.most_common(1)[0][0] if licenses else None,
        "licenses": dict(sorted(licenses.items())),
        "files": len(raw.names),
        "records": sum(report.shard.rows for report in made),
        "skipped_functions": dict(sorted(skipped.items())),
    }
