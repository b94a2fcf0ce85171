"""Source `repository`: the Python files of a local folder (`path`) or an installed distribution.

Every readable file yields one `text` record and a prompt/completion record for each documented
function; `group` is the file. An installed distribution is found through its metadata and is
never imported; `path` wins where both are given.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from email.message import Message
from email.utils import getaddresses
from importlib import metadata
from pathlib import Path
from typing import cast
from urllib.parse import quote

from pipelines.engine import Outcome, Params, Reject, Work
from pipelines.errors import SourceError, did_you_mean
from pipelines.manifest import Counts, canonical
from pipelines.records import Row, clean_text, new_record, write_rows
from pipelines.source_settings import RepositorySource
from pipelines.sources.extract import Skipped, Unusable, extract_units, read_source
from pipelines.sources.files import read_files
from pipelines.sources.licenses import (
    folder_licenses,
    metadata_license,
    nearest_license,
    spdx_of,
)
from pipelines.sources.raw import (
    Fetched,
    Origin,
    Raw,
    Read,
    Window,
    digest_raw,
    list_folder,
    select_names,
)
from pipelines.syntax import BadSyntax, parse_python

GITHUB = re.compile(r"(?:https?://github\.com/|^)([\w.-]+/[\w.-]+?)(?:\.git)?/?")
UNKNOWN_LICENSE = "unknown"
SOURCE_LABELS = ("source", "sourcecode", "repository", "code", "github", "homepage")


def find_problem(source: RepositorySource) -> str | None:
    """Say in one sentence why a source cannot be read on this machine, or return None."""
    if source.path is not None:
        folder = Path(source.path).expanduser()
        if not folder.is_dir():
            return f"path {source.path!r} is not a folder here; give one with Python files"
        return None
    if source.distribution is not None:
        return _distribution_problem(source.distribution)
    return (
        "fetching from a remote repository is not available in this "
        "version; name an installed `distribution:` or a local `path:` (or run with data=FOLDER)"
    )


def _distribution_problem(name: str) -> str | None:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        known = {d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"]}
        return (
            f"distribution {name!r} is not installed{did_you_mean(name, sorted(known))}; "
            "install it or name a local `path:`"
        )
    return None


def is_remote(source: RepositorySource) -> bool:
    """Say whether a source has to be fetched before it is read."""
    return False


def fetch(source: RepositorySource, folder: Path, window: Window) -> Fetched:
    """Bring a remote source's raw files up to date."""
    raise NotImplementedError


def read(source: RepositorySource, raw: Raw, work: Work, given: Params) -> Read:
    """Turn the files into shards of records; the report counts the functions passed over."""
    made = read_files(extract, raw, work, given)
    skipped: Counter[str] = Counter()
    for report in made.reports:
        skipped.update(report.extra["skipped"])
    about = {"files": len(raw.names), "skipped_functions": dict(sorted(skipped.items()))}
    return replace(made, about=about)


def locate(source: RepositorySource) -> Raw:
    """List the source's Python files with their origin; SourceError where there are none."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    raw = _locate_folder(source) if source.path is not None else _locate_distribution(source)
    if not raw.names:
        where = source.path or f"distribution {source.distribution}"
        raise SourceError(
            f"source {source.id!r}: no Python files in {where} "
            f"(exclude: {list(source.exclude)}); an editable install is read with `path:`"
        )
    return raw


def _locate_folder(source: RepositorySource) -> Raw:
    root = Path(source.path or "").expanduser().absolute()
    found = list(list_folder(root))
    names = select_names(found, ".py", source.exclude)
    raw = Raw(root, names, Origin("", licenses=folder_licenses(root, found)))
    page = _github_page(source.repository or "")
    # Without a revision nobody can tell which commit the folder is: its content names it.
    blob = f"{page}/blob/{source.revision}/" if page and source.revision else ""
    revision = source.revision or digest_raw(raw)[:16]
    return replace(raw, origin=replace(raw.origin, revision=revision, url=page, blob=blob))


def _locate_distribution(source: RepositorySource) -> Raw:
    distribution = metadata.distribution(source.distribution or "")
    root = Path(str(distribution.locate_file("")))
    # Scripts and data are listed as ../../bin/...: they lie outside the packages.
    found = [f.as_posix() for f in distribution.files or () if ".." not in f.parts]
    packaged = [name for name in found if ".dist-info/" not in name]
    about = cast("Message[str, str]", distribution.metadata)
    named = metadata_license(about)
    page = _source_page(about.get_all("Project-URL") or [], about.get("Home-page"))
    revision = source.revision or distribution.version
    origin = Origin(
        revision=revision,
        url=page,
        blob=f"{page}/blob/{revision}/" if page else "",
        author=_author(about.get("Author-email"), about.get("Maintainer-email"))
        or about.get("Author")
        or about.get("Maintainer"),
        licenses={**folder_licenses(root, packaged), **({"": named} if named else {})},
    )
    return Raw(root, select_names(packaged, ".py", source.exclude), origin)


def _author(*fields: str | None) -> str | None:
    """Return the names in address fields; the addresses themselves are nobody's business."""
    names = [name for name, _ in getaddresses([field for field in fields if field]) if name]
    return ", ".join(dict.fromkeys(names)) or None


