"""Copies a shard without some of its rows, as columns: no Python object for each row."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.curate.rows import count_sources
from pipelines.engine import SAMPLES_PER_REASON, Outcome, Reject
from pipelines.manifest import Counts, canonical

JOINED = "joined"  # the key in a record's meta
Drops = Mapping[int, tuple[str, str]]  # {row: (reason, detail)}


def drop_rows(
    source: Path, output: Path, drops: Drops, marks: Mapping[int, str] | None = None
) -> Outcome:
    """Copy the other rows in order, with the counts of the dropped ones and samples of them.

    `marks` names the joined group of the rows that have one: it is noted in their meta.
    """
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        if drops or marks:
            table = file.read(use_threads=False)
            return write_kept(_note_joined(table, marks or {}), output, drops)
        table = file.read(columns=["id", "source"], use_threads=False)
    shutil.copyfile(source, output)
    return count_kept(table, drops)


def write_kept(table: pa.Table, output: Path, drops: Drops) -> Outcome:
    """Write a table without some of its rows, see `drop_rows`."""
    kept = table.filter(pa.array(_keep(table, drops)))
    pq.write_table(kept, output, compression="zstd", compression_level=1, write_page_checksum=True)
    return count_kept(table, drops)


def count_kept(table: pa.Table, drops: Drops) -> Outcome:
    """Return the counts of a table's rows, its columns id and source, and of its drops."""
    keep = _keep(table, drops)
    dropped = _count(drops, table["source"].take(pa.array(list(drops), pa.int64())).to_pylist())
    totals: Counter[str] = sum(dropped.values(), Counter())
    by_source = pc.value_counts(table["source"].filter(pa.array(keep))).to_pylist()
    counts = Counts(
        rows_in=len(table),
        rows_out=int(keep.sum()),
        used=int(keep.sum()),
        dropped=dict(sorted(totals.items())),
    )
    sources = count_sources({each["values"]: each["counts"] for each in by_source}, dropped)
    return Outcome(counts, rejects=tuple(_samples(table, drops)), extra={"sources": sources})


def _keep(table: pa.Table, drops: Drops) -> npt.NDArray[np.bool_]:
    keep = np.ones(len(table), np.bool_)
    keep[list(drops)] = False
    return keep


def find_marks(source: Path, joined: pa.Table) -> dict[int, str]:
    """Return {row: joined group} of a shard's rows that go by another group's name.

    `joined` is a table (group, joined). Where a joined group has the name of the row's own, there
    is nothing to note, and a shard that keeps all of its rows stays as it is.
    """
    renamed = joined.filter(pc.not_equal(joined["group"], joined["joined"]))
    if not len(renamed):
        return {}
    with pq.ParquetFile(source) as file:
        groups = file.read(columns=["group"], use_threads=False)["group"]
    at = pc.index_in(groups, renamed["group"]).combine_chunks()
    rows = np.flatnonzero(at.is_valid())
    names = renamed["joined"].take(at.drop_null()).to_pylist()
    return dict(zip(rows.tolist(), names, strict=True))


def _note_joined(table: pa.Table, marks: Mapping[int, str]) -> pa.Table:
    if not marks:
        return table
    meta = table["meta"].to_pylist()
    for row, name in marks.items():
        meta[row] = canonical({**json.loads(meta[row] or "{}"), JOINED: name})
    place = table.schema.get_field_index("meta")
    return table.set_column(place, table.schema.field("meta"), pa.array(meta, pa.string()))


def _count(drops: Drops, sources: list[str]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for source, (reason, _) in zip(sources, drops.values(), strict=True):
        found.setdefault(source, Counter())[reason] += 1
    return found


def _samples(table: pa.Table, drops: Drops) -> Iterator[Reject]:
    seen: Counter[str] = Counter()
    for row, (reason, detail) in sorted(drops.items()):
        seen[reason] += 1
        if seen[reason] <= SAMPLES_PER_REASON:
            yield {"id": table["id"][row].as_py(), "reason": reason, "detail": detail}
