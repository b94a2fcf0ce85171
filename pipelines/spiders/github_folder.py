"""The folder of a fetched repository: `<commit>/<path>`, and `commit.json`, which is written last.

A file counts as here when its bytes have the git hash that the commit's tree names. The commit
before stays until the next one, for whoever reads it just now.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipelines.store import sync_folder, write_atomic

COMMIT = "commit.json"
KEYS = {
    "name", "page", "license", "author", "ref", "sha", "tree", "created", "files", "left_out",
    "etags", "previous",
}  # fmt: skip


def read_commit(folder: Path) -> dict[str, Any]:
    """Return what the folder says of the commit it holds, {} where it holds none."""
    try:
        state: dict[str, Any] = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and state.keys() >= KEYS else {}


def is_whole(folder: Path, state: dict[str, Any]) -> bool:
    """Say whether every file of the commit is there with the bytes of the commit."""
    root = folder / str(state.get("sha"))
    return bool(state) and all(_has(root / name, sha) for name, sha in state["files"].items())


def git_hash(data: bytes) -> str:
    """Return the hash that git gives to a file's bytes: SHA-1 over a header and them."""
    header = f"blob {len(data)}\0".encode()
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


def _has(path: Path, sha: str) -> bool:
    try:
        return git_hash(path.read_bytes()) == sha
    except OSError:
        return False


def link_known(
    folder: Path, target: Path, files: dict[str, str], before: dict[str, Any]
) -> list[str]:
    """Link what the commit before has of the same bytes; return the names still to be fetched."""
    for left in folder.glob(".part-*"):
        left.unlink()
    known = {sha: name for name, sha in before.get("files", {}).items()}
    old = folder / str(before.get("sha"))
    missing = []
    for name, sha in files.items():
        path = target / name
        if _has(path, sha):
            continue
        if old != target and sha in known and _has(old / known[sha], sha):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            _link(old / known[sha], path)
        else:
            missing.append(name)
    return missing


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links
        write_file(new.parent, new, old.read_bytes())


def write_file(folder: Path, path: Path, data: bytes) -> None:
    """Write a file whole or not at all, by way of a temporary one in the folder."""
    part = folder / f".part-{os.getpid()}"
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    part.replace(path)


def publish(folder: Path, target: Path, state: dict[str, Any]) -> None:
    """Make a commit the folder's own, then remove all but it and the one before."""
    target.mkdir(parents=True, exist_ok=True)
    sync_folder(target)
    write_atomic(folder / COMMIT, json.dumps(state, indent=1, sort_keys=True) + "\n")
    sync_folder(folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in (state["sha"], state["previous"]):
            shutil.rmtree(path)
