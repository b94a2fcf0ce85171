"""Raw input as found on this machine: files below a root, their digest and their origin.

What is written of a file depends on its path below the root, its bytes and the origin, never on
where the root lies, so the digest and the origin are what a stage's key holds.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.engine import ShardReport
from pipelines.errors import SourceError
from pipelines.manifest import Counts, canonical, sha256_file

FETCHED = "fetched.json"  # written last: the raw folder of a remote source is complete


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source comes from.

    `blob` is the URL that a path is appended to ("" where only the path is known). `licenses` maps
    folders below the root to the license of what lies in them, "" being the root. `created` is the
    time (ISO 8601) of the revision, where it has one.
    """

    revision: str
    url: str | None = None
    blob: str = ""
    author: str | None = None
    licenses: dict[str, str] = field(default_factory=dict)
    created: str | None = None


@dataclass(frozen=True, slots=True)
class Raw:
    """The raw files of one source, sorted by their path below `root`.

    `passed_over` counts the files that no record is made of, by reason. `hints` are what else the
    reader knows of the files that their paths and bytes do not say.
    """

    root: Path
    names: tuple[str, ...]
    origin: Origin
    passed_over: dict[str, int] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the paths of the files, in order."""
        return tuple(self.root / name for name in self.names)


@dataclass(frozen=True, slots=True)
class Window:
    """The dates (UTC) that a fetch is limited to: from `since` on, before `until`."""

    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch did: whether raw input changed, in words and in numbers."""

    changed: bool
    summary: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Read:
    """The shards of one source, the counts of what no shard holds, and what the report says."""

    reports: list[ShardReport]
    unread: Counts = field(default_factory=Counts)
    about: dict[str, Any] = field(default_factory=dict)


def list_folder(root: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, with "/" between parts.

    Hidden files and folders are passed over, and so is every symbolic link: what one points to
    inside the tree is found by itself, and what lies outside is not part of the source.
    """

    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def select_names(
    names: Iterable[str], suffix: str | tuple[str, ...], exclude: Iterable[str]
) -> tuple[str, ...]:
    """Return the names with a suffix (or one of several) that match none of the globs, sorted."""
    patterns = [glob_pattern(glob) for glob in exclude]
    return tuple(
        sorted(
            name
            for name in names
            if name.endswith(suffix) and not any(pattern.fullmatch(name) for pattern in patterns)
        )
    )


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Compile a path glob: `*` and `?` stay inside a part, `**` spans any number of parts.

    >>> bool(glob_pattern("**/tests/**").fullmatch("tests/unit/test_a.py"))
    True
    >>> bool(glob_pattern("*.py").fullmatch("package/a.py"))
    False
    """
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(parts.get(token, re.escape(token)) for token in tokens), re.DOTALL)


def digest_raw(raw: Raw) -> str:
    """Return the sha256 over every (path, sha256 of its bytes), "" for a file that is gone."""
    digest = hashlib.sha256()
    for name, path in zip(raw.names, raw.paths, strict=True):
        try:
            content = sha256_file(path)
        except OSError:
            content = ""
        digest.update(os.fsencode(name) + b"\0" + content.encode() + b"\n")
    if raw.passed_over or raw.hints:
        digest.update(canonical([raw.passed_over, raw.hints]).encode())
    return digest.hexdigest()
