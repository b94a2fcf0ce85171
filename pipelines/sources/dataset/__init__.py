"""Source `dataset`: rows of JSON, CSV, Parquet or Arrow files; `code-alpaca` and `gpteacher` too.

A file that can be read from the middle is cut into units, any other is turned into JSON lines
first; each unit becomes one shard of records. What a unit is depends on the file alone, so the
result does not depend on the number of workers.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.engine import Job, Params, Work
from pipelines.errors import SourceError
from pipelines.settings.sources import DatasetSource
from pipelines.sources.dataset.extract import extract
from pipelines.sources.dataset.hub import FILES, fetch_github, fetch_hub, revision_problem
from pipelines.sources.dataset.layout import (
    ARROW,
    KINDS,
    LINES,
    PARQUET,
    card_license,
    check_parts,
    check_saved,
    kind_of,
    list_files,
    select_files,
    split_of,
)
from pipelines.sources.dataset.schemas import Rows, Schema, detect
from pipelines.sources.dataset.spool import needs_spool, spool
from pipelines.sources.dataset.units import Unit, column_names, count_lines, plan_units, read_unit
from pipelines.sources.fetch import fetched_folder
from pipelines.sources.files import map_capped, shard_name
from pipelines.sources.licenses import folder_licenses, nearest_license
from pipelines.sources.raw import Fetched, Origin, Raw, Read, Window, digest_raw
from pipelines.store import write_atomic

HEAD_ROWS = 200
HEAD_TRIES = 2000
# A cap takes what is trained on first.
SPLIT_ORDER = ("train", None, "validation", "test")


@dataclass(frozen=True, slots=True)
class _File:
    """A data file: its name below the root, the file to read rows from, and its first rows."""

    name: str
    path: Path
    kind: str
    split: str | None


def find_problem(source: DatasetSource) -> str | None:
    """Say in one sentence why a source cannot be read on this machine, or return None."""
    if source.path is not None:
        exists = Path(source.path).expanduser().exists()
        return None if exists else f"path {source.path!r} does not exist; give a file or a folder"
    if source.dataset and source.repository:
        return "both `dataset` (hub) and `repository` (GitHub) are given; keep one"
    if source.dataset:
        return _name_problem("dataset", source.dataset) or revision_problem(
            f"dataset {source.dataset}", source.revision
        )
    if not source.repository:
        return "nothing to read; name a local `path:`, a hub `dataset:` or a `repository:`"
    if not source.files or any(mark in name for name in source.files for mark in "*?"):
        return "a `repository` needs `files:`, the paths of its data files (no globs)"
    if any(name.startswith("/") or ".." in name.split("/") for name in source.files):
        return f"files {list(source.files)} lead out of the repository"
    return _name_problem("repository", source.repository) or revision_problem(
        f"repository {source.repository}", source.revision
    )


def _name_problem(key: str, name: str) -> str | None:
    parts = name.split("/")
    if len(parts) == 2 and all(part.strip(". ") and "\\" not in part for part in parts):
        return None
    return f"{key} {name!r} is no OWNER/NAME"


def is_remote(source: DatasetSource) -> bool:
    """Say whether a source has to be fetched before it is read."""
    return source.path is None


def fetch(source: DatasetSource, folder: Path, window: Window) -> Fetched:
    """Bring the data files of a pinned revision into a folder; the window means nothing here."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    if source.dataset:
        return fetch_hub(source.dataset, source.revision or "", source.files, folder)
    return fetch_github(
        source.repository or "", source.revision or "", source.files, source.sha256, folder
    )


def locate(source: DatasetSource) -> Raw:
    """List the source's data files with their origin; SourceError where there are none."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    given = Path(source.path).expanduser().absolute() if source.path else None
    root = given or fetched_folder(source) / FILES
    licenses: dict[str, str] = {}
    names: tuple[str, ...]
    if root.is_file():
        root, names = root.parent, (root.name,)
        if kind_of(names[0]) is None:
            raise SourceError(
                f"source {source.id!r}: {root / names[0]} is no data file by its name "
                f"(known: {', '.join(KINDS)}, compressed or not)"
            )
    else:
        found = list(list_files(root))
        names = _select(source, select_files(found, source.files, source.exclude))
        check_parts(root, names)
        check_saved(root, found)
        named = card_license(root)
        licenses = {**({"": named} if named else {}), **folder_licenses(root, found)}
    if not names:
        raise SourceError(
            f"source {source.id!r}: no data files in {root} (looked for {', '.join(KINDS)}; "
            f"files: {list(source.files)}, exclude: {list(source.exclude)}, "
            f"splits: {list(source.splits)})"
        )
    raw = Raw(root, names, Origin("", licenses=licenses))
    return replace(raw, origin=_origin(source, raw))


def _select(source: DatasetSource, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the files that can hold rows of the wanted splits."""
    if not source.splits:
        return names
    return tuple(name for name in names if split_of(name) in (None, *source.splits))


def _origin(source: DatasetSource, raw: Raw) -> Origin:
    page, revision = "", source.revision or digest_raw(raw)[:16]
    if source.dataset:
        page = f"https://huggingface.co/datasets/{source.dataset}"
    elif source.repository:
        page = f"https://github.com/{source.repository}"
    blob = f"{page}/blob/{source.revision}/" if page and source.revision else ""
    return replace(raw.origin, revision=revision, url=page or None, blob=blob)


