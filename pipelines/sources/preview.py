"""Shows what would be read of a file, folder or archive, and the recipe entry that reads it."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipelines.engine import ShardReport, Work
from pipelines.errors import RecipeError, SourceError
from pipelines.manifest import Counts
from pipelines.records import Row, read_rows
from pipelines.settings.sources import Source
from pipelines.sources import MODULES, get_source
from pipelines.sources.dataset.layout import ARROW, PARQUET, kind_of, list_files, select_files
from pipelines.sources.dataset.spool import read_head
from pipelines.sources.dataset.units import plan_units, read_unit
from pipelines.sources.raw import Raw, Read

HEAD_ROWS = 20
READ_WHOLE_BYTES = 64 << 20
RECORDS_OF_LARGE = 1000
SHOWN_CHARS = 240
SHOWN_PROBLEMS = 3
MAX_FILE_BYTES = 1_000_000  # what curation.max_file_bytes is by default
CODE = re.compile(r".*\.(?:py|pyi|js|ts|java|c|cc|cpp|h|hpp|go|rs|rb|php|cs|sh|scala|kt|swift)")
ARCHIVE = re.compile(r".*\.(?:tar\.gz|tgz|tar|tar\.bz2|tar\.xz|zip|whl)")
SUFFIXES = re.compile(
    r"(?:\.(?:jsonl|ndjson|json|csv|tsv|parquet|arrow|feather|xml|tar|tgz|zip|whl|7z|gz|bz2|xz|zst))+$"
)
DUMP = re.compile(r"(?:.*[-/])?Posts\.xml(?:\.gz|\.7z)?|.*\.7z")
# What the rows of message trees have, nested or flat.
TREES = (
    {"message_tree_id", "prompt"},
    {"message_id", "parent_id", "role", "text"},
    {"task_message_id", "parent_message_id", "role", "text"},
)
# Published files that are known by their name, with the preset that describes them.
PRESET_FILES = {"codegen-instruct.json": "gpteacher", "code_alpaca_20k.json": "code-alpaca"}


def detect_source(path: str | Path) -> dict[str, Any]:
    """Return the settings of a recipe's `sources` entry that reads a file, folder or archive.

    Raises SourceError where nothing that can be read is found.
    """
    given = Path(path).expanduser().absolute()
    if not given.exists():
        raise SourceError(f"{path}: does not exist; give a file, a folder or an archive")
    found = next((kind for kind in _guess(given) if kind in MODULES), None)
    if found is None:
        raise SourceError(
            f"{path}: nothing here is known as code, rows (.jsonl, .json, .csv, .parquet, .arrow), "
            f"message trees or a Stack Exchange dump (source types: {', '.join(MODULES)})"
        )
    name = SUFFIXES.sub("", given.name.lower()) if given.is_file() else given.name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"
    entry: dict[str, Any] = {"type": found, "id": slug, "path": str(given)}
    if found != "stack-exchange":
        # Your own data need not say under which license you may use it; a site's posts do.
        entry["allow_unlicensed"] = True
    return entry


def _guess(path: Path) -> Iterator[str]:
    """Yield the source types that could read a path, the most particular first."""
    names = [path.name] if path.is_file() else sorted(list_files(path))
    if any(DUMP.fullmatch(name) for name in names):
        yield "stack-exchange"
    data = select_files(names, (), ())
    if any(Path(name).name in PRESET_FILES for name in data) and len(data) == 1:
        yield PRESET_FILES[Path(data[0]).name]
    code = [name for name in names if CODE.fullmatch(name.lower())]
    if data and len(data) >= len(code):
        root = path.parent if path.is_file() else path
        columns = _columns(root, data)
        if any(keys <= columns for keys in TREES):
            yield "oasst"
        if {"code", "question", "answer"} <= columns:
            yield "code-qa"
        yield "dataset"
    if code or ARCHIVE.fullmatch(path.name.lower()):
        yield "repository"


def _columns(root: Path, names: Sequence[str]) -> set[str]:
    """Return the columns of the first rows of all files, in lower case."""
    columns: set[str] = set()
    for name in names:
        path, kind = root / name, kind_of(name) or ""
        if kind in (PARQUET, ARROW):
            units = plan_units(path, kind)[:1]
            numbered = (each for unit in units for each in read_unit(unit))
            rows = [row.row for row, _ in zip(numbered, range(HEAD_ROWS), strict=False) if row.row]
        else:
            rows = read_head(path, kind, HEAD_ROWS)
        columns |= {key.strip().lower() for row in rows for key in row}
    return columns


def preview(path: str | Path, *, limit: int = 3, settings: Mapping[str, Any] | None = None) -> str:
    """Return a page on what would be read of a path: type, files, schema, rows, problems, records.

    `settings` are keys of the source that replace what is detected. Of more than 64 MiB only the
    first 1,000 records are made, while rows are counted to the end. Raises SourceError where
    nothing can be read and RecipeError for settings that no source has.
    """
    named = dict(settings or {})
    where = {"id": "data", "path": str(Path(path).expanduser().absolute())}
    entry = {**(where if "type" in named else detect_source(path)), **named}
    source = _validate(entry)
    module = get_source(source)
    problem = module.find_problem(source)
    if problem:
        raise SourceError(f"{path}: {problem}")
    raw = module.locate(source)
    large = sum(each.stat().st_size for each in raw.paths) > READ_WHOLE_BYTES
    capped = source.max_records or (RECORDS_OF_LARGE if large else None)
    with tempfile.TemporaryDirectory(prefix="starloom-preview-") as folder:
        work = Work(Path(folder))
        made = module.read(source, raw, work, _given(source, raw, capped))
        records = _first_records(made, work, limit)
        parts = [
            _describe(source, raw, made),
            _problems(made, work),
            *(_render(record) for record in records),
            "sources:\n" + yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).rstrip(),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_sample(source: Source, limit: int) -> list[Row]:
    """Return the first records that a source yields."""
    module = get_source(source)
    raw = module.locate(source)
    with tempfile.TemporaryDirectory(prefix="starloom-sample-") as folder:
        work = Work(Path(folder))
        made = module.read(source, raw, work, _given(source, raw, limit))
        return _first_records(made, work, limit)


def _validate(entry: Mapping[str, Any]) -> Source:
    adapter: TypeAdapter[Source] = TypeAdapter(Source)
    try:
        return adapter.validate_python(entry)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc'][1:])) or 'type'}: {each['msg']}"
            for each in error.errors()
        ]
        raise RecipeError(f"settings of the source: {'; '.join(problems)}") from error


def _given(source: Source, raw: Raw, limit: int | None) -> dict[str, Any]:
    return {
        "root": str(raw.root),
        "id": source.id,
        "where": "sources.0",
        "license": source.license,
        "allow_unlicensed": source.allow_unlicensed,
        "openai_outputs": source.openai_outputs,
        "origin": asdict(raw.origin),
        "max_bytes": MAX_FILE_BYTES,
        "limit": limit,
        "first": 0,
    }


def _first_records(made: Read, work: Work, limit: int) -> list[Row]:
    rows: list[Row] = []
    for report in made.reports:
        for row in read_rows(work.path / report.shard.file):
            if len(rows) >= limit:
                return rows
            rows.append(row)
    return rows


def _describe(source: Source, raw: Raw, made: Read) -> str:
    counts = sum((report.counts for report in made.reports), made.unread)
    licenses = _sum_extra(made.reports, "licenses")
    more = ", ..." if len(raw.names) > 4 else ""
    lines = [
        f"type       {source.type}",
        f"files      {len(raw.names):,} ({', '.join(raw.names[:4])}{more})",
    ]
    schemas = made.about.get("schemas") or {}
    shown = dict.fromkeys(schemas.values())
    lines += [f"schema     {words}" for words in shown]
    lines.append(f"rows       {counts.rows_in:,} read as {_total(made.reports):,} records")
    splits = made.about.get("splits")
    if splits:
        lines.append(f"splits     {_pairs(splits)}")
    lines.append(f"licenses   {_pairs(licenses) or 'none'}")
    if source.openai_outputs:
        lines.append("note       holds output of OpenAI models; see allow_openai_outputs")
    return "\n".join(lines)


def _total(reports: Sequence[ShardReport]) -> int:
    return sum(report.shard.rows for report in reports)


def _sum_extra(reports: Sequence[ShardReport], key: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for report in reports:
        found.update(report.extra.get(key) or {})
    return found


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def _problems(made: Read, work: Work) -> str:
    """Return the rows left out by reason, with the first of each."""
    counts: Counts = sum((report.counts for report in made.reports), made.unread)
    samples = work.samples(made.reports)
    lines = []
    for verb, reasons in (("quarantined", counts.quarantined), ("dropped", counts.dropped)):
        for reason, count in sorted(reasons.items()):
            lines.append(f"{verb:<12}{count:,} {reason}")
            lines += [
                f"            {sample['id']}: {sample['detail']}"
                for sample in samples.get(reason, [])[:SHOWN_PROBLEMS]
            ]
    return "\n".join(lines)


def _render(record: Row) -> str:
    """Return a record as a few lines: its id, and the beginning of each part."""
    parts = [(message["role"], message["content"]) for message in record["messages"] or ()] or [
        (name, record[name]) for name in ("prompt", "completion", "text")
    ]
    lines = [f"record     {record['id']}"]
    lines += [f"  {name:<10} {_shorten(text)}" for name, text in parts if text is not None]
    return "\n".join(lines)


def _shorten(text: str) -> str:
    # Quoted as JSON, so that blanks and line ends can be seen and no terminal code gets through.
    quoted = json.dumps(text[:SHOWN_CHARS], ensure_ascii=False)
    return quoted + (f" ... {len(text):,} characters" if len(text) > SHOWN_CHARS else "")
