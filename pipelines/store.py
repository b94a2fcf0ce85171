"""Content-addressed stage store: a finished stage is a folder whose name is the hash of its cause.

Invariants: a folder `<root>/<stage>/<key16>` exists only complete (it is built in the sibling
`.building-<key16>`, synced, its manifest written last, then renamed); a hit is checked against its
manifest before use; one builder at a time holds a key's flock. Whatever is killed whenever, the
next build starts from the shards that were finished.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.engine import Built, Cluster, Work, usage
from pipelines.errors import DiskFull, StoreError
from pipelines.jsonlines import read_lines
from pipelines.manifest import (
    MANIFEST,
    Cost,
    Counts,
    Manifest,
    Shard,
    content_digest,
    digest_of,
    find_damage,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageRef:
    """The small reference that travels between tasks: where a stage's result is, and its size."""

    stage: str
    key: str
    digest: str
    folder: str
    rows: int
    tokens: int
    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What a stage's key is made of. Upstream enters by content digest: equal bytes, equal key."""

    stage: str
    params: dict[str, Any]
    code: str
    upstream: dict[str, StageRef] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        """Return the components of the key, as `starloom why` compares them."""
        return {
            "stage": self.stage,
            "params": self.params,
            "code": self.code,
            "upstream": {name: ref.digest for name, ref in self.upstream.items()},
            "versions": self.versions,
        }

    @property
    def key(self) -> str:
        """Return the hex sha256 that names this build."""
        return digest_of(self.parts)


