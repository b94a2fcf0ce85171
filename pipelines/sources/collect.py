"""Stage `collect`: the raw input of every source becomes shards of canonical records.

The key holds a digest over all raw paths and bytes and one over the code that reads them: changed
input is collected again, input that only moved is not. Rows in are what a source counts (files,
rows, messages), rows out are records.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.engine import Built, Input, ShardReport, Work
from pipelines.fingerprint import code_digest
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.settings.sources import Source
from pipelines.sources import MODULES, get_source
from pipelines.sources.raw import Raw, Read, digest_raw

DEPENDS = ("pyarrow",)


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the sources with the digest of their raw input; SourceError where there is none."""
    found = []
    for source in recipe.sources:
        raw = get_source(source).locate(source)
        # Neither where the input lies nor how often it is trained on decides what is read.
        settings = source.model_dump(mode="json", exclude={"path", "weight", "epochs"})
        read = {"origin": asdict(raw.origin), "digest": digest_raw(raw)}
        found.append({**settings, **read, "code": code_digest(MODULES[source.type])})
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
            "openai_outputs": source.openai_outputs,
            "origin": asdict(raw.origin),
            "max_bytes": recipe.curation.max_file_bytes,
            "limit": source.max_records,
            "first": len(reports),
        }
        made = module.read(source, raw, work, given)
        unread += made.unread
        reports.extend(made.reports)
        about[source.id] = _describe(source, raw, made)
    counts = sum((report.counts for report in reports), unread)
    return Built(tuple(reports), {"sources": about}, counts)


def _describe(source: Source, raw: Raw, made: Read) -> dict[str, Any]:
    licenses: Counter[str] = Counter()
    for report in made.reports:
        licenses.update(report.extra["licenses"])
    return {
        "type": source.type,
        "revision": raw.origin.revision,
        "url": raw.origin.url,
        "author": raw.origin.author,
        "license": licenses.most_common(1)[0][0] if licenses else None,
        "licenses": dict(sorted(licenses.items())),
        "openai_outputs": source.openai_outputs,
        "records": sum(report.shard.rows for report in made.reports),
        **made.about,
    }
