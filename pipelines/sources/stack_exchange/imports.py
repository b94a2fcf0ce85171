"""Brings posts into partitions, from a dump by byte ranges or from pages of the API."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.engine import Job, Outcome, Params, Reject, ShardReport, Work
from pipelines.manifest import Counts
from pipelines.records import Row
from pipelines.sources.raw import Raw
from pipelines.sources.stack_exchange.dump import Chunk, Extent, find_extent, read_range
from pipelines.sources.stack_exchange.joins import piece_number
from pipelines.sources.stack_exchange.located import TABLES, Located
from pipelines.sources.stack_exchange.memory import frugal_memory
from pipelines.sources.stack_exchange.names import write_names
from pipelines.sources.stack_exchange.parsing import COLUMNS, SCORE_LIMIT, parse_post, parse_posts
from pipelines.sources.stack_exchange.partitions import PartitionWriter, count_partitions
from pipelines.sources.stack_exchange.posts import POST_SCHEMA, QUESTION
from pipelines.sources.stack_exchange.rows import BadRow, Line, pick_lines, read_line
from pipelines.sources.stack_exchange.threads import Tally
from pipelines.sources.stack_exchange.unpacking import unpack

RANGE_BYTES = 32 << 20
MAX_RANGES = 256  # every join opens the file of every range
ROWS_AT_A_TIME = 1000
PAGE_RATIO = 4  # pages of the API are stored packed


@dataclass(frozen=True, slots=True)
class Imported:
    """Files of so many partitioned posts, that of names, and the counts of posts left out."""

    paths: tuple[Path, ...]
    posts: int
    partitions: int
    names: Path | None
    unread: Counts
    rejects: tuple[Reject, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)


def import_dump(source_id: str, located: Located, work: Work) -> Imported:
    """Parse a dump into partitions, by ranges of bytes in processes; SourceError where it is none.

    The ranges depend on the size of the file alone, so the result does not depend on workers.
    """
    tables = _unpack_all(source_id, located, work)
    extent = find_extent(tables["Posts"], TABLES["Posts"])
    size = extent.end - extent.start
    partitions = count_partitions(size)
    range_bytes = max(RANGE_BYTES, -(-size // MAX_RANGES))
    jobs = [
        Job(f"{source_id}.posts-{number:05d}.arrow", (tables["Posts"],))
        for number in range(max(1, -(-size // range_bytes)))
    ]
    params = {
        "extent": asdict(extent),
        "range_bytes": range_bytes,
        "partitions": partitions,
        "source": source_id,
    }
    reports = work.map(parse_range, jobs, params, runner="processes")
    names, about = _import_names(source_id, tables, work)
    return Imported(
        tuple(work.path / report.shard.file for report in reports),
        sum(report.counts.used for report in reports),
        partitions,
        names,
        _unread(reports),
        tuple(_place_rejects(located.files["Posts"], extent, reports)),
        about,
    )


def _unread(reports: Sequence[ShardReport]) -> Counts:
    """Return the counts of the posts that no join will see."""
    counts = sum((report.counts for report in reports), Counts())
    left = counts.rows_in - counts.used
    return Counts(rows_in=left, dropped=counts.dropped, quarantined=counts.quarantined)


def _place_rejects(file: str, extent: Extent, reports: Sequence[ShardReport]) -> Iterator[Reject]:
    """Yield the rejects with their line in the whole file: a range only knows those in itself."""
    before = extent.lines
    for report in reports:
        for reject in report.rejects:
            source, line, offset = reject["id"].rsplit(":", 2)
            number = before + int(line) + 1
            detail = f"{file}, line {number}, byte {offset}: {reject['detail']}"
            yield {**reject, "id": f"{source}:{file}:{number}", "detail": detail}
        before += report.extra["lines"]


def _unpack_all(source_id: str, located: Located, work: Work) -> dict[str, Path]:
    """Return the plain file of every table, unpacking those that are packed."""
    plain: dict[str, Path] = {}
    unpacked = {table: f"{source_id}.{table}.xml" for table in TABLES}
    for table, name in located.files.items():
        packed = located.root / name
        if name.endswith(".xml"):
            plain[table] = packed
            continue
        # The one archive of a site holds all tables: they come out in one pass.
        alone = name.endswith((".gz", f"{table}.7z"))
        others = {} if alone else {t: unpacked[t] for t in TABLES if t not in located.files}
        params = {"table": table, "others": others}
        work.one(unpack, Job(unpacked[table], (packed,)), params)
        plain[table] = work.path / unpacked[table]
        found = {other: work.path / file for other, file in others.items()}
        plain.update({other: path for other, path in found.items() if path.exists()})
    return plain


def _import_names(
    source_id: str, tables: Mapping[str, Path], work: Work
) -> tuple[Path | None, dict[str, Any]]:
    present = [table for table in ("Users", "PostLinks") if table in tables]
    if not present:
        return None, {}
    inputs = tuple(tables[table] for table in present)
    params = {"tables": [TABLES[table] for table in present]}
    report = work.one(write_names, Job(f"{source_id}.names.sqlite", inputs), params)
    return work.path / report.shard.file, report.extra


@frugal_memory()
def parse_range(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the posts of one range of Posts.xml into partitions; rows count posts of any type.

    The number in the name of `output` says which range; `params` holds extent, range_bytes,
    partitions and source. The ids of rejects are SOURCE:LINE:BYTE, lines counted in the range.
    """
    [path] = inputs
    extent = Extent(**params["extent"])
    first = extent.start + piece_number(output) * params["range_bytes"]
    last = first + params["range_bytes"]
    tally = Tally()
    num_lines = 0
    with PartitionWriter(output, params["partitions"]) as writer:
        for chunk in read_range(path, extent, first, last, tuple(COLUMNS.values())):
            parsed = parse_posts(chunk.plain)
            tally.dropped.update(parsed.dropped)
            tally.used += parsed.batch.num_rows
            writer.add(parsed.batch)
            wrong = pick_lines(chunk.content, chunk.plain.lines[parsed.odd])
            rows = list(_parse_lines([*chunk.odd, *wrong], chunk, params["source"], tally))
            if rows:
                writer.add(pa.RecordBatch.from_pylist(rows, schema=POST_SCHEMA))
            num_lines += chunk.num_lines
    return Outcome(_counts(tally), rejects=tally.rejects(), extra={"lines": num_lines})


