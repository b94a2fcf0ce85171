"""Measures the stage `dedup` against other libraries: MB per CPU second, precision, recall.

    python -m benchmarks.curation.dedup [--megabytes 250] [--folder FOLDER]
    python -m benchmarks.curation.dedup --scaling [--rounds 5]

One command builds the corpus, runs every arm in a process of its own (user and system seconds of it
and its children count) and prints the table. The peers need
`python -m venv benchmarks/.venv && benchmarks/.venv/bin/pip install -r benchmarks/peers.txt`.
Starloom's arm is the whole stage from shards to filtered shards; a peer's ends with its list.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.curation import dedup_quality
from benchmarks.curation.corpus import write_corpus
from pipelines.engine import Built, Job, Outcome, Params, Work
from pipelines.manifest import Counts
from pipelines.plan import build_stage, get_stage
from pipelines.recipe import load_recipe
from pipelines.records import read_rows, write_rows
from pipelines.store import StageSpec, Store

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE.parent / ".venv" / "bin" / "python"
# (arm, distribution, bar, whether it is slower than 1 MB per CPU second and runs on a sample)
PEERS = (
    ("rensa", "rensa", 2.0, False),
    ("datasketch", "datasketch", 3.5, False),
    ("text-dedup", "text-dedup", 15.0, False),
    ("datatrove", "datatrove", 20.0, True),
)
SAMPLE_MEGABYTES = 8


class Cost(NamedTuple):
    """User and system seconds, and the peak resident MB of the largest process."""

    seconds: float
    peak_mb: float


def measure(command: list[str]) -> Cost:
    """Run a command in a child that reports what it and its children took."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "if done.returncode: sys.exit(done.stderr.decode()[-2000:])\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    seconds, peak = map(float, done.stdout.split())
    return Cost(seconds, peak)


def copy_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    shutil.copyfile(inputs[0], output)
    rows = pq.read_metadata(output).num_rows
    return Outcome(Counts(rows_in=rows, rows_out=rows, used=rows))


