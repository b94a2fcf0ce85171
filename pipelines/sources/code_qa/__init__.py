"""Source `code-qa`: questions on code with their answers, from files or written by a model.

Rows in are rows of the files. A source without a `path` is remote: its fetch sends functions of a
repository to a chat endpoint and keeps every reply, so that none is paid for twice.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.engine import Job, Params, ShardReport, Work
from pipelines.errors import SourceError
from pipelines.settings.sources import CodeQaSource, DatasetSource
from pipelines.sources import dataset
from pipelines.sources.code_qa.generate import PAIRS, generate, generate_problem
from pipelines.sources.code_qa.pairs import NAMES, write_pairs
from pipelines.sources.dataset.layout import ARROW, LINES, PARQUET, kind_of
from pipelines.sources.dataset.spool import needs_spool, spool
from pipelines.sources.dataset.units import Unit, count_lines, plan_units
from pipelines.sources.fetch import fetched_folder
from pipelines.sources.files import map_capped, shard_name
from pipelines.sources.raw import Fetched, Origin, Raw, Read, Window, digest_raw
from pipelines.store import write_atomic


def find_problem(source: CodeQaSource) -> str | None:
    """Say in one sentence why a source cannot be read on this machine, or return None."""
    if source.path is None:
        return generate_problem(source)
    exists = Path(source.path).expanduser().exists()
    return None if exists else f"path {source.path!r} does not exist; give a file or a folder"


def is_remote(source: CodeQaSource) -> bool:
    """Say whether a source has to be fetched before it is read."""
    return source.path is None


def fetch(source: CodeQaSource, folder: Path, window: Window) -> Fetched:
    """Ask the model about the functions that have no answers yet; the window means nothing here."""
    return generate(source, folder)


def locate(source: CodeQaSource) -> Raw:
    """List the source's files with their origin; SourceError where there are none."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    if source.path is not None:
        files = DatasetSource(
            type="dataset",
            id=source.id,
            path=source.path,
            files=source.files,
            revision=source.revision,
        )
        return dataset.locate(files)
    raw = Raw(fetched_folder(source), (PAIRS,), Origin(""))
    return replace(raw, origin=Origin(source.revision or digest_raw(raw)[:16]))


def read(source: CodeQaSource, raw: Raw, work: Work, given: Params) -> Read:
    """Turn the rows into shards of pairs; SourceError for a file in which no row is one."""
    prefix = given["where"].replace(".", "-")
    plans = [
        {"file": name, "unit": asdict(unit)}
        for name, path, kind in _open_files(raw, work, prefix)
        for unit in plan_units(path, kind)
    ]
    paths = _write_plans(plans, work, prefix)
    params = {
        **given,
        "columns": source.columns.model_dump(),
        "language": source.language,
    }
    made = _run(paths, plans, work, params)
    _check_used(source, plans, made.reports)
    rows = sum((report.counts.rows_in for report in made.reports), made.unread.rows_in)
    if not rows:
        raise SourceError(f"source {source.id!r}: no rows in {', '.join(raw.names[:5])}")
    about = {"files": len(raw.names), "rows": rows, "generated": source.path is None}
    return replace(made, about=about)


def _open_files(raw: Raw, work: Work, prefix: str) -> list[tuple[str, Path, str]]:
    """Return (name, file to read, kind); what cannot be read from the middle becomes lines."""
    kinds = {name: kind_of(name) or LINES for name in raw.names}
    paths = dict(zip(raw.names, raw.paths, strict=True))
    texts = [
        name
        for name, kind in kinds.items()
        if kind not in (PARQUET, ARROW) and needs_spool(paths[name], kind)
    ]
    jobs = [Job(f"{prefix}-rows-{n:05d}.jsonl", (paths[name],)) for n, name in enumerate(texts)]
    asked = {"kinds": {str(paths[name]): kinds[name] for name in texts}}
    reports = work.map(spool, jobs, asked, runner="processes")
    spooled = {
        name: work.path / report.shard.file for name, report in zip(texts, reports, strict=True)
    }
    return [
        (name, spooled.get(name, paths[name]), kind if kind in (PARQUET, ARROW) else LINES)
        for name, kind in kinds.items()
    ]


def _write_plans(plans: list[dict[str, Any]], work: Work, prefix: str) -> list[Path]:
    """Write each unit's plan to a file; units of lines learn where their lines start."""
    paths = [work.path / f"{prefix}-unit-{number:05d}.json" for number in range(len(plans))]
    for path, plan in zip(paths, plans, strict=True):
        write_atomic(path, json.dumps(plan))
    lines = [number for number, plan in enumerate(plans) if plan["unit"]["kind"] == LINES]
    jobs = [Job(f"{prefix}-count-{number:05d}.txt", (paths[number],)) for number in lines]
    reports = work.map(count_lines, jobs, {}, runner="processes")
    first: Counter[str] = Counter()
    for number, report in zip(lines, reports, strict=True):
        unit = plans[number]["unit"]
        unit["first"] = first[unit["path"]] + 1
        unit["rows"] = report.extra["rows"]
        first[unit["path"]] += report.extra["lines"]
        write_atomic(paths[number], json.dumps(plans[number]))
    return paths


def _run(
    paths: Sequence[Path], plans: Sequence[dict[str, Any]], work: Work, params: Params
) -> Read:
    jobs = [Job(shard_name(params["first"] + n), (path,)) for n, path in enumerate(paths)]

    def count_rows(left: Sequence[Job]) -> int:
        return sum(Unit(**plan["unit"]).rows or 0 for plan in plans[len(plans) - len(left) :])

    return map_capped(write_pairs, jobs, work, params, count_rows)


def _check_used(
    source: CodeQaSource, plans: Sequence[dict[str, Any]], reports: Sequence[ShardReport]
) -> None:
    """Raise SourceError for a file of rows of which none could be used for its columns."""
    used: Counter[str] = Counter()
    missing: dict[str, str] = {}
    for plan, report in zip(plans, reports, strict=False):
        used[plan["file"]] += report.counts.used
        found = (r for r in report.rejects if r["reason"].startswith("missing_"))
        missing.setdefault(plan["file"], next((r["detail"] for r in found), ""))
    for file, detail in missing.items():
        if detail and not used[file]:
            expected = ", ".join(f"{part} ({' or '.join(NAMES[part])})" for part in NAMES)
            raise SourceError(
                f"source {source.id!r}: {file}: no row has code, question and answer ({detail}); "
                f"expected {expected}; name yours with columns: {{code: ..., question: ..., "
                "answer: ...}"
            )
