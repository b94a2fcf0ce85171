"""Makes records of code files: a whole one as text, documented definitions as pairs.

What is made of a file depends on its path, its bytes and the settings alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from pipelines.engine import Outcome, Params, Reject
from pipelines.errors import SourceError
from pipelines.manifest import Counts, canonical
from pipelines.records import Row, clean_text, new_record, write_rows
from pipelines.sources.code_files import (
    PYTHON,
    Unusable,
    is_generated,
    language_of,
    read_source,
    suffix_of,
)
from pipelines.sources.extract import Form, Skipped, extract_units
from pipelines.sources.licenses import is_allowed, nearest_license, spdx_of
from pipelines.sources.notebooks import SUFFIX, flatten_notebook
from pipelines.syntax import BadSyntax, parse_python

UNKNOWN_LICENSE = "unknown"


class Unwanted(ValueError):
    """A readable file that the settings leave out; `reason` says why."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def extract_rows(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the records of some files; rows_in counts files, rows_out records.

    `params` holds root, id, where, license, allow_unlicensed, origin, max_bytes and limit (records
    at most, or None); kinds, completion, strip_doctests, include_generated, handwritten (files that
    are not generated whatever they look like) and licenses of the source.
    Raises SourceError for a file that no license is known of.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    dropped: Counter[str] = Counter()
    quarantined: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for path in inputs:
        if params["limit"] is not None and len(rows) >= params["limit"]:
            dropped["max_records"] += 1
            continue
        name = path.relative_to(params["root"]).as_posix()
        try:
            found = list(_read_file(path, name, params))
        except (Unusable, BadSyntax, Unwanted) as error:
            (dropped if isinstance(error, Unwanted) else quarantined)[error.reason] += 1
            shown = name.encode(errors="backslashreplace").decode()
            rejects.append(
                {"id": f"{params['id']}:{shown}", "reason": error.reason, "detail": str(error)}
            )
            continue
        skipped.update(unit.reason for unit in found if isinstance(unit, Skipped))
        rows.extend(row for row in found if not isinstance(row, Skipped))
    rows = rows[: params["limit"]]
    write_rows(output, rows)
    counts = Counts(
        rows_in=len(inputs),
        rows_out=len(rows),
        used=len(inputs) - dropped.total() - quarantined.total(),
        dropped=dict(sorted(dropped.items())),
        quarantined=dict(sorted(quarantined.items())),
    )
    licenses = Counter(row["license"] for row in rows)
    extra = {"licenses": dict(sorted(licenses.items())), "skipped": dict(sorted(skipped.items()))}
    return Outcome(counts, rejects=tuple(rejects), extra=extra)


def _read_file(path: Path, name: str, params: Params) -> Iterator[Row | Skipped]:
    if clean_text(name) is None:
        raise Unusable("bad_file_name")
    text = read_source(path, params["max_bytes"])
    if suffix_of(name) == SUFFIX:
        text = _checked(flatten_notebook(text))
    generated = not params["include_generated"] and is_generated(name, text)
    if generated and name not in params["handwritten"]:
        raise Unwanted("generated")
    license_ = _license_of(name, text, params)
    source, origin = params["id"], params["origin"]
    common = {
        "group": f"{source}:{name}",
        "source": source,
        "revision": origin["revision"],
        "author": origin["author"],
        "license": license_,
        "created": origin["created"],
    }
    url = origin["blob"] + (quote(name) if origin["blob"] else name)
    tree = parse_python(text) if suffix_of(name) in PYTHON else None
    if "file" in params["kinds"]:
        lines = [1, text.count("\n") + (not text.endswith("\n"))]
        meta = {"kind": "file", "language": language_of(name), "lines": lines, "path": name}
        body = {"id": f"{source}:{name}", "url": url, "text": text, "meta": canonical(meta)}
        yield new_record(**common, **body)
    if tree is None:
        return
    form = Form(frozenset(params["kinds"]), params["completion"], params["strip_doctests"])
    for unit in extract_units(text, tree, form):
        if isinstance(unit, Skipped):
            yield unit
            continue
        meta = {"kind": unit.kind, "lines": list(unit.lines), "path": name}
        yield new_record(
            **common,
            id=f"{source}:{name}::{unit.name}",
            url=f"{url}#L{unit.lines[0]}-L{unit.lines[1]}",
            prompt=unit.prompt,
            completion=unit.completion,
            meta=canonical(meta),
        )


def _checked(text: str) -> str:
    # JSON can spell characters that no file could hold.
    if clean_text(text) is None:
        raise Unusable("not_text", "NUL or a lone surrogate in a cell")
    return text


def _license_of(name: str, text: str, params: Params) -> str:
    """Return a file's license: the recipe's, its own, the nearest folder's, or "unknown".

    Raises Unwanted where the recipe wants others, SourceError where it has to name one.
    """
    licenses = params["origin"]["licenses"]
    found = params["license"] or spdx_of(text) or nearest_license(name, licenses)
    if params["licenses"] is not None:
        if not is_allowed(found or UNKNOWN_LICENSE, params["licenses"]):
            raise Unwanted("license_not_wanted", found or UNKNOWN_LICENSE)
    elif not found and not params["allow_unlicensed"]:
        raise SourceError(
            f"source {params['id']!r}: no license found for {name}; say which one it has with "
            f"{params['where']}.license, e.g. license: BSD-3-Clause, or set "
            f"{params['where']}.allow_unlicensed: true"
        )
    return found or UNKNOWN_LICENSE