def meet(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Import what the stage needs, and wait until every other worker has done so."""
    importlib.import_module("pipelines.curate.dedup")
    pa.array(np.zeros(1))
    inputs[0].touch()
    while not all(path.exists() for path in inputs):
        time.sleep(0.005)
    output.touch()
    return Outcome(Counts())


def run_stage(corpus: Path, root: Path, workers: int) -> None:
    """Build the stage over a folder of shards, as the plan does.

    Neither imports nor the start of workers are a stage's: those before it did that.
    """
    pa.array(np.zeros(1))  # Arrow imports pandas for its first array

    def build(work: Work) -> Built:
        marks = [work.path / f"worker-{number}" for number in range(workers)]
        turns = [(*marks[n:], *marks[:n]) for n in range(workers)]
        jobs = [Job(f"met-{n}", turn) for n, turn in enumerate(turns)]
        work.map(meet, jobs, {}, runner="processes")
        jobs = [Job(path.name, (path,)) for path in sorted(corpus.glob("records-*.parquet"))]
        return Built(work.map(copy_shard, jobs, {}))

    store = Store(root, workers=workers)
    names = [path.name for path in corpus.glob("*.parquet")]
    stage = get_stage("dedup")
    [before] = stage.upstream
    upstream = store.build(StageSpec(before, {"files": sorted(names)}, "benchmark"), build)
    ref = build_stage(stage, load_recipe("quickstart"), {before: upstream}, store)
    manifest = store.manifest(ref)
    report = {
        "folder": str(store.path(ref)),
        "cpu": manifest.cost.cpu_seconds,
        "seconds": manifest.cost.seconds,
        "digest": manifest.digest,
        "report": manifest.report,
        "dropped": manifest.counts.dropped,
    }
    (root / "benchmark.json").write_text(json.dumps(report))


def measure_stage(corpus: Path, root: Path, workers: int = 1) -> tuple[Cost, dict]:
    """Return the whole process's cost, and what the stage says of itself."""
    command = [sys.executable, "-m", "benchmarks.curation.dedup", "--stage", str(corpus)]
    cost = measure([*command, "--folder", str(root), "--workers", str(workers)])
    return cost, json.loads((root / "benchmark.json").read_text())


def make_sample(corpus: Path, sample: Path, megabytes: float) -> float:
    """Write the first records of a corpus; return their MB."""
    sample.mkdir(exist_ok=True)
    rows, size = [], 0
    for path in sorted(corpus.glob("records-*.parquet")):
        for row in read_rows(path):
            rows.append(row)
            size += len(row["text"].encode())
            if size >= megabytes * 1e6:
                write_rows(sample / "records-00000.parquet", rows)
                return size / 1e6
    raise RuntimeError("the corpus is smaller than the sample")


def table(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure_all(folder: Path, megabytes: float) -> None:
    """Print every table."""
    corpus, sample = folder / "corpus", folder / "sample"
    if not (corpus / "truth.parquet").exists():
        write_corpus(corpus, megabytes, 42)
    texts = dedup_quality.read_corpus(corpus)
    size = sum(len(text.encode()) for text in texts.values()) / 1e6
    sampled = make_sample(corpus, sample, SAMPLE_MEGABYTES)
    print(headline(size, len(texts)), flush=True)
    shutil.rmtree(folder / "first", ignore_errors=True)
    cost, ours = measure_stage(corpus, folder / "first")
    sure = dedup_quality.sure_pairs(pq.read_table(corpus / "truth.parquet").to_pylist(), texts)
    rate = size / cost.seconds
    head = ["arm", "corpus MB", "CPU s", "MB/CPU s", "starloom is", "bar", "peak MB", "removed",
            "planted recall"]  # fmt: skip
    clusters = pq.read_table(Path(ours["folder"]) / "clusters.parquet").to_pylist()
    gone = [entry["id"] for entry in clusters if entry["reason"] != "kept"]
    rows = [head, line("starloom, whole stage", size, cost.seconds, rate, 0, cost, gone, sure)]
    for arm, distribution, bar, sampling in PEERS:
        data, megabytes = (sample, sampled) if sampling else (corpus, size)
        output = folder / f"{arm}.json"
        script = str(HERE / "dedup_peers.py")
        cost = measure([str(PEER_PYTHON), script, arm, str(data), str(output)])
        names = json.loads(output.read_text())
        pairs = {} if sampling else sure
        rows.append(
            line(peer_name(distribution), megabytes, cost.seconds, rate, bar, cost, names, pairs)
        )
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"\n{table(rows)}\n", flush=True)
    print(quality(clusters, texts, sure), flush=True)
    print(refresh(corpus, folder, ours), flush=True)
    print(growth(corpus, folder), flush=True)


def headline(size: float, records: int) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "pyarrow"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"{stamp}, {platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, Python "
        f"{platform.python_version()}, {versions}; load {os.getloadavg()[0]:.1f}; corpus "
        f"{size:.0f} MB, {records:,} records"
    )


def peer_name(distribution: str) -> str:
    code = f"from importlib import metadata; print(metadata.version({distribution!r}))"
    done = subprocess.run(
        [str(PEER_PYTHON), "-c", code], capture_output=True, text=True, check=True
    )
    return f"{distribution} {done.stdout.strip()}"


def line(
    name: str,
    size: float,
    seconds: float,
    ours: float,
    bar: float,
    cost: Cost,
    gone: list[str],
    sure: Collection,
) -> list[str]:
    rate, lost = size / seconds, set(gone)
    recall = sum(bool(lost.intersection(pair)) for pair in sure) / len(sure) if sure else None
    return [
        name, f"{size:.1f}", f"{seconds:.2f}", f"{rate:.2f}",
        f"{ours / rate:.1f}x" if bar else "", f"{bar}x" if bar else "",
        f"{cost.peak_mb:.0f}", f"{len(gone):,}", "" if recall is None else f"{recall:.4f}",
    ]  # fmt: skip


def quality(clusters: list[dict], texts: dict[str, str], sure: dict) -> str:
    """Return precision, and the recall by kind over pairs in one cluster."""
    right, removed = dedup_quality.precision(clusters, texts)
    cluster = {entry["id"]: entry["cluster"] for entry in clusters}
    found = [(k, cluster.get(a, a) == cluster.get(b, b)) for (a, b), k in sure.items()]
    rows = [["kind", "planted pairs", "found", "recall"]]
    for kind in (*sorted({kind for kind, _ in found}), "all"):
        mine = [hit for name, hit in found if kind in (name, "all")]
        rows.append([kind, str(len(mine)), str(sum(mine)), f"{sum(mine) / len(mine):.4f}"])
    return (
        f"Precision {right / removed:.4f}: {right:,} of {removed:,} removed records have a similar "
        f"member of their cluster by sets of strings.\n\n{table(rows)}\n"
    )


