"""Downloads data files at a pinned revision: from the Hugging Face hub, or raw from GitHub.

Nothing that is downloaded is run, and no file is kept that is shorter or other than it should be:
blobs of the hub's cache are named by their hash, GitHub's files are checked against `sha256`.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.errors import SourceError
from pipelines.hub_access import hub_errors
from pipelines.manifest import sha256_file
from pipelines.sources.dataset.layout import COMPRESSIONS, KINDS, list_files, select_files
from pipelines.sources.raw import Fetched

COMMIT = re.compile(r"[0-9a-f]{40}")
RAW_HOST = "https://raw.githubusercontent.com"
FILES = "files"  # the folder below a raw folder that mirrors the paths at the origin
ATTEMPTS = 4
TIMEOUT = 60.0
CARD = "README.md"


def fetch_hub(dataset: str, revision: str, files: tuple[str, ...], folder: Path) -> Fetched:
    """Bring the data files of a hub dataset into a folder, from the hub or from its cache."""
    snapshot = _snapshot(dataset, revision, files)
    names = select_files(list_files(snapshot), files, ())
    if not names:
        raise SourceError(
            f"dataset {dataset}@{revision[:12]}: no data files ({', '.join(KINDS)}); a dataset "
            "that is only a loading script is not read, scripts are never run"
        )
    card = [CARD] if (snapshot / CARD).is_file() else []
    changed = 0
    for name in (*names, *card):
        source, target = snapshot / name, folder / FILES / name
        _check_blob(source, f"dataset {dataset}: {name}")
        if not (target.is_file() and sha256_file(target) == sha256_file(source)):
            _place(target, partial(_link_or_copy, source))
            changed += 1
    size = sum((folder / FILES / name).stat().st_size for name in names)
    return _fetched(changed, len(names), size, f"{dataset}@{revision[:12]}")


def _snapshot(dataset: str, revision: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    suffixes = [f"*{suffix}{more}" for suffix in KINDS for more in ("", *COMPRESSIONS)]
    # The hub's patterns know no `**`; what is too much is left out when files are selected.
    asked = [glob.replace("**/", "*").replace("**", "*") for glob in files]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                dataset,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[*(asked or suffixes), CARD],
            )
        )
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise SourceError(
            f"dataset {dataset}: not found on the hub, private or gated; check the name, accept "
            "its terms on its page and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"dataset {dataset}: the hub has no revision {revision}") from error
    except (errors.IncompleteSnapshotError, errors.LocalEntryNotFoundError) as error:
        raise SourceError(
            f"dataset {dataset}@{revision[:12]}: the hub cannot be reached and its cache does not "
            "hold all files; connect once, or give a local `path:`"
        ) from error
    except hub_errors() as error:
        raise SourceError(
            f"dataset {dataset}@{revision[:12]}: cannot be downloaded "
            f"({type(error).__name__}); what has arrived is kept, try again"
        ) from error


def _check_blob(path: Path, where: str) -> None:
    """Raise SourceError where a file of the hub's cache does not hash to the name of its blob."""
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return
    if len(blob.name) == 64:
        found = sha256_file(blob)
    elif len(blob.name) == 40:
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
        with blob.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found = digest.hexdigest()
    else:
        return
    if found != blob.name:
        raise SourceError(
            f"{where}: the file in the hub's cache is damaged or cut off; delete {blob} and fetch "
            "again"
        )


def fetch_github(
    repository: str,
    revision: str,
    files: tuple[str, ...],
    sha256: Mapping[str, str],
    folder: Path,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Fetched:
    """Bring files of a GitHub repository into a folder; files that are there already stay."""
    changed = 0
    for name in files:
        target = folder / FILES / name
        wanted = sha256.get(name)
        # A file is put in its place whole, so that its presence says it arrived.
        if target.is_file() and (wanted is None or sha256_file(target) == wanted):
            continue
        url = f"{RAW_HOST}/{repository}/{revision}/{quote(name)}"
        _place(target, partial(_get, url, wanted, sleep))
        changed += 1
    size = sum((folder / FILES / name).stat().st_size for name in files)
    return _fetched(changed, len(files), size, f"{repository}@{revision[:12]}")


def _get(url: str, sha256: str | None, sleep: Callable[[float], None], part: Path) -> None:
    import httpx

    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(2.0**attempt)
        try:
            # Not compressed, so that the length of what arrives can be compared.
            with httpx.stream(
                "GET", url, headers={"accept-encoding": "identity"}, timeout=TIMEOUT
            ) as response:
                problem = f"HTTP {response.status_code}"
                if response.status_code == 200:
                    _write(response.iter_bytes(1 << 20), part)
                    return _check_download(url, part, sha256)
                if response.status_code < 500 and response.status_code != 429:
                    break
        except httpx.HTTPError as error:
            problem = type(error).__name__
    raise SourceError(
        f"{url}: cannot be downloaded ({problem}); check repository, revision and files, or give "
        "a local `path:`"
    )


def _check_download(url: str, part: Path, sha256: str | None) -> None:
    found = sha256_file(part)
    if sha256 is not None and found != sha256:
        raise SourceError(
            f"{url}: its sha256 is {found}, expected {sha256}; the file was changed or cut off"
        )


def _write(chunks: Iterator[bytes], part: Path) -> None:
    with part.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def _link_or_copy(source: Path, part: Path) -> None:
    try:
        os.link(source.resolve(), part)
    except OSError:
        shutil.copyfile(source, part)


def _place(target: Path, fill: Callable[[Path], Any]) -> None:
    """Fill a temporary file and rename it, so that a target is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        fill(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _fetched(changed: int, files: int, size: int, where: str) -> Fetched:
    if not changed:
        return Fetched(False, f"{where} is a pinned revision, nothing to fetch", {"files": files})
    counts = {"files": files, "new_files": changed, "bytes": size}
    return Fetched(True, f"{files} files, {size / 1e6:.1f} MB from {where}", counts)


def revision_problem(what: str, revision: str | None) -> str | None:
    """Say why a revision is not pinned, or return None."""
    if revision is not None and COMMIT.fullmatch(revision):
        return None
    found = f"revision {revision!r} may move" if revision else "no revision is given"
    return f"{what}: {found}; pin revision: <sha>, the 40 hex digits of a commit in its history"
