"""Source `oasst`: dialogues out of OpenAssistant message trees, from files or a hub dataset.

Rows in are messages. A first pass turns every file into messages of one layout, then ids alone
tell which make a tree, and whole trees become dialogues, shard by shard. `group` is the tree.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.engine import SAMPLES_PER_REASON, Job, Params, Reject, ShardReport, Work
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.settings.sources import OasstSource
from pipelines.sources.dataset.layout import list_files
from pipelines.sources.files import shard_name
from pipelines.sources.oasst.dialogues import write_dialogues
from pipelines.sources.oasst.hub import fetch_dataset, fetched_files
from pipelines.sources.oasst.messages import scan_file
from pipelines.sources.oasst.rows import SUFFIXES
from pipelines.sources.oasst.trees import Left, Part, plan_parts
from pipelines.sources.raw import (
    Fetched,
    Origin,
    Raw,
    Read,
    Window,
    digest_raw,
    glob_pattern,
)

SETTINGS = {
    "mode",
    "top_k",
    "keep_user_leaf",
    "pairs",
    "tree_states",
    "allow_synthetic",
    "allow_failed_review",
    "max_labels",
    "min_quality",
    "languages",
}
UNKNOWN_LICENSE = "unknown"
HUB = "https://huggingface.co/datasets/"


def find_problem(source: OasstSource) -> str | None:
    """Say in one sentence why a source cannot be read on this machine, or return None."""
    if source.path is None:
        if source.dataset is None:
            return "name a hub `dataset:`, e.g. OpenAssistant/oasst1, or a local `path:`"
        return None
    path = Path(source.path).expanduser()
    if path.is_dir():
        return None
    expected = f"give a folder or a file ({', '.join(SUFFIXES)})"
    if not path.is_file():
        return f"path {source.path!r} is not here; {expected}"
    return None if path.name.endswith(SUFFIXES) else f"path {source.path!r}: {expected}"


def is_remote(source: OasstSource) -> bool:
    """Say whether a source has to be fetched before it is read."""
    return source.path is None


def fetch(source: OasstSource, folder: Path, window: Window) -> Fetched:
    """Bring the dataset's files up to date; a dataset has no dates, so `window` has no effect."""
    return fetch_dataset(source, folder)


def locate(source: OasstSource) -> Raw:
    """List the source's files with their origin; SourceError where there are none."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    page = f"{HUB}{source.dataset}" if source.dataset else None
    if source.path is None:
        root, names, revision = fetched_files(source)
        return Raw(root, names, Origin(revision, url=page))
    path = Path(source.path).expanduser().absolute()
    if path.is_file():
        root, names = path.parent, (path.name,)
    else:
        root, names = path, select_files(list(list_files(path)), source.files)
    if not names:
        raise SourceError(
            f"source {source.id!r}: no files in {source.path} that end in {', '.join(SUFFIXES)}"
            + (f" and match {list(source.files)}" if source.files else "")
        )
    raw = Raw(root, names, Origin("", url=page))
    return replace(
        raw, origin=replace(raw.origin, revision=source.revision or digest_raw(raw)[:16])
    )


def select_files(names: Sequence[str], globs: Sequence[str]) -> tuple[str, ...]:
    """Return the readable files, those that match a glob where there are globs, sorted."""
    patterns = [glob_pattern(glob) for glob in globs]
    return tuple(
        sorted(
            name
            for name in names
            if name.endswith(SUFFIXES)
            and (not patterns or any(pattern.fullmatch(name) for pattern in patterns))
        )
    )


def read(source: OasstSource, raw: Raw, work: Work, given: Params) -> Read:
    """Turn the files into shards of dialogues; SourceError where no file holds a message."""
    scan = {"root": given["root"], "id": given["id"]}
    jobs = [
        Job(f"messages-{given['first']:05d}-{number:05d}.parquet", (path,))
        for number, path in enumerate(raw.paths)
    ]
    scans = work.map(scan_file, jobs, scan, runner="processes")
    _check_scanned(source, raw, scans)
    left = Left(given["id"])
    scanned = [work.path / job.file for job in jobs]
    parts = plan_parts(scanned, work.path, left)
    params = {
        **given,
        **source.model_dump(mode="json", include=SETTINGS),
        "license": _license(source, raw, given),
    }
    made, unread = _write_parts(parts, scanned, work, params)
    bad = Counts()
    for report in scans:
        quarantined = sum(report.counts.quarantined.values())
        bad += Counts(rows_in=quarantined, quarantined=report.counts.quarantined)
    dropped = {"max_records": unread} if unread else {}
    beyond = Counts(rows_in=unread, dropped=dropped)
    rejects = _samples([*(row for report in scans for row in report.rejects), *left.rejects])
    # The samples of what is in no shard travel with the first one.
    made[0] = replace(made[0], rejects=(*rejects, *made[0].rejects))
    about = {
        "files": len(raw.names),
        "mode": source.mode,
        "about_code": sum(report.extra["about_code"] for report in made),
    }
    return Read(made, bad + left.counts() + beyond, about)


def _write_parts(
    parts: Sequence[Part], scanned: Sequence[Path], work: Work, params: Params
) -> tuple[list[ShardReport], int]:
    """Return the shards and the messages of the parts beyond `max_records`, which stay unread."""
    jobs = [
        Job(shard_name(params["first"] + number), (part.path, *scanned))
        for number, part in enumerate(parts)
    ]
    if params["limit"] is None:
        return list(work.map(write_dialogues, jobs, params, runner="processes")), 0
    made: list[ShardReport] = []
    for job in jobs:
        room = params["limit"] - sum(report.shard.rows for report in made)
        if room <= 0:
            break
        made.append(work.one(write_dialogues, job, {**params, "limit": room}))
    return made, sum(part.messages for part in parts[len(made) :])


def _check_scanned(source: OasstSource, raw: Raw, scans: Sequence[ShardReport]) -> None:
    if any(report.counts.used for report in scans):
        return
    first = next((row for report in scans for row in report.rejects), None)
    cause = f"; the first of the others is {first['id']}: {first['detail']}" if first else ""
    raise SourceError(
        f"source {source.id!r}: no OpenAssistant message in {', '.join(raw.names[:5])}{cause}; "
        "expected trees or messages with message_id, parent_id, role and text"
    )


def _license(source: OasstSource, raw: Raw, given: Params) -> str:
    if given["license"]:
        return str(given["license"])
    if given["allow_unlicensed"]:
        return UNKNOWN_LICENSE
    raise SourceError(
        f"source {source.id!r}: no license found for {raw.names[0]}; say which one it has with "
        f"{given['where']}.license, e.g. license: Apache-2.0, or set "
        f"{given['where']}.allow_unlicensed: true"
    )


def _samples(rejects: Sequence[Reject]) -> list[Reject]:
    found: dict[str, list[Reject]] = {}
    for reject in rejects:
        found.setdefault(reject["reason"], []).append(reject)
    return [row for rows in found.values() for row in rows[:SAMPLES_PER_REASON]]
