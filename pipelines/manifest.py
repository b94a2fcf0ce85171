"""What a finished stage says of itself: shards, counts, cost and where it came from.

Invariant, checked when a manifest is made: rows_in == rows_out + dropped + quarantined for a
stage that filters. The chain of manifests through `upstream` is the lineage.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

MANIFEST = "manifest.json"
# Made once: json.dumps() makes one for each call.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return _ENCODER.encode(value)


def digest_of(value: Any) -> str:
    """Return the hex sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a stage: rows, bytes, sha256 and the split it belongs to ('' before splits)."""

    file: str
    rows: int
    bytes: int
    sha256: str
    split: str = ""
    tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows in and out of a step, and why the others left. Adding two Counts adds every number.

    `expands` marks a stage whose rows do not map one to one (files -> functions, rows -> pieces,
    examples -> packed rows); there rows_out is free, but every row in is still accounted for by
    `rows_in == used + dropped + quarantined`.
    """

    rows_in: int = 0
    rows_out: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows_in + other.rows_in,
            self.rows_out + other.rows_out,
            self.used + other.used,
            _add(self.dropped, other.dropped),
            _add(self.quarantined, other.quarantined),
        )

    def check(self, where: str) -> None:
        """Raise AssertionError unless every row in was used, dropped or quarantined."""
        lost = sum(self.dropped.values()) + sum(self.quarantined.values())
        assert self.rows_in == self.used + lost, (
            f"{where}: {self.rows_in} rows in, but {self.used} used and {lost} dropped: {self}"
        )


def _add(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in sorted({*left, *right})}


@dataclass(frozen=True, slots=True)
class Cost:
    """What building took: wall and CPU seconds, and the peak resident memory in bytes."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of one finished stage. `key_parts` are the components the key was made of."""

    stage: str
    key: str
    key_parts: dict[str, Any]
    digest: str
    shards: tuple[Shard, ...]
    counts: Counts
    cost: Cost
    upstream: dict[str, str]
    upstream_keys: dict[str, str]
    report: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_sha: str = ""
    flow_run_id: str = ""
    created: str = ""

    def write(self, folder: Path) -> None:
        """Write the manifest into a stage folder that is not yet published."""
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=1, ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a manifest; raises OSError, ValueError or KeyError where it is not one."""
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        data["shards"] = tuple(Shard(**shard) for shard in data["shards"])
        data["counts"] = Counts(**data["counts"])
        data["cost"] = Cost(**data["cost"])
        return cls(**data)

    @property
    def tokens(self) -> int:
        """Tokens over all shards; 0 before tokenization."""
        return sum(shard.tokens for shard in self.shards)


def content_digest(shards: tuple[Shard, ...]) -> str:
    """Return the digest of a stage's content: names, splits, rows and hashes of its shards."""
    return digest_of([[s.file, s.split, s.rows, s.sha256] for s in shards])


def find_damage(folder: Path, needs_hash: Callable[[Path, Shard], bool]) -> str | None:
    """Say where a stage's files differ from its manifest, or None.

    Sizes are always compared, the sha256 of the shards of which `needs_hash` says so.
    """
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable manifest: {error}"
    if content_digest(manifest.shards) != manifest.digest:
        return "manifest and content digest differ"
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.exists():
            return f"{shard.file} is missing"
        if path.stat().st_size != shard.bytes:
            return f"{shard.file} has {path.stat().st_size} bytes, expected {shard.bytes}"
        if needs_hash(path, shard) and sha256_file(path) != shard.sha256:
            return f"{shard.file} does not match its sha256"
    return None