Builder = Callable[[Work], Built]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on a file for the block; the kernel releases it when we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class Store:
    """All finished stages below one folder."""

    def __init__(
        self,
        root: Path,
        *,
        workers: int = 1,
        context: dict[str, str] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        """Open a store; `context` (git sha, flow run id, recipe) is noted in new manifests."""
        self.root = root
        self.workers = workers
        self.cluster = cluster
        self.context = context or {}
        self._hashed: set[tuple[str, str]] = set()

    def path(self, ref: StageRef) -> Path:
        """Return the folder of a finished stage."""
        return self.root / ref.folder

    def manifest(self, ref: StageRef) -> Manifest:
        """Read the manifest of a finished stage; StoreError where it is gone."""
        return self.read(self.path(ref))

    def read(self, folder: Path) -> Manifest:
        """Read a stage folder's manifest; StoreError where it is missing or damaged."""
        try:
            return Manifest.read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder}: no readable {MANIFEST} ({error}); run the same command again to rebuild"
            ) from error

    def shards(self, ref: StageRef, split: str | None = None) -> list[tuple[Shard, Path]]:
        """Return (shard, path) in order, optionally of one split only."""
        folder = self.path(ref)
        found = self.manifest(ref).shards
        return [(s, folder / s.file) for s in found if split is None or s.split == split]

    def find(self, spec: StageSpec) -> StageRef | None:
        """Return the finished, valid stage for a spec, or None. A damaged one is set aside."""
        folder = self._folder(spec)
        if not folder.exists():
            return None
        problem = self.damage(folder)
        if problem is None:
            return self._ref(folder, self.read(folder), cached=True)
        logger.warning("%s is damaged (%s): building it again", folder, problem)
        aside = folder.with_name(f".damaged-{folder.name}-{time.time_ns()}")
        folder.rename(aside)
        return None

    def damage(self, folder: Path, *, rehash: bool = False) -> str | None:
        """Say what is wrong with a stage folder, or None. Hashes on first use, sizes always."""
        hashed: set[tuple[str, str]] = set()

        def needs_hash(path: Path, shard: Shard) -> bool:
            once = (str(path), shard.sha256)
            hashed.add(once)
            return rehash or once not in self._hashed

        damage = find_damage(folder, needs_hash)
        if damage is None:
            self._hashed |= hashed
        return damage

    def build(self, spec: StageSpec, builder: Builder) -> StageRef:
        """Return the stage for a spec, building it where it is not there yet.

        Raises DiskFull when space runs out (finished shards stay for the next attempt).
        """
        folder = self._folder(spec)
        with locked(folder.with_name(f".lock-{folder.name}")):
            found = self.find(spec)
            if found is not None:
                self._log(spec, cached=True)
                return found
            partial = folder.with_name(f".building-{folder.name}")
            partial.mkdir(parents=True, exist_ok=True)
            try:
                ref = self._build(spec, builder, partial, folder)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise DiskFull(
                    f"{partial}: no space left while building stage {spec.stage!r}; "
                    "free some space and run the same command again, finished shards are kept"
                ) from error
            self._log(spec, cached=False)
            return ref

    def _build(self, spec: StageSpec, builder: Builder, partial: Path, folder: Path) -> StageRef:
        started, before = time.monotonic(), usage()
        work = Work(partial, workers=self.workers, cluster=self.cluster)
        built = builder(work)
        counts = built.counts or sum((r.counts for r in built.shards), Counts())
        counts.check(spec.stage)
        after = usage()
        shards = tuple(report.shard for report in built.shards)
        manifest = Manifest(
            stage=spec.stage,
            key=spec.key,
            key_parts=spec.parts,
            digest=content_digest(shards),
            shards=shards,
            counts=counts,
            cost=Cost(
                seconds=round(time.monotonic() - started, 3),
                cpu_seconds=round(after.cpu - before.cpu + work.child_cpu, 3),
                peak_rss=max(after.peak_rss, work.child_peak_rss),
            ),
            upstream={name: ref.digest for name, ref in spec.upstream.items()},
            upstream_keys={name: ref.folder for name, ref in spec.upstream.items()},
            report={**built.report, "samples": work.samples(built.shards)},
            versions=spec.versions,
            git_sha=self.context.get("git_sha", ""),
            flow_run_id=self.context.get("flow_run_id", ""),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        keep = {shard.file for shard in shards} | set(work.kept_files)
        for path in partial.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        manifest.write(partial)
        sync_folder(partial)
        partial.replace(folder)
        sync_folder(folder.parent)
        self._hashed.update((str(folder / s.file), s.sha256) for s in shards)
        return self._ref(folder, manifest, cached=False)

    def _ref(self, folder: Path, manifest: Manifest, *, cached: bool) -> StageRef:
        return StageRef(
            stage=manifest.stage,
            key=manifest.key,
            digest=manifest.digest,
            folder=str(folder.relative_to(self.root)),
            rows=manifest.counts.rows_out,
            tokens=manifest.tokens,
            seconds=manifest.cost.seconds,
            cached=cached,
        )

    def _folder(self, spec: StageSpec) -> Path:
        return self.root / spec.stage / spec.key[:16]

    def _log(self, spec: StageSpec, *, cached: bool) -> None:
        """Note the use of a key, which is what `starloom why` compares."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": self.context.get("recipe", ""),
            "cached": cached,
            "key": spec.key,
            "parts": spec.parts,
        }
        with (self.root / spec.stage / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def log(self, stage: str) -> list[dict[str, Any]]:
        """Return the uses of a stage, oldest first (a line cut by a kill is passed over)."""
        return read_lines(self.root / stage / "log.jsonl")

    def collect_garbage(self, keep: set[str], older_than: float) -> dict[str, int]:
        """Remove abandoned builds, damaged stages and finished stages not in `keep`.

        `keep` holds folders relative to the root; only what is untouched for `older_than` seconds
        and not being built goes. Returns {folder: bytes freed}.
        """
        freed = {}
        for folder in sorted(self.root.glob("*/*/")):
            name = str(folder.relative_to(self.root))
            if name in keep or time.time() - folder.stat().st_mtime < older_than:
                continue
            lock = folder.with_name(f".lock-{folder.name.removeprefix('.building-')[:16]}")
            with lock.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                freed[name] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                shutil.rmtree(folder)
        return freed

    def verify(self) -> dict[str, str]:
        """Hash every finished stage again; return {folder: problem} for the damaged ones."""
        problems = {}
        for folder in sorted(self.root.glob("*/[!.]*/")):
            problem = self.damage(folder, rehash=True)
            if problem:
                problems[str(folder.relative_to(self.root))] = problem
        return problems


def ref_to_dict(ref: StageRef) -> dict[str, Any]:
    """Return a reference as plain JSON data."""
    return asdict(ref)


def as_cached(ref: StageRef) -> StageRef:
    """Return the same reference marked as a hit."""
    return replace(ref, cached=True)
