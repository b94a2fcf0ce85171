"""Runs a keep-or-reason decision over a shard: every row is kept or counted with its reason."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipelines.curate.redact_text import mask
from pipelines.engine import SAMPLES_PER_REASON, Outcome, Reject, Runner, ShardReport
from pipelines.manifest import Counts, Shard, canonical
from pipelines.records import Row, read_rows, write_rows

Kind = Literal["messages", "prompt", "text"]
Fault = tuple[str, str]  # (reason, detail)
Sources = dict[str, dict[str, Any]]

# Stages hold the interpreter's lock. Below this, starting processes costs more than they save.
PROCESSES_FROM_ROWS = 20_000
PROCESSES_FROM_BYTES = 16_000_000


def choose_runner(shards: Sequence[Shard]) -> Runner:
    """Return what runs over shards fastest; the result is the same."""
    many = sum(shard.rows for shard in shards) >= PROCESSES_FROM_ROWS
    large = sum(shard.bytes for shard in shards) >= PROCESSES_FROM_BYTES
    return "processes" if many or large else "threads"


def body_kind(row: Mapping[str, Any]) -> Kind:
    """Say which of the three bodies a record carries."""
    if row["text"] is not None:
        return "text"
    return "prompt" if row["completion"] is not None else "messages"


def read_meta(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's meta as a dict."""
    meta: dict[str, Any] = json.loads(row["meta"] or "{}")
    return meta


def add_meta(row: Row, **values: Any) -> None:
    """Add keys to a record's meta."""
    row["meta"] = canonical({**read_meta(row), **values})


def filter_rows(source: Path, output: Path, decide: Callable[[Row], Fault | None]) -> Outcome:
    """Copy the rows, in order, that `decide` finds no fault with; it may add to a row's meta.

    Of what is dropped a few samples are shown, cut short and without secrets. `extra["sources"]`
    counts what each source lost, see `count_sources`.
    """
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    by_source: dict[str, Counter[str]] = {}
    rejects: list[Reject] = []
    for row in read_rows(source):
        fault = decide(row)
        if fault is None:
            kept.append(row)
            continue
        reason, detail = fault
        dropped[reason] += 1
        by_source.setdefault(row["source"], Counter())[reason] += 1
        if dropped[reason] <= SAMPLES_PER_REASON:
            rejects.append({"id": row["id"], "reason": reason, "detail": mask(detail)})
    write_rows(output, kept)
    counts = Counts(
        rows_in=len(kept) + dropped.total(),
        rows_out=len(kept),
        used=len(kept),
        dropped=dict(sorted(dropped.items())),
    )
    sources = count_sources(Counter(row["source"] for row in kept), by_source)
    return Outcome(counts, rejects=tuple(rejects), extra={"sources": sources})


def count_sources(kept: Mapping[str, int], dropped: Mapping[str, Mapping[str, int]]) -> Sources:
    """Return {source: {"rows_in", "rows_out", "dropped": {reason: rows}}}, sorted by name."""
    return {
        source: {
            "rows_in": kept.get(source, 0) + sum(dropped.get(source, {}).values()),
            "rows_out": kept.get(source, 0),
            "dropped": dict(sorted(dropped.get(source, {}).items())),
        }
        for source in sorted({*kept, *dropped})
    }


def sum_sources(reports: Iterable[ShardReport]) -> Sources:
    """Return the counts per source over all shards of a stage, as its report shows them."""
    kept: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    for report in reports:
        for source, counts in report.extra["sources"].items():
            kept[source] += counts["rows_out"]
            dropped.setdefault(source, Counter()).update(counts["dropped"])
    return count_sources(kept, dropped)