def read(source: DatasetSource, raw: Raw, work: Work, given: Params) -> Read:
    """Turn the rows into shards of records; the report says each file's schema and split."""
    prefix = given["where"].replace(".", "-")
    files = _open_files(source, raw, work, prefix)
    params = {
        **given,
        "rules": {"separator": source.input_separator, "roles": source.roles},
        "splits": list(source.splits),
    }
    schemas, plans = {}, []
    for file in files:
        units = plan_units(file.path, file.kind)
        schema = _detect(source, file, units)
        schemas[file.name] = schema.words if schema else "empty"
        plans += [
            {
                "unit": asdict(unit),
                "file": file.name,
                "split": file.split,
                "license": nearest_license(file.name, raw.origin.licenses),
                "schema": asdict(schema),
                "columns": _needed(schema, column_names(unit)),
            }
            for unit in units
            if schema is not None
        ]
    jobs = _write_plans(plans, work, prefix, counted=given["limit"] is not None)
    made = _run(jobs, plans, work, params)
    rows = sum((report.counts.rows_in for report in made.reports), made.unread.rows_in)
    _check_rows(source, rows)
    splits: Counter[str] = Counter()
    for report in made.reports:
        splits.update(report.extra["splits"])
    about: dict[str, Any] = {"files": len(raw.names), "rows": rows, "schemas": schemas}
    about["splits"] = dict(sorted(splits.items()))
    return replace(made, about=about)


def _needed(schema: Schema, names: Sequence[str] | None) -> list[str] | None:
    """Return the columns of a table that hold what the schema names, None for lines."""
    if names is None:
        return None
    found = (name if name in names else name.partition(".")[0] for name in schema.columns.values())
    return [name for name in dict.fromkeys(found) if name in names]


def _open_files(source: DatasetSource, raw: Raw, work: Work, prefix: str) -> list[_File]:
    """Return the files in reading order, those that need it turned into lines below work.path."""
    kinds = {name: kind_of(name) or LINES for name in raw.names}
    paths = dict(zip(raw.names, raw.paths, strict=True))
    texts = [
        name
        for name in raw.names
        if kinds[name] not in (PARQUET, ARROW) and needs_spool(paths[name], kinds[name])
    ]
    jobs = [Job(f"{prefix}-rows-{n:05d}.jsonl", (paths[name],)) for n, name in enumerate(texts)]
    asked = {"kinds": {str(paths[name]): kinds[name] for name in texts}}
    reports = work.map(spool, jobs, asked, runner="processes") if jobs else ()
    spooled = {
        name: work.path / report.shard.file for name, report in zip(texts, reports, strict=True)
    }
    files = [
        _File(
            name,
            spooled.get(name, paths[name]),
            kinds[name] if kinds[name] in (PARQUET, ARROW) else LINES,
            # A single file is all there is, however it is called.
            split_of(name) if len(raw.names) > 1 or source.splits else None,
        )
        for name in raw.names
    ]
    return sorted(files, key=lambda file: SPLIT_ORDER.index(file.split))


def _detect(source: DatasetSource, file: _File, units: Sequence[Unit]) -> Schema | None:
    """Return the schema of a file by its first rows, None for a file without any."""
    head: list[dict[str, Any]] = []
    problem = ""
    tried = 0
    for unit in units:
        for numbered in read_unit(unit):
            tried += 1
            if numbered.row is not None:
                head.append(numbered.row)
            problem = problem or f"row {numbered.number}: {numbered.detail}"
            if len(head) >= HEAD_ROWS or tried >= HEAD_TRIES:
                break
        if len(head) >= HEAD_ROWS or tried >= HEAD_TRIES:
            break
    where = f"source {source.id!r}: {file.name}"
    if not head and tried:
        raise SourceError(f"{where}: none of the first {tried} rows can be read; {problem}")
    if not head:
        return None
    columns = column_names(units[0])
    if columns is not None:
        head = [dict.fromkeys(columns) | row for row in head]
    rows: Rows = head
    return detect(rows, source.columns.model_dump(exclude_none=True), where)


def _write_plans(
    plans: list[dict[str, Any]], work: Work, prefix: str, *, counted: bool
) -> list[Path]:
    """Write each unit's plan to a file; units of lines learn where their lines start."""
    paths = [work.path / f"{prefix}-unit-{number:05d}.json" for number in range(len(plans))]
    for path, plan in zip(paths, plans, strict=True):
        write_atomic(path, json.dumps(plan))
    many = Counter(plan["unit"]["path"] for plan in plans)
    asked = [
        number
        for number, plan in enumerate(plans)
        if plan["unit"]["kind"] == LINES and (counted or many[plan["unit"]["path"]] > 1)
    ]
    jobs = [Job(f"{prefix}-count-{number:05d}.txt", (paths[number],)) for number in asked]
    reports = work.map(count_lines, jobs, {}, runner="processes") if jobs else ()
    first: dict[str, int] = {}
    for number, report in zip(asked, reports, strict=True):
        unit = plans[number]["unit"]
        unit["first"] = first.get(unit["path"], 1)
        unit["rows"] = report.extra["rows"]
        first[unit["path"]] = unit["first"] + report.extra["lines"]
        write_atomic(paths[number], json.dumps(plans[number]))
    return paths


def _run(
    paths: Sequence[Path], plans: Sequence[dict[str, Any]], work: Work, params: Params
) -> Read:
    jobs = [Job(shard_name(params["first"] + n), (path,)) for n, path in enumerate(paths)]

    def count_rows(left: Sequence[Job]) -> int:
        return sum(plan["unit"]["rows"] or 0 for plan in plans[len(plans) - len(left) :])

    return map_capped(extract, jobs, work, params, count_rows)


def _check_rows(source: DatasetSource, rows: int) -> None:
    if source.expected_rows is not None and rows != source.expected_rows:
        raise SourceError(
            f"source {source.id!r}: {rows:,} rows, expected_rows is {source.expected_rows:,}; "
            "the data was changed or cut off, or expected_rows has to be"
        )
