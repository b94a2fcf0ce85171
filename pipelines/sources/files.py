"""Reads a source whose raw files can be read each by itself, a number of them per shard."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.engine import Job, Outcome, Params, ShardReport, Work
from pipelines.manifest import Counts
from pipelines.sources.raw import Raw, Read

FILES_PER_SHARD = 50

Extract = Callable[[Sequence[Path], Path, Params], Outcome]


def shard_name(number: int) -> str:
    """Return the file name of a shard of records; numbers run on from source to source."""
    return f"records-{number:05d}.parquet"


def read_files(
    extract: Extract, raw: Raw, work: Work, given: Params, *, per_shard: int = FILES_PER_SHARD
) -> Read:
    """Run `extract` over the raw files in processes; files beyond `max_records` stay unread.

    `given` has first (number of the first shard) and limit (records at most, or None).
    """
    paths = raw.paths
    jobs = [
        Job(shard_name(given["first"] + number), paths[start : start + per_shard])
        for number, start in enumerate(range(0, len(paths), per_shard))
    ]
    return map_capped(extract, jobs, work, given, lambda left: sum(len(job.inputs) for job in left))


def map_capped(
    extract: Extract,
    jobs: Sequence[Job],
    work: Work,
    given: Params,
    count_rows: Callable[[Sequence[Job]], int],
) -> Read:
    """Make the shards of records in processes; under a cap one by one, until it is reached.

    `count_rows` tells how many rows the jobs hold that the cap leaves undone.
    """
    if given["limit"] is None:
        return Read(list(work.map(extract, jobs, given, runner="processes")))
    # What a shard may still hold depends on those before it, so a capped source is read in order.
    made: list[ShardReport] = []
    for job in jobs:
        left = given["limit"] - sum(report.shard.rows for report in made)
        if left <= 0:
            break
        made.append(work.one(extract, job, {**given, "limit": left}))
    unread = count_rows(jobs[len(made) :])
    return Read(made, Counts(rows_in=unread, dropped={"max_records": unread} if unread else {}))