def _source_page(project_urls: Sequence[str], homepage: str | None) -> str | None:
    """Return the GitHub page among a distribution's links, preferring the one named source."""
    pages = {"homepage": homepage or ""}
    for entry in project_urls:
        label, _, url = entry.partition(",")
        pages[re.sub(r"[^a-z]", "", label.lower())] = url.strip()
    found = (_github_page(pages.get(label, "")) for label in SOURCE_LABELS)
    return next((page for page in found if page), None)


def _github_page(repository: str) -> str | None:
    """Return https://github.com/OWNER/NAME for an address or OWNER/NAME, else None."""
    found = GITHUB.fullmatch(repository)
    return f"https://github.com/{found[1]}" if found else None


def extract(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the records of some files; rows_in counts files, rows_out records.

    `params` holds root, id, where, license, origin, max_bytes and limit (records at most, or None).
    Raises SourceError for a file that no license is known of.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    quarantined: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    unread = 0
    for path in inputs:
        if params["limit"] is not None and len(rows) >= params["limit"]:
            unread += 1
            continue
        name = path.relative_to(params["root"]).as_posix()
        try:
            found = list(_read_file(path, name, params))
        except (Unusable, BadSyntax) as error:
            quarantined[error.reason] += 1
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
        used=len(inputs) - unread - quarantined.total(),
        dropped={"max_records": unread} if unread else {},
        quarantined=dict(sorted(quarantined.items())),
    )
    licenses = Counter(row["license"] for row in rows)
    extra = {"licenses": dict(sorted(licenses.items())), "skipped": dict(sorted(skipped.items()))}
    return Outcome(counts, rejects=tuple(rejects), extra=extra)


def _read_file(path: Path, name: str, params: Params) -> Iterator[Row | Skipped]:
    if clean_text(name) is None:
        raise Unusable("bad_file_name")
    text = read_source(path, params["max_bytes"])
    tree = parse_python(text)
    source, origin = params["id"], params["origin"]
    license_ = params["license"] or spdx_of(text) or nearest_license(name, origin["licenses"])
    if not license_ and not params["allow_unlicensed"]:
        raise SourceError(
            f"source {source!r}: no license found for {name}; say which one it has with "
            f"{params['where']}.license, e.g. license: BSD-3-Clause, or set "
            f"{params['where']}.allow_unlicensed: true"
        )
    common = {
        "group": f"{source}:{name}",
        "source": source,
        "revision": origin["revision"],
        "author": origin["author"],
        "license": license_ or UNKNOWN_LICENSE,
    }
    url = origin["blob"] + (quote(name) if origin["blob"] else name)
    meta = {"path": name, "lines": [1, text.count("\n") + (not text.endswith("\n"))]}
    yield new_record(
        **common, id=f"{source}:{name}", url=url, text=text, meta=canonical(meta | {"kind": "file"})
    )
    for unit in extract_units(text, tree):
        if isinstance(unit, Skipped):
            yield unit
            continue
        meta = {"path": name, "lines": list(unit.lines), "kind": "function"}
        yield new_record(
            **common,
            id=f"{source}:{name}::{unit.name}",
            url=f"{url}#L{unit.lines[0]}-L{unit.lines[1]}",
            prompt=unit.prompt,
            completion=unit.completion,
            meta=canonical(meta),
        )
