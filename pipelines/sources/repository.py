"""Source `repository`: code from a folder, an archive, an installed distribution or GitHub.

Every readable file yields one `text` record and a prompt/completion record for each documented
definition; `group` is the file. `path` (folder or archive) wins over `distribution`, which wins
over `repository`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipelines.engine import Params, Work
from pipelines.errors import SourceError
from pipelines.manifest import Counts, digest_of
from pipelines.plan import data_root
from pipelines.settings.sources import RepositorySource
from pipelines.sources import github
from pipelines.sources.archive import ARCHIVES, digest_archive, is_archive, unpack
from pipelines.sources.checkout import ATTRIBUTES_FILE, IGNORE_FILE, list_checkout, read_attributes
from pipelines.sources.code_files import PYTHON, is_generated_name, is_vendored
from pipelines.sources.code_rows import extract_rows
from pipelines.sources.distribution import (
    describe,
    distribution_problem,
    find_installed,
    find_metadata,
    github_page,
)
from pipelines.sources.files import read_files
from pipelines.sources.licenses import LICENSE_FILE, folder_licenses
from pipelines.sources.raw import Fetched, Origin, Raw, Read, Window, digest_raw, select_names
from pipelines.store import locked

VENDORED, GENERATED = "linguist-vendored", "linguist-generated"
METADATA_FILES = ("PKG-INFO", "METADATA")


def find_problem(source: RepositorySource) -> str | None:
    """Say in one sentence why a source cannot be read on this machine, or return None."""
    if "file" not in source.kinds and not set(source.extensions) & set(PYTHON):
        return (
            f"kinds {list(source.kinds)} are of Python, but extensions are "
            f"{list(source.extensions)}; add `file` to kinds"
        )
    if source.path is not None:
        path = Path(source.path).expanduser()
        if path.is_dir() or (path.is_file() and is_archive(path)):
            return None
        return (
            f"path {source.path!r} is neither a folder nor an archive here; give a folder of code "
            f"or a file that ends in {', '.join(ARCHIVES)}"
        )
    if source.distribution is not None:
        return distribution_problem(source.distribution)
    return github.find_problem(source)


def is_remote(source: RepositorySource) -> bool:
    """Say whether a source has to be fetched before it is read."""
    return source.path is None and source.distribution is None


def fetch(source: RepositorySource, folder: Path, window: Window) -> Fetched:
    """Bring the repository's files up to date; a window is of no use, as a commit holds all."""
    return github.fetch(source, folder)


def read(source: RepositorySource, raw: Raw, work: Work, given: Params) -> Read:
    """Turn the files into shards of records; the report counts the definitions passed over."""
    settings = source.model_dump(
        mode="json",
        include={"kinds", "completion", "strip_doctests", "include_generated", "licenses"},
    )
    handwritten = frozenset(raw.hints.get("handwritten", ()))
    made = read_files(extract_rows, raw, work, {**given, **settings, "handwritten": handwritten})
    skipped: Counter[str] = Counter()
    for report in made.reports:
        skipped.update(report.extra["skipped"])
    left = raw.passed_over
    files = len(raw.names) + sum(left.values())
    about = {"files": files, "skipped_functions": dict(sorted(skipped.items()))}
    unread = made.unread + Counts(rows_in=sum(left.values()), dropped=left)
    return replace(made, unread=unread, about=about)


def locate(source: RepositorySource) -> Raw:
    """List the source's code files with their origin; SourceError where there are none."""
    problem = find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    if source.path is not None:
        path = Path(source.path).expanduser().absolute()
        raw = _locate_folder(source, path) if path.is_dir() else _locate_archive(source, path)
    elif source.distribution is not None:
        root, names, origin = find_installed(source.distribution, source.revision)
        raw = _select(source, root, names, origin)
    else:
        root, names, origin, left_out = github.find_fetched(source)
        raw = _select(source, root, names, origin)
        raw = replace(raw, passed_over={**left_out, **raw.passed_over})
    if not raw.names:
        where = source.path or source.distribution or source.repository
        raise SourceError(
            f"source {source.id!r}: no {' or '.join(source.extensions)} files in {where} "
            f"(exclude: {list(source.exclude)}, passed over: {raw.passed_over}); "
            "an editable install is read with `path:`"
        )
    return raw


def _locate_folder(source: RepositorySource, root: Path) -> Raw:
    found = list(list_checkout(root))
    raw = _select(source, root, found, Origin("", licenses=folder_licenses(root, found)))
    page = github_page(source.repository or "")
    # Without a revision nobody can tell which commit the folder is: its content names it.
    blob = f"{page}/blob/{source.revision}/" if page and source.revision else ""
    revision = source.revision or digest_raw(raw)[:16]
    return replace(raw, origin=replace(raw.origin, revision=revision, url=page, blob=blob))


def _locate_archive(source: RepositorySource, path: Path) -> Raw:
    """Unpack what is wanted of an archive below the data root, once for its bytes; list that."""
    digest = digest_archive(path)
    folder = data_root() / "raw" / f"archive-{digest_of([digest, source.extensions])[:16]}"

    def wanted(name: str) -> bool:
        last = name.rpartition("/")[2]
        rules = (ATTRIBUTES_FILE, IGNORE_FILE, *METADATA_FILES)
        return (
            name.endswith(source.extensions) or last in rules or bool(LICENSE_FILE.fullmatch(last))
        )

    with locked(folder.with_name(f".lock-{folder.name}")):
        if not folder.is_dir():
            unpack(path, folder, wanted)
    inner = list(folder.iterdir())
    # Whatever was packed, sdists and GitHub's archives hold one folder that has it all.
    root = inner[0] if len(inner) == 1 and inner[0].is_dir() else folder
    found = [name for name in list_checkout(root) if ".dist-info/" not in name]
    about = find_metadata(root)
    revision = source.revision or (about and about.get("Version")) or digest[:16]
    if about is not None:
        origin = describe(root, found, about, revision)
    else:
        page = github_page(source.repository or "")
        blob = f"{page}/blob/{source.revision}/" if page and source.revision else ""
        origin = Origin(revision, page, blob, licenses=folder_licenses(root, found))
    return _select(source, root, found, origin)


def _select(source: RepositorySource, root: Path, found: Iterable[str], origin: Origin) -> Raw:
    """Return the files that the settings want; those passed over are counted with the reason."""
    names = select_names(found, source.extensions, source.exclude)
    attributes = read_attributes(root, names, (VENDORED, GENERATED))
    kept, handwritten = [], []
    passed_over: Counter[str] = Counter()
    for name in names:
        vendored = attributes.get(name, VENDORED)
        generated = attributes.get(name, GENERATED)
        if generated is False:
            handwritten.append(name)
        if not source.include_vendored and (is_vendored(name) if vendored is None else vendored):
            passed_over["vendored"] += 1
        elif not source.include_generated and (
            is_generated_name(name) if generated is None else generated
        ):
            passed_over["generated"] += 1
        else:
            kept.append(name)
    hints = {"handwritten": handwritten} if handwritten else {}
    return Raw(root, tuple(kept), origin, dict(sorted(passed_over.items())), hints)