def refresh(corpus: Path, folder: Path, full: dict) -> str:
    """Return what it costs to add the last shard to all others."""
    root, grown = folder / "grown", folder / "grown-corpus"
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(grown, ignore_errors=True)
    grown.mkdir()
    *old, new = sorted(corpus.glob("records-*.parquet"))
    for path in old:
        os.link(path, grown / path.name)
    measure_stage(grown, root)
    os.link(new, grown / new.name)
    _, after = measure_stage(grown, root)
    signed = after["report"]["signatures"]
    equal = after["digest"] == full["digest"]
    return (
        f"Refresh with 1 new shard of {signed['shards']}: {signed['reused']} signed before, "
        f"{after['report']['compared']:,} records compared, {after['cpu']:.2f} CPU s against "
        f"{full['cpu']:.2f} at first ({after['cpu'] / full['cpu']:.0%}); same result: {equal}.\n"
    )


def scaling(folder: Path, megabytes: float, rounds: int) -> str:
    """Return wall and CPU seconds of the stage for 1 and 2 workers: medians of alternating rounds.

    What is not done by shards (joins of exact repeats, components, tables) is one worker's work.
    """
    corpus = folder / "corpus"
    if not (corpus / "truth.parquet").exists():
        write_corpus(corpus, megabytes, 42)
    taken: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    loads, digests = [], set()
    for _ in range(rounds):
        for workers, times in taken.items():
            shutil.rmtree(folder / "scaling", ignore_errors=True)
            loads.append(os.getloadavg()[0])
            _, said = measure_stage(corpus, folder / "scaling", workers)
            times.append((said["seconds"], said["cpu"]))
            digests.add(said["digest"])
    rows = [["workers", "wall s", "CPU s", "CPU s per wall s", "faster"]]
    first = statistics.median(wall for wall, _ in taken[1])
    for workers, times in taken.items():
        wall, cpu = (statistics.median(each) for each in zip(*times, strict=True))
        rows.append(
            [str(workers), f"{wall:.2f}", f"{cpu:.2f}", f"{cpu / wall:.2f}", f"{first / wall:.2f}x"]
        )
    same = "the same bytes" if len(digests) == 1 else "OTHER BYTES"
    return (
        f"{rounds} rounds, load before a run {min(loads):.1f} to {max(loads):.1f} on "
        f"{os.cpu_count()} CPUs, {same}; bar 1.7x\n\n{table(rows)}"
    )


def growth(corpus: Path, folder: Path) -> str:
    """Return what a quarter of the corpus, all of it and four times as much cost."""
    rows = [["corpus MB", "records", "CPU s", "MB/CPU s", "peak MB"]]
    shards = sorted(corpus.glob("records-*.parquet"))
    for name, chosen, copies in (("quarter", shards[::4], 1), ("four", shards, 4)):
        grown = folder / name
        shutil.rmtree(grown, ignore_errors=True)
        shutil.rmtree(folder / f"{name}-store", ignore_errors=True)
        size, records = write_copies(chosen, grown, copies)
        cost, _ = measure_stage(grown, folder / f"{name}-store")
        rate = size / cost.seconds
        rows.append(
            [f"{size:.0f}", f"{records:,}", f"{cost.seconds:.2f}", f"{rate:.1f}",
             f"{cost.peak_mb:.0f}"]
        )  # fmt: skip
    return table(rows)


def write_copies(shards: Sequence[Path], folder: Path, copies: int) -> tuple[float, int]:
    """Write shards several times with other words each time; return MB and number of records."""
    folder.mkdir()
    size = records = 0
    for copy in range(copies):
        for path in shards:
            rows = list(read_rows(path))
            for row in rows:
                row["id"] = f"{copy}:{row['id']}"
                row["group"] = f"{copy}:{row['group']}"
                row["text"] = row["text"].replace("e", f"e{copy}" if copy else "e")
                size += len(row["text"].encode())
            records += write_rows(folder / f"records-{copy}{path.stem[-5:]}.parquet", rows)
    return size / 1e6, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=250)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--scaling", action="store_true", help="1 and 2 workers only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stage", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.folder, arguments.workers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.scaling:
            print(scaling(folder, arguments.megabytes, arguments.rounds))
        else:
            measure_all(folder, arguments.megabytes)


if __name__ == "__main__":
    main()
