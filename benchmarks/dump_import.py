"""Posts.xml to Arrow: megabytes and records per CPU second and peak memory, against other ways.

    python -m benchmarks.dump_import [--mb 1000] [--rounds 2] [--folder DIR]

A dump is generated (see generate_dump), then every reader makes the same 15 columns of it, batch by
batch, in a process of its own and in turn, round by round; before that, all of them must read the
same from a dump of 10 MB. The last lines are the import as it is: ranges of bytes to partitioned
files on disk, in one process and in two. Prints a Markdown table: medians of the rounds.
"""

import argparse
import hashlib
import html
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.generate_dump import write_dump
from pipelines.engine import Work
from pipelines.sources.stack_exchange.dump import find_extent, read_range
from pipelines.sources.stack_exchange.imports import import_dump
from pipelines.sources.stack_exchange.located import locate_dump
from pipelines.sources.stack_exchange.parsing import COLUMNS, parse_posts, split_tags
from pipelines.sources.stack_exchange.posts import POST_SCHEMA

BATCH = 5000
CONVERT: dict[str, Callable[[str], Any]] = {
    field.name: int
    if pa.types.is_integer(field.type)
    else split_tags
    if pa.types.is_list(field.type)
    else str
    for field in POST_SCHEMA
}
ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def batches_of(rows: Iterable[Any]) -> Iterator[pa.RecordBatch]:
    """Yield batches of questions and answers from mappings of attributes, column by column."""
    plan = [(COLUMNS[field.name], CONVERT[field.name], field) for field in POST_SCHEMA]
    held: list[list[Any]] = [[] for _ in plan]
    for row in rows:
        if row.get("PostTypeId") not in ("1", "2"):
            continue
        for column, (name, convert, _) in zip(held, plan, strict=True):
            value = row.get(name)
            column.append(None if value is None else convert(value))
        if len(held[0]) == BATCH:
            yield _batch(held, plan)
            held = [[] for _ in plan]
    yield _batch(held, plan)


def _batch(held: list[list[Any]], plan: list[Any]) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, (*_, field) in zip(held, plan, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=POST_SCHEMA)


def read_by_starloom(path: Path) -> Iterator[pa.RecordBatch]:
    extent = find_extent(path, "posts")
    for chunk in read_range(path, extent, extent.start, extent.end, tuple(COLUMNS.values())):
        yield parse_posts(chunk.plain).batch


def read_by_lxml_iterparse(path: Path) -> Iterator[pa.RecordBatch]:
    from lxml import etree

    def rows() -> Iterator[Any]:
        for _, element in etree.iterparse(str(path), tag="row"):
            yield element.attrib
            element.clear()
            while element.getprevious() is not None:
                del element.getparent()[0]

    return batches_of(rows())


def read_by_element_tree(path: Path) -> Iterator[pa.RecordBatch]:
    def rows() -> Iterator[Any]:
        events = ET.iterparse(path, events=("start", "end"))  # noqa: S314
        _, root = next(events)
        for event, element in events:
            if event == "end" and element.tag == "row":
                yield element.attrib
                root.clear()

    return batches_of(rows())


def read_by_lxml_lines(path: Path) -> Iterator[pa.RecordBatch]:
    from lxml import etree

    def rows() -> Iterator[Any]:
        with path.open("rb") as file:
            for line in file:
                if line.lstrip().startswith(b"<row"):
                    yield etree.fromstring(line).attrib

    return batches_of(rows())


def read_by_regex_lines(path: Path) -> Iterator[pa.RecordBatch]:
    def rows() -> Iterator[Any]:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                if line.lstrip().startswith("<row"):
                    found = ATTRIBUTE.findall(line)
                    yield {n: html.unescape(v) if "&" in v else v for n, v in found}

    return batches_of(rows())


READERS: dict[str, Callable[[Path], Iterator[pa.RecordBatch]]] = {
    "starloom": read_by_starloom,
    "lxml iterparse + clear": read_by_lxml_iterparse,
    "ElementTree iterparse + clear": read_by_element_tree,
    "lxml.fromstring per line": read_by_lxml_lines,
    "regex per line + html.unescape": read_by_regex_lines,
}
NAIVE = "lxml iterparse + clear"
IMPORTS = {"starloom to partitions, 1 process": 1, "starloom to partitions, 2 processes": 2}


def digest_reader(name: str, path: Path) -> str:
    """Return a digest of every value that a reader reads."""
    digest = hashlib.sha256()
    for batch in READERS[name](path):
        for row in zip(*[column.to_pylist() for column in batch], strict=True):
            digest.update(repr(row).encode())
    return digest.hexdigest()


def own_peak() -> float:
    """Return the peak resident MB of this process (ru_maxrss begins with that of its parent)."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def measure(name: str, path: Path) -> dict[str, Any]:
    """Read or import a dump once; return rows, seconds and peak MB."""
    wall, cpu = time.perf_counter(), time.process_time()
    children, peak = 0.0, 0.0
    if name in READERS:
        rows = sum(batch.num_rows for batch in READERS[name](path))
    else:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            work = Work(Path(folder), workers=IMPORTS[name])
            rows = import_dump("se", locate_dump(path), work).posts
            children, peak = work.child_cpu, work.child_peak_rss / 1e6
    return {
        "rows": rows,
        "cpu": time.process_time() - cpu + children,
        "wall": time.perf_counter() - wall,
        "peak": max(own_peak(), peak),
    }


def measure_apart(name: str, path: Path) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.dump_import", "--only", name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def describe_machine() -> str:
    """Return date, hardware and versions in a line."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.machine()
    versions = [f"{name} {metadata.version(name)}" for name in ("lxml", "pyarrow", "numpy")]
    python = f"Python {platform.python_version()}"
    parts = [f"{datetime.now(UTC):%Y-%m-%d}", f"{os.cpu_count()} cores", cpu, python, *versions]
    return ", ".join(parts)


def print_table(size: float, results: dict[str, list[dict[str, Any]]]) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in results[name])

    print(f"\n{describe_machine()}; {size / 1e6:.0f} MB, {results[NAIVE][0]['rows']:,} posts\n")
    print("| reader | MB per CPU s | records per CPU s | ratio to naive | wall s | peak MB |")
    print("|---|---|---|---|---|---|")
    for name in results:
        cpu = median(name, "cpu")
        print(
            f"| {name} | {size / 1e6 / cpu:.0f} | {median(name, 'rows') / cpu:,.0f} "
            f"| {median(NAIVE, 'cpu') / cpu:.2f} | {median(name, 'wall'):.1f} "
            f"| {median(name, 'peak'):.0f} |"
        )
    one, two = IMPORTS
    speedup = median(one, "wall") / median(two, "wall")
    print(f"\nTwo processes: {speedup:.2f} times as fast as one by the clock.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark Posts.xml to Arrow.")
    parser.add_argument("--mb", type=float, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the dump is written")
    parser.add_argument("--only", nargs=2, metavar=("READER", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only[0], Path(options.only[1]))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small, path = Path(folder, "small.xml"), Path(folder, "Posts.xml")
        write_dump(small, 10)
        digests = {name: digest_reader(name, small) for name in READERS}
        assert len(set(digests.values())) == 1, f"readers disagree: {digests}"
        write_dump(path, options.mb)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in (*READERS, *IMPORTS)}
        for _ in range(options.rounds):
            for name, found in results.items():
                found.append(measure_apart(name, path))
        assert len({result["rows"] for found in results.values() for result in found}) == 1
        print_table(path.stat().st_size, results)


if __name__ == "__main__":
    main()
