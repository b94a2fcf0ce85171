"""Shard function of the code-qa source: rows of code, question and answer become pairs.

The prompt is the question, a blank line and the code in a fence. `group` is the code (or what the
row says), so that two questions on one function never lie on both sides of a split.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.engine import SAMPLES_PER_REASON, Outcome, Params, Reject
from pipelines.errors import SourceError
from pipelines.manifest import Counts, canonical
from pipelines.records import Row, clean_text, new_record, write_rows
from pipelines.sources.dataset.layout import SPDX, split_named, split_of
from pipelines.sources.dataset.schemas import EXTRAS, get_value
from pipelines.sources.dataset.units import Numbered, Unit, read_unit
from pipelines.sources.licenses import nearest_license

UNKNOWN_LICENSE = "unknown"
# What the columns are usually called, the most exact name first.
NAMES = {
    "code": ("code", "snippet", "code_snippet", "function", "source_code", "context"),
    "question": ("question", "prompt", "instruction", "query"),
    "answer": ("answer", "response", "completion", "output"),
}
# What a row says of the model that wrote it; kept only where it says that one did.
PROVENANCE = ("model", "endpoint", "prompt_digest")
TICKS = re.compile(r"`{3,}")


class BadPair(ValueError):
    """A row that is no question on code; `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def write_pairs(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the records of one unit of rows, described by the file inputs[0]; rows_in counts rows.

    `params` holds id, where, license, allow_unlicensed, openai_outputs, origin, columns, language
    and limit (records at most, or None). Raises SourceError for a damaged file and for rows without
    a license.
    """
    plan = json.loads(inputs[0].read_text(encoding="utf-8"))
    rows: list[Row] = []
    rejects: list[Reject] = []
    quarantined: Counter[str] = Counter()
    ids: set[str] = set()
    beyond = 0
    for numbered in read_unit(Unit(**plan["unit"])):
        if params["limit"] is not None and len(rows) >= params["limit"]:
            beyond += 1
            continue
        try:
            row = read_pair(numbered, plan["file"], params)
        except BadPair as error:
            quarantined[error.reason] += 1
            if quarantined[error.reason] <= SAMPLES_PER_REASON:
                name = f"{params['id']}:{plan['file']}:{numbered.number}"
                detail = f"row {numbered.number}: {str(error)[:300]}"
                shown = detail.encode(errors="backslashreplace").decode()
                rejects.append({"id": name, "reason": error.reason, "detail": shown})
            continue
        if row["id"] in ids:
            row["id"] += f"~{numbered.number}"
        ids.add(row["id"])
        rows.append(row)
    write_rows(output, rows)
    counts = Counts(
        rows_in=len(rows) + quarantined.total() + beyond,
        rows_out=len(rows),
        used=len(rows),
        dropped={"max_records": beyond} if beyond else {},
        quarantined=dict(sorted(quarantined.items())),
    )
    licenses = Counter(row["license"] for row in rows)
    extra = {"licenses": dict(sorted(licenses.items()))}
    return Outcome(counts, rejects=tuple(rejects), extra=extra)


def read_pair(numbered: Numbered, file: str, params: Params) -> Row:
    """Return the record of a row; raises BadPair."""
    row, number = numbered.row, numbered.number
    if row is None:
        raise BadPair(numbered.reason, numbered.detail)
    if row.get("generated") is True and "problem" in row:
        raise BadPair(str(row["problem"]), str(row.get("detail", "")))
    names = {str(name).strip().lower().replace(" ", "_"): name for name in reversed(list(row))}
    body = {part: _read_text(row, names, part, params["columns"]) for part in NAMES}
    native = _read_short(row, names, "id")
    group = _read_short(row, names, "group") or _digest(body["code"])
    language = _read_short(row, names, "language") or params["language"]
    origin, source = params["origin"], params["id"]
    return new_record(
        id=f"{source}:{file}:{native or number}",
        group=f"{source}:{group}",
        source=source,
        revision=_read_named(row, names, ("revision",)) or origin["revision"],
        url=_read_short(row, names, "url") or f"{origin['blob']}{file}",
        author=_read_short(row, names, "author") or origin["author"],
        license=_read_license(row, names, file, number, params),
        created=_read_short(row, names, "created"),
        prompt=f"{body['question'].strip()}\n\n{fence(body['code'], language)}",
        completion=body["answer"],
        meta=canonical(_describe(row, names, file, number, language, params)),
    )


def fence(code: str, language: str) -> str:
    r"""Return code in a Markdown fence that is longer than any in the code.

    >>> fence("x = 1", "python")
    '```python\nx = 1\n```'
    """
    ticks = "`" * max(3, 1 + max((len(found) for found in TICKS.findall(code)), default=0))
    body = code.strip("\n")
    return f"{ticks}{language.lower()}\n{body}\n{ticks}"


def _read_text(
    row: Mapping[str, Any], names: Mapping[str, str], part: str, columns: Mapping[str, str | None]
) -> str:
    column = columns[part] or next((names[n] for n in NAMES[part] if n in names), None)
    if column is None:
        shown = ", ".join(map(str, row))[:200]
        raise BadPair(f"missing_{part}", f"no {' or '.join(NAMES[part])} among {shown}")
    text = get_value(row, column)
    if text is None or (isinstance(text, str) and not text.strip()):
        raise BadPair(f"empty_{part}", f"{column!r} is empty")
    if not isinstance(text, str):
        raise BadPair("not_text", f"{column!r} is of type {type(text).__name__}, expected text")
    if clean_text(text) is None:
        raise BadPair("unstorable_text", f"{column!r} has NUL or half of a surrogate pair")
    return text


def _read_short(row: Mapping[str, Any], names: Mapping[str, str], part: str) -> str | None:
    return _read_named(row, names, EXTRAS[part])


def _read_named(
    row: Mapping[str, Any], names: Mapping[str, str], candidates: Iterable[str]
) -> str | None:
    """Return the first of some columns that holds a short text or a whole number."""
    for name in candidates:
        value = row.get(names.get(name, ""))
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip() and clean_text(value):
            return value.strip()
    return None


def _read_license(
    row: Mapping[str, Any], names: Mapping[str, str], file: str, number: int, params: Params
) -> str:
    named = _read_short(row, names, "license")
    found = (
        (SPDX.get(named.lower(), named) if named else None)
        or params["license"]
        or nearest_license(file, params["origin"]["licenses"])
    )
    if not found and not params["allow_unlicensed"]:
        raise SourceError(
            f"source {params['id']!r}: no license found for row {number} of {file}; say which one "
            f"it has with {params['where']}.license, e.g. license: BSD-3-Clause, or set "
            f"{params['where']}.allow_unlicensed: true"
        )
    return found or UNKNOWN_LICENSE


def _describe(
    row: Mapping[str, Any],
    names: Mapping[str, str],
    file: str,
    number: int,
    language: str,
    params: Params,
) -> dict[str, Any]:
    meta: dict[str, Any] = {"file": file, "row": number}
    meta.update({"language": language.lower()} if language else {})
    split = split_named(_read_short(row, names, "split") or "") or split_of(file)
    meta.update({"split": split} if split else {})
    if row.get("generated") is True:
        told = {name: _read_named(row, names, (name,)) for name in PROVENANCE}
        meta.update({"generated": True, **{key: text for key, text in told.items() if text}})
    meta.update({"openai_outputs": True} if params["openai_outputs"] else {})
    return meta


def _digest(code: str) -> str:
    return hashlib.sha256(code.strip().encode()).hexdigest()[:16]
