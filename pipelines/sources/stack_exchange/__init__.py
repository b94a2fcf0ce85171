"""Source `stack-exchange`: questions and answers of a site, from a dump or fetched by the API.

Both ways in meet as rows of POST_SCHEMA in partitions by question; from there on joins, selections,
licenses and records are the same. Counts are of posts.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from pipelines.engine import Job, Params, ShardReport, Work
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.settings.sources import StackExchangeSource
from pipelines.sources.fetch import fetched_folder
from pipelines.sources.files import shard_name
from pipelines.sources.raw import Fetched, Origin, Raw, Read, Window, digest_raw
from pipelines.sources.stack_exchange.imports import Imported, import_dump, import_pages
from pipelines.sources.stack_exchange.joins import join_partition
from pipelines.sources.stack_exchange.located import locate_dump, site_of

SELECTIONS = {
    "tags", "since", "until", "select", "top_k", "min_question_score", "min_answer_score",
    "closed_questions", "duplicate_questions", "pairs", "max_pairs",
}  # fmt: skip


def find_problem(source: StackExchangeSource) -> str | None:
    """Say in one sentence why a source cannot be read on this machine, or return None."""
    if source.path is None:
        if source.site:
            return None
        return "name the `site:`, e.g. site: stats.stackexchange.com, or a dump with `path:`"
    path = Path(source.path).expanduser().absolute()
    try:
        locate_dump(path)
    except (SourceError, OSError) as error:
        return str(error)
    if not _site(source) and not source.allow_unlicensed:
        return (
            f"the site of the dump {source.path!r} is not in its name, and attribution needs it: "
            "set `site:`, e.g. site: stats.stackexchange.com, or name the dump's folder like that"
        )
    return None


def _domain(site: str) -> str:
    """Return the host of a site: the API also knows those of stackexchange.com by their prefix."""
    return site if "." in site else f"{site}.stackexchange.com"


def _site(source: StackExchangeSource) -> str:
    """Return the site: a dump that is named after one is of that one; "" where nobody says."""
    named = site_of(Path(source.path).expanduser().absolute()) if source.path else None
    return named or (_domain(source.site) if source.site else "")


def is_remote(source: StackExchangeSource) -> bool:
    """Say whether a source has to be fetched before it is read."""
    return source.path is None


def fetch(source: StackExchangeSource, folder: Path, window: Window) -> Fetched:
    """Bring the pages of the API up to date; SourceError where it cannot be asked."""
    from pipelines.sources.stack_exchange import api_fetch

    return api_fetch.fetch(source, folder, window)


def locate(source: StackExchangeSource) -> Raw:
    """List the files of a dump, or the fetched pages; SourceError where there are none."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    if source.path is not None:
        located = locate_dump(Path(source.path).expanduser().absolute())
        root, names = located.root, located.names
    else:
        from pipelines.sources.stack_exchange.api_fetch import page_names

        root = fetched_folder(source)
        names = tuple(page_names(root))
    site = _site(source)
    url, author = (f"https://{site}", f"users of {site}") if site else (None, None)
    raw = Raw(root, names, Origin("", url=url, author=author))
    revision = source.revision or _digest(raw)[:16]
    return replace(raw, origin=replace(raw.origin, revision=revision))


def _digest(raw: Raw) -> str:
    """Return `digest_raw`, without reading a large dump once more for each time it is asked."""
    stats = [path.stat() for path in raw.paths]
    return _digest_once(raw.root, raw.names, tuple((s.st_size, s.st_mtime_ns) for s in stats))


@lru_cache(maxsize=16)
def _digest_once(root: Path, names: tuple[str, ...], stats: tuple[tuple[int, int], ...]) -> str:
    return digest_raw(Raw(root, names, Origin("")))


def read(source: StackExchangeSource, raw: Raw, work: Work, given: Params) -> Read:
    """Turn posts into shards of records, one for each partition of the questions."""
    if source.path is not None:
        located = locate_dump(Path(source.path).expanduser().absolute())
        imported = import_dump(source.id, located, work)
    else:
        imported = import_pages(source.id, raw, work)
    chosen = source.model_dump(mode="json", include=SELECTIONS)
    params = {
        **given,
        **chosen,
        "site": _site(source),
        "partitions": imported.partitions,
        "names": imported.names is not None,
    }
    reports, skipped = _join(imported, params, work)
    # What the import left out is shown with the first shard: its files do not outlive the stage.
    reports[0] = replace(reports[0], rejects=(*imported.rejects, *reports[0].rejects))
    every = sum((report.counts for report in reports), imported.unread + skipped)
    about = {
        "site": _site(source),
        "posts": every.rows_in,
        "unnamed_authors": sum(report.extra["unnamed"] for report in reports),
        **imported.about,
    }
    return Read(reports, imported.unread + skipped, about)


def _join(imported: Imported, params: Params, work: Work) -> tuple[list[ShardReport], Counts]:
    """Return the shards of records and the counts of posts that a cap left unread."""
    inputs = (*imported.paths, *([imported.names] if imported.names else []))
    jobs = [
        Job(shard_name(params["first"] + number), inputs) for number in range(imported.partitions)
    ]
    if params["limit"] is None:
        return list(work.map(join_partition, jobs, params, runner="processes")), Counts()
    # What a shard may still hold depends on those before it, so a capped source is read in order.
    made: list[ShardReport] = []
    for job in jobs:
        left = params["limit"] - sum(report.shard.rows for report in made)
        if left <= 0:
            break
        made.append(work.one(join_partition, job, {**params, "limit": left}))
    unread = imported.posts - sum(report.counts.rows_in for report in made)
    return made, Counts(rows_in=unread, dropped={"max_records": unread} if unread else {})
