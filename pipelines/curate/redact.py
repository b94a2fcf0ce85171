"""Stage `redact`: secrets and personal data make way for placeholders, in every text of a record.

Nothing is dropped; `redacted` in a record's meta, and the report, count what was replaced by kind.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.curate.redact_text import find_edits, redact
from pipelines.curate.rows import (
    add_meta,
    choose_runner,
    count_sources,
    read_meta,
    sum_sources,
)
from pipelines.engine import SAMPLES_PER_REASON, Built, Input, Job, Outcome, Params, Reject, Work
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import Row, read_rows, write_rows

DEPENDS = ("pyarrow",)
FIELDS = ("prompt", "completion", "text")
SHOWN_CHARS = 40
PYTHON_KINDS = ("function", "class", "method")


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the kinds to look for; none where redaction is off."""
    redaction = recipe.redaction
    return {"kinds": sorted(redaction.kinds) if redaction.enabled else []}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Redact every shard; the report counts replacements by kind, and records that have any."""
    upstream = inputs["quality"]
    jobs = [Job(shard.file, (path,)) for shard, path in upstream.paths()]
    made = work.map(redact_shard, jobs, params(recipe), runner=choose_runner(upstream.shards))
    kinds: Counter[str] = Counter()
    for shard in made:
        kinds.update(shard.extra["redacted"])
    records = sum(shard.extra["records"] for shard in made)
    report = {"redacted": dict(sorted(kinds.items())), "records": records}
    return Built(made, {**report, "sources": sum_sources(made)})


def redact_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy the rows, in order, with placeholders for what is found; `samples` show where."""
    kinds = frozenset(params["kinds"])
    total: Counter[str] = Counter()
    records = 0
    rows: list[Row] = []
    samples: list[Reject] = []
    for row in read_rows(inputs[0]):
        found = redact_row(row, kinds)
        rows.append(row)
        if not found:
            continue
        records += 1
        for kind, shown in found:
            total[kind] += 1
            if total[kind] <= SAMPLES_PER_REASON:
                samples.append({"id": row["id"], "reason": f"redacted:{kind}", "detail": shown})
    write_rows(output, rows)
    extra = {"redacted": dict(sorted(total.items())), "records": records}
    counts = Counts(rows_in=len(rows), rows_out=len(rows), used=len(rows))
    sources = count_sources(Counter(row["source"] for row in rows), {})
    return Outcome(counts, rejects=tuple(samples), extra={**extra, "sources": sources})


def redact_row(row: Row, kinds: frozenset[str]) -> list[tuple[str, str]]:
    """Redact a row in place; return (kind, how it reads now) of everything replaced.

    Every text of the body is searched by itself. The meta gets `redacted`: {kind: number}.
    """
    if not kinds:
        return []
    about = read_meta(row) if row["text"] is not None or row["completion"] is not None else {}
    is_code = about.get("kind") in PYTHON_KINDS or about.get("language") == "Python"
    found: list[tuple[str, str]] = []
    for field in FIELDS:
        if row[field]:
            python = is_code and field != "prompt"
            row[field] = _redact_text(row[field], kinds, found, python=python)
    for message in row["messages"] or ():
        message["content"] = _redact_text(message["content"], kinds, found)
    if found:
        counts = Counter(kind for kind, _ in found)
        add_meta(row, redacted=dict(sorted(counts.items())))
    return found


def _redact_text(
    text: str, kinds: frozenset[str], found: list[tuple[str, str]], *, python: bool = False
) -> str:
    edits = find_edits(text, kinds, python=python)
    if not edits:
        return text
    redacted, shift = redact(text, edits), 0
    for edit in edits:
        start = edit.start + shift
        shift += len(edit.placeholder) - (edit.end - edit.start)
        if edit.counts:
            around = redacted[
                max(0, start - SHOWN_CHARS) : start + len(edit.placeholder) + SHOWN_CHARS
            ]
            found.append((edit.kind, " ".join(around.split())))
    return redacted
