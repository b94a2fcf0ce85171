"""Fetches the files of a hub dataset at one commit, from the network or the hub's own cache.

The files lie below a folder named after the commit; `origin.json`, written last, names it. So an
older commit stays readable until the newer one is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.errors import SourceError
from pipelines.hub_access import hub_errors
from pipelines.settings.sources import OasstSource
from pipelines.sources.fetch import fetched_folder
from pipelines.sources.oasst.rows import SUFFIXES
from pipelines.sources.raw import Fetched, glob_pattern
from pipelines.store import sync_folder, write_atomic

# What is read of a dataset where the settings do not say: the first kind that there is.
KINDS = (("*_ready.trees.jsonl.gz",), ("data/*.parquet", "*.parquet"), ("*.jsonl.gz", "*.jsonl"))
ORIGIN = "origin.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
NUMBERED = re.compile(r"(.*)-\d{5}-of-(\d{5})\..*")


def fetch_dataset(source: OasstSource, folder: Path) -> Fetched:
    """Bring the dataset at the wanted revision below `folder`; nothing changes where it is there.

    Raises SourceError where the hub cannot be reached and its cache does not help.
    """
    snapshot, names = _download(source)
    commit = snapshot.name
    known = _read_origin(folder)
    if known == {"commit": commit, "files": names} and _complete(folder / commit, snapshot, names):
        return Fetched(False, f"{source.dataset} has not changed since {commit[:12]}")
    for name in names:
        _copy(snapshot / name, folder / commit / name)
    write_atomic(folder / ORIGIN, json.dumps({"commit": commit, "files": names}) + "\n")
    for other in folder.iterdir():
        if other.is_dir() and other.name != commit:
            shutil.rmtree(other)
    size = sum((folder / commit / name).stat().st_size for name in names)
    summary = f"{len(names)} files of {source.dataset} at {commit[:12]}"
    return Fetched(True, summary, {"files": len(names), "bytes": size})


def fetched_files(source: OasstSource) -> tuple[Path, tuple[str, ...], str]:
    """Return root, file names and commit of a fetched dataset; SourceError where there is none."""
    folder = fetched_folder(source)
    origin = _read_origin(folder)
    if origin is None:
        raise SourceError(f"{folder}: no readable {ORIGIN}; delete the folder and fetch again")
    commit = str(origin["commit"])
    return folder / commit, tuple(origin["files"]), commit


def _download(source: OasstSource) -> tuple[Path, list[str]]:
    """Return the hub's snapshot folder, named after its commit, and the wanted files in it."""
    snapshot = None
    for globs in (source.files,) if source.files else KINDS:
        snapshot = _snapshot(source, globs)
        names = _wanted(snapshot, globs)
        if names:
            _check_numbered(source, names)
            return snapshot, names
    raise SourceError(
        f"source {source.id!r}: {source.dataset} at {snapshot.name if snapshot else '?'} holds no "
        f"files to read{f' that match {list(source.files)}' if source.files else ''}; name them "
        f"with `files:`, e.g. files: ['data/*.parquet'] (read are {', '.join(SUFFIXES)})"
    )


def _snapshot(source: OasstSource, globs: Iterable[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    asked = f"{source.dataset}{f' at {source.revision}' if source.revision else ''}"
    try:
        # The library takes a token from the environment by itself.
        found = snapshot_download(
            str(source.dataset),
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=list(globs),
        )
    except errors.GatedRepoError as error:
        cause = "it is gated: accept its terms on the hub and set HF_TOKEN"
        raise SourceError(f"source {source.id!r}: {asked}: {cause}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        cause = "no such dataset or revision on the hub; if it is private, set HF_TOKEN"
        raise SourceError(f"source {source.id!r}: {asked}: {cause}") from error
    except (
        errors.IncompleteSnapshotError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
    ) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        raise SourceError(
            f"source {source.id!r}: {asked} is not in the hub's cache and {why}; fetch it with "
            "network access or name a local `path:`"
        ) from error
    except hub_errors() as error:
        raise SourceError(
            f"source {source.id!r}: {asked} could not be fetched ({type(error).__name__}); what "
            "has arrived is kept, try again"
        ) from error
    return Path(found)


def _wanted(snapshot: Path, globs: Iterable[str]) -> list[str]:
    patterns = [glob_pattern(glob) for glob in globs]
    names = (p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())
    return sorted(
        name
        for name in names
        if name.endswith(SUFFIXES) and any(pattern.fullmatch(name) for pattern in patterns)
    )


def _check_numbered(source: OasstSource, names: Iterable[str]) -> None:
    """Raise SourceError where a series `x-00000-of-00003` has gaps, as a half-filled cache has."""
    series: dict[tuple[str, str], int] = {}
    for name in names:
        found = NUMBERED.fullmatch(name)
        if found:
            key = (found[1], found[2])
            series[key] = series.get(key, 0) + 1
    for (stem, total), count in series.items():
        if count != int(total):
            raise SourceError(
                f"source {source.id!r}: only {count} of {int(total)} files {stem}-* of "
                f"{source.dataset} are here; fetch again with network access"
            )


def _read_origin(folder: Path) -> dict[str, Any] | None:
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) else None


def _complete(here: Path, snapshot: Path, names: Iterable[str]) -> bool:
    sizes = ((here / name, (snapshot / name).stat().st_size) for name in names)
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes)


def _copy(origin: Path, target: Path) -> None:
    """Copy a file whole or not at all: temporary file, check of its hash, fsync, rename.

    Raises SourceError for a blob of the cache that does not hash to its name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    blob = origin.resolve()
    digest = hashlib.sha256()
    with blob.open("rb") as source, part.open("wb") as copy:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    if SHA256.fullmatch(blob.name) and digest.hexdigest() != blob.name:
        part.unlink()
        raise SourceError(
            f"{origin.name}: the file in the hub's cache is damaged or cut off; delete {blob} and "
            "fetch again"
        )
    part.replace(target)
    sync_folder(target.parent)
