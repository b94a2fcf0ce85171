"""Reads the texts of benchmarks: what training data must not hold.

Every text of a problem counts by itself (prompt, solution, tests, answers), and prompt and
solution together, so that a problem with two short texts is found, too.
"""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import SourceError
from pipelines.manifest import sha256_file

PAIRS = (
    ("prompt", "canonical_solution"),
    ("prompt", "completion"),
    ("text", "code"),
    ("question", "answer"),
    ("instruction", "output"),
    ("Question", "Best Answer"),
)
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".tsv")
TABLES = {".csv": ",", ".tsv": "\t"}


class Item(NamedTuple):
    """A text of a benchmark: the list it is in, the name of its problem, and its field."""

    benchmark: str
    problem: str
    field: str
    text: str


def find_lists(against: Sequence[str]) -> list[Path]:
    """Return the files of all lists, a folder's in order; SourceError where one is not there."""
    found = []
    for number, name in enumerate(against):
        path = Path(name).expanduser()
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in inside if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise SourceError(
                f"curation.decontaminate.against.{number}: {path}: no such file, or a folder "
                "without files; name a .jsonl, .json, .parquet, .csv or .txt file, or a folder"
            )
        found += files
    return found


def digest_lists(against: Sequence[str]) -> list[list[str]]:
    """Return name and sha256 of each file, which is what decides what is removed."""
    return [[path.name, sha256_file(path)] for path in find_lists(against)]


def read_items(path: Path) -> Iterator[Item]:
    """Yield the texts of one list; SourceError where it cannot be read as its ending says."""
    name = path.name.split(".")[0]
    if path.name.endswith(ROW_ENDINGS):
        for number, row in enumerate(_read_rows(path)):
            yield from _row_items(name, number, row)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: a benchmark must be UTF-8 text ({error})") from error
    texts = text.split("\n") if path.suffix == ".txt" else [text]
    for number, value in enumerate(texts, 1):
        yield Item(name, f"{path.name}:{number}", "text", value)


def _read_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(256):
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise SourceError(f"{path}: not a Parquet file that can be read ({error})") from error
        return
    if path.suffix in TABLES:
        yield from _read_table(path)
        return
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise SourceError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    lines = data.split(b"\n") if ".jsonl" in path.name else [data]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise SourceError(
                f"{path}, line {number}: not JSON ({error}); a benchmark must be whole, fetch it "
                "again"
            ) from error
        yield from value if isinstance(value, list) else [value]


def _read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table with a header; what is beyond the header's columns is left out."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter=TABLES[path.suffix]):
                yield {name: value for name, value in row.items() if name and value}
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path}: not a table in UTF-8 with a header ({error}); a benchmark must be whole, "
            "fetch it again"
        ) from error


def _row_items(name: str, number: int, row: Any) -> Iterator[Item]:
    texts = dict(_texts("", row))
    known = [texts[key] for key in ("task_id", "id", "problem_id") if key in texts]
    if not known and isinstance(row, Mapping):
        known = [str(row[key]) for key in ("task_id", "id") if key in row]
    problem = known[0] if known else f"{name}/{number}"
    for field, text in texts.items():
        yield Item(name, problem, field or "text", text)
    for first, second in PAIRS:
        if first in texts and second in texts:
            yield Item(name, problem, f"{first}+{second}", f"{texts[first]}\n{texts[second]}")


def _texts(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (field, text) of every string in a row; a list of strings is one text."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(f"{field}.{key}" if field else str(key), part)
    elif isinstance(value, list):
        if all(isinstance(part, str) for part in value):
            yield field, "\n".join(value)
        else:
            for number, part in enumerate(value):
                yield from _texts(f"{field}.{number}", part)