def _counts(tally: Tally) -> Counts:
    lost = tally.dropped.total() + tally.quarantined.total()
    return Counts(
        rows_in=tally.used + lost,
        rows_out=tally.used,
        used=tally.used,
        dropped=dict(sorted(tally.dropped.items())),
        quarantined=dict(sorted(tally.quarantined.items())),
    )


def _parse_lines(
    lines: Sequence[Line], chunk: Chunk, source_id: str, tally: Tally
) -> Iterator[Row]:
    """Yield the posts of odd lines, one by one; a line that is no row counts as one."""
    for line in lines:
        where = f"{source_id}:{chunk.line + line.number}:{chunk.offset + line.offset}"
        try:
            found = read_line(line.content)
        except BadRow as error:
            tally.quarantine(where, error.reason, str(error))
            continue
        for attributes in found:
            try:
                post = parse_post(attributes)
            except BadRow as error:
                tally.quarantine(where, error.reason, str(error))
                continue
            if isinstance(post, str):
                tally.drop(post)
            else:
                tally.used += 1
                yield post


def import_pages(source_id: str, raw: Raw, work: Work) -> Imported:
    """Bring the posts of a fetched folder into partitions, in this process."""
    size = sum(path.stat().st_size for path in raw.paths)
    partitions = count_partitions(PAGE_RATIO * size)
    job = Job(f"{source_id}.posts-00000.arrow", raw.paths)
    params = {"root": str(raw.root), "partitions": partitions, "source": source_id}
    report = work.one(parse_pages, job, params)
    unread = _unread([report])
    paths = (work.path / report.shard.file,)
    return Imported(paths, report.counts.used, partitions, None, unread, report.rejects)


@frugal_memory()
def parse_pages(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the posts in pages of the API into partitions; rows count posts."""
    from pipelines.sources.stack_exchange.api_items import read_posts

    tally = Tally()

    def quarantine(name: str, reason: str, detail: str) -> None:
        tally.quarantine(f"{params['source']}:{name}", reason, detail)

    held: list[Row] = []
    with PartitionWriter(output, params["partitions"]) as writer:
        for post in read_posts(Path(params["root"]), quarantine):
            reason = _find_gap(post)
            if reason:
                quarantine(str(post["id"]), reason, f"of post {post['id']}")
                continue
            tally.used += 1
            held.append(post)
            if len(held) == ROWS_AT_A_TIME:
                writer.add(pa.RecordBatch.from_pylist(held, schema=POST_SCHEMA))
                held = []
        writer.add(pa.RecordBatch.from_pylist(held, schema=POST_SCHEMA))
    return Outcome(_counts(tally), rejects=tally.rejects())


def _find_gap(post: Row) -> str | None:
    """Return what a post of the API lacks to be one of a dump, or None."""
    if abs(post["score"]) >= SCORE_LIMIT:
        return "bad_Score"
    needed = "title" if post["type"] == QUESTION else "parent"
    return f"missing_{COLUMNS[needed]}" if post[needed] is None else None
