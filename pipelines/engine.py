"""Runs shard functions: on threads, in processes or on a cluster, always with the same result.

A shard function has the shape `(inputs, output, params) -> Outcome`: it reads its input paths and
writes the file `output`. The engine gives it a temporary path, syncs, hashes and renames the file,
and leaves a sidecar with the report, so that a killed build redoes only unfinished shards and a
lost worker process costs only its own.
"""

import json
import logging
import os
import resource
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pipelines.manifest import Counts, Shard, sha256_file

logger = logging.getLogger(__name__)

Params = dict[str, Any]
Reject = dict[str, str]  # {"id", "reason", "detail"}
Runner = Literal["threads", "processes"]

SAMPLES_PER_REASON = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a shard function says of the file it wrote. `rejects` samples what it left out."""

    counts: Counts
    tokens: int = 0
    trained_tokens: int = 0
    rejects: tuple[Reject, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A finished shard with the counts of making it."""

    shard: Shard
    counts: Counts
    rejects: tuple[Reject, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Built:
    """What a stage's `build` returns: its shards in order, and a free report for the manifest.

    `counts` replaces the sum over the shards where a global step decides (dedup, packing).
    """

    shards: tuple[ShardReport, ...]
    report: dict[str, Any] = field(default_factory=dict)
    counts: Counts | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """A finished upstream stage as a builder sees it."""

    folder: Path
    shards: tuple[Shard, ...]
    report: dict[str, Any]

    def paths(self, split: str | None = None) -> list[tuple[Shard, Path]]:
        """Return (shard, path) in order, optionally of one split only."""
        return [(s, self.folder / s.file) for s in self.shards if split in (None, s.split)]


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to make: its file name, its split, and the paths it reads."""

    file: str
    inputs: tuple[Path, ...]
    split: str = ""


ShardFunction = Callable[[Sequence[Path], Path, Params], Outcome]


class Usage(NamedTuple):
    """CPU seconds used so far and peak resident bytes of this process."""

    cpu: float
    peak_rss: int


def usage() -> Usage:
    """Return this process's CPU seconds and peak resident memory in bytes."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(now.ru_utime + now.ru_stime, peak_rss_bytes(now.ru_maxrss))


def peak_rss_bytes(ru_maxrss: int) -> int:
    """Return ru_maxrss in bytes: Linux counts KiB, macOS bytes."""
    return ru_maxrss if sys.platform == "darwin" else ru_maxrss * 1024


class Cluster(Protocol):
    """Makes shards on other machines, which see the same files below the same paths."""

    @property
    def workers(self) -> int:
        """How many shards are made at a time."""

    def make(
        self, function: ShardFunction, folder: Path, jobs: Sequence[Job], params: Params
    ) -> Iterator[tuple[Job, ShardReport, Usage]]:
        """Yield each job with its report and cost, in any order, those of lost workers left out."""


class Work:
    """The folder a stage is being built in, and the way to fill it."""

    def __init__(self, path: Path, *, workers: int = 1, cluster: Cluster | None = None) -> None:
        """Open a build folder; who makes the shards never changes the result, only the time."""
        self.path = path
        self.cluster = cluster
        self.workers = max(1, cluster.workers if cluster else workers)
        self.kept_files: list[str] = []
        self.child_cpu = 0.0
        self.child_peak_rss = 0

    def map(
        self,
        function: ShardFunction,
        jobs: Iterable[Job],
        params: Params,
        *,
        runner: Runner = "threads",
    ) -> tuple[ShardReport, ...]:
        """Make every job's shard, skipping those already finished; return reports in job order.

        `runner` chooses between threads and processes of this machine; a cluster takes either.
        """
        jobs = list(jobs)
        if not jobs:
            return ()
        done = {job.file: find_finished(self.path, job) for job in jobs}
        missing = [job for job in jobs if done[job.file] is None]
        if not missing:
            return tuple(report for report in done.values() if report is not None)
        if len(missing) < len(jobs):
            left = len(jobs) - len(missing)
            logger.info("%s: going on after %d of %d shards", self.path.name, left, len(jobs))
        # A lone shard needs no pool; one that is left because it kills its worker does.
        here = self.workers == 1 or len(jobs) == 1
        for attempt in range(3):
            made = self._run_here if here else self._run
            for job, report, cost in made(function, missing, params, runner):
                done[job.file] = report
                self.child_cpu += cost.cpu
                self.child_peak_rss = max(self.child_peak_rss, cost.peak_rss)
            missing = [job for job in missing if done[job.file] is None]
            if not missing:
                break
            logger.warning("a worker process died; %d shards again (%d)", len(missing), attempt + 1)
        else:
            raise RuntimeError(
                f"worker processes died three times while making {missing[0].file}; "
                "most likely out of memory: lower `workers`"
            )
        return tuple(report for report in done.values() if report is not None)

    def one(self, function: ShardFunction, job: Job, params: Params) -> ShardReport:
        """Make a single shard in this process."""
        return self.map(function, [job], params)[0]

    def keep(self, file: str) -> Path:
        """Name a side file (report picture, tokenizer) that belongs to the finished stage."""
        self.kept_files.append(file)
        return self.path / file

    def samples(self, reports: Iterable[ShardReport]) -> dict[str, list[Reject]]:
        """Return at most SAMPLES_PER_REASON rejects for each reason, in shard order."""
        found: dict[str, list[Reject]] = {}
        for report in reports:
            for reject in report.rejects:
                rows = found.setdefault(reject["reason"], [])
                if len(rows) < SAMPLES_PER_REASON:
                    rows.append(reject)
        return found

    def _run_here(
        self, function: ShardFunction, jobs: list[Job], params: Params, _: Runner
    ) -> Iterable[tuple[Job, ShardReport, Usage]]:
        for job in jobs:
            report, _cost = make_shard(function, self.path, job, params)
            yield job, report, Usage(0.0, 0)

    def _run(
        self, function: ShardFunction, jobs: list[Job], params: Params, runner: Runner
    ) -> Iterable[tuple[Job, ShardReport, Usage]]:
        if self.cluster is not None:
            yield from self.cluster.make(function, self.path, jobs, params)
            return
        with self._executor(runner, len(jobs)) as pool:
            futures = [pool.submit(make_shard, function, self.path, job, params) for job in jobs]
            try:
                for job, future in zip(jobs, futures, strict=True):
                    report, cost = future.result()
                    # Threads burn this process's own time, which the store already counts.
                    yield job, report, cost if runner == "processes" else Usage(0.0, 0)
            except BrokenProcessPool:
                return
            finally:
                for future in futures:
                    future.cancel()

    def _executor(self, runner: Runner, num_jobs: int) -> AbstractContextManager[Executor]:
        if runner == "threads":
            return ThreadPoolExecutor(min(self.workers, num_jobs), thread_name_prefix="shard")
        # Not for the ranks of a training run, which map nothing.
        from loky import get_reusable_executor

        # The same processes for every map of the program: starting one costs as much as a shard.
        pool = get_reusable_executor(
            self.workers, initializer=die_with_parent, initargs=(os.getpid(),)
        )
        return nullcontext(pool)


def find_finished(folder: Path, job: Job) -> ShardReport | None:
    """Return the report of a job's shard where it is there as it was made, else None."""
    try:
        data = json.loads(_sidecar(folder / job.file).read_text(encoding="utf-8"))
        shard = Shard(**data["shard"])
        path = folder / shard.file
        if path.stat().st_size != shard.bytes or sha256_file(path) != shard.sha256:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    counts = Counts(**data["counts"])
    return ShardReport(shard, counts, tuple(data["rejects"]), data["extra"])


def make_shard(
    function: ShardFunction, folder: Path, job: Job, params: Params
) -> tuple[ShardReport, Usage]:
    """Make one shard: temporary file, fsync, rename, sidecar. Returns its report and its cost."""
    before = usage()
    final = folder / job.file
    # A machine that was given up may still be at the same shard, with the same process number.
    attempt = f"{os.getpid()}-{threading.get_ident()}-{secrets.token_hex(4)}"
    part = folder / f".{job.file}.{attempt}.part"
    outcome = function(job.inputs, part, params)
    outcome.counts.check(job.file)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    shard = Shard(
        file=job.file,
        rows=outcome.counts.rows_out,
        bytes=part.stat().st_size,
        sha256=sha256_file(part),
        split=job.split,
        tokens=outcome.tokens,
        trained_tokens=outcome.trained_tokens,
    )
    report = ShardReport(shard, outcome.counts, outcome.rejects, outcome.extra)
    part.replace(final)
    sidecar = _sidecar(final)
    temporary = sidecar.with_name(f"{sidecar.name}.{attempt}.part")
    temporary.write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")
    temporary.replace(sidecar)
    after = usage()
    return report, Usage(after.cpu - before.cpu, after.peak_rss)


def _sidecar(path: Path) -> Path:
    return path.with_name(f".{path.name}.report.json")


def die_with_parent(parent: int) -> None:
    """Start a thread that ends this worker process when its parent is gone (kill -9 included).

    Pool workers hold both ends of their queue, so they never see an end of file by themselves.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="die-with-parent").start()
