"""Stage `dedup`: of records that say the same, the best one stays.

Exact duplicates have the same text up to white space. Near-duplicates share word n-grams with a
Jaccard similarity of at least the recipe's threshold. Similar records are joined into clusters;
in a cluster, from the highest score (then the smallest id) on, a record stays unless it is similar
to one that stays, so whatever is dropped has a verified duplicate among the kept. Only bodies of
one kind are compared: a function is no duplicate of its file. The result depends neither on the
order of the records nor on the number of workers, nor on the memory given.

Memory: arrays of one number per document are mapped files; sorting, verification and shards are
held in pieces of the recipe's `memory_gb`. What grows beyond it is a single cluster of millions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.curate.candidates import Order, join_bands, join_repeats
from pipelines.curate.clusters import KEPT, read_members, resolve_partition
from pipelines.curate.groups import GROUPS, write_groups
from pipelines.curate.kept_index import (
    Mask,
    carry_members,
    choose_active,
    find_base,
    forget_old,
    keep_index,
    reuse_output,
)
from pipelines.curate.minhash import NUM_BINS, rows_per_band
from pipelines.curate.partitions import (
    count_partitions,
    label_documents,
    scatter_pairs,
    spill_shard,
)
from pipelines.curate.rows import choose_runner, sum_sources
from pipelines.curate.selection import drop_rows, find_marks
from pipelines.curate.signatures import Index, forget_unused, sign_shard
from pipelines.engine import (
    Built,
    Input,
    Job,
    Outcome,
    Params,
    Runner,
    ShardFunction,
    ShardReport,
    Work,
)
from pipelines.fingerprint import code_digest, versions
from pipelines.manifest import Shard, digest_of
from pipelines.recipe import Recipe

DEPENDS = ("numpy", "pyarrow")
FLAGS = "flags.bin"
CLUSTERS = "clusters.parquet"
BANDS_PER_JOB = 8
CLUSTER_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("cluster", pa.int64()),
        pa.field("representative", pa.string()),
        pa.field("jaccard", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
    ]
)
Shards = Sequence[tuple[Shard, Path]]
Reports = tuple[ShardReport, ...]


@dataclass(frozen=True, slots=True)
class Steps:
    """What all steps of one build share.

    `budget` is the memory of a worker in bytes; `step` names the index that records are compared
    with: what is made from one must not be taken for what is made without it after a kill.
    """

    shards: Shards
    settings: Params
    work: Work
    runner: Runner
    budget: int
    step: str

    @property
    def flags(self) -> Path:
        """Return the file of what is known of each document."""
        return self.work.path / FLAGS

    def map(self, function: ShardFunction, jobs: Sequence[Job], params: Params) -> Reports:
        """Make every job's file."""
        return self.work.map(function, jobs, params, runner=self.runner)

    def files(self, function: ShardFunction, jobs: Sequence[Job], params: Params) -> list[Path]:
        """Make every job's file and return them in order."""
        return paths_of(self.map(function, jobs, params), self.work)


def params(recipe: Recipe) -> dict[str, Any]:
    """Return n-gram length, threshold and seed: what decides the result."""
    return recipe.curation.dedup.model_dump(mode="json", exclude={"memory_gb", "incremental"})


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Find the duplicates over all shards, then write each shard without its own.

    The side file clusters.parquet tells for every record of a cluster, kept or dropped, the record
    that represents it, their similarity and the reason; groups.parquet the groups that clusters
    join.
    """
    shards = inputs["redact"].paths()
    given, settings = recipe.curation.dedup, params(recipe)
    budget = int(given.memory_gb * 2**30 / (2 * work.workers))
    root = kept_folder("index", settings, work, __name__)
    base = find_base(root, [shard for shard, _ in shards]) if given.incremental else None
    runner = choose_runner(inputs["redact"].shards)
    steps = Steps(shards, settings, work, runner, budget, base.folder.name if base else "all")
    signed = sign_shards(steps, incremental=given.incremental)
    index = Index(paths_of(signed, work))
    active = choose_active(index, base, work.path / "active.bin", budget)
    labels, found = find_clusters(steps, index, active)
    files = paths_of(found, work)
    num_clusters = sum(report.extra["clusters"] for report in found)
    if base is not None:
        files.append(work.path / f"carried-{steps.step}.arrow")
        num_clusters += carry_members(base, active, files[-1])
    side = work.keep(CLUSTERS)
    write_clusters(side, files, index.firsts, shards)
    joined = work.keep(GROUPS)
    groups = write_groups(joined, files)
    jobs = [Job(shard.file, (path, side, joined)) for shard, path in shards]
    kept = (
        {s.file: str(base.report(n)) for n, (s, _) in enumerate(shards) if n in base.shards}
        if base
        else {}
    )
    made = steps.map(filter_shard, jobs, {"kept": kept})
    if given.incremental:
        members = (table for _, table in members_of(files, index.firsts, shards))
        keep_index(root, [shard for shard, _ in shards], base, active, labels, members, made)
        forget_old(root)
    reused = sum(report.extra["reused"] for report in signed)
    report = {
        "clusters": num_clusters,
        "joined_groups": groups,
        "signatures": {"shards": len(shards), "reused": reused},
        "compared": int(np.count_nonzero(active)),
    }
    return Built(made, {**report, "sources": sum_sources(made)})


def find_clusters(steps: Steps, index: Index, active: Mask) -> tuple[Path, Reports]:
    """Compare the active documents; return their labels' file, and the members of clusters."""
    repeats, similar = find_candidates(steps, index, active)
    labels = label_documents([repeats], similar, steps.flags)
    return labels, verify(steps, index, repeats, similar, labels)


def paths_of(reports: Reports, work: Work) -> list[Path]:
    """Return the files that reports are about."""
    return [work.path / report.shard.file for report in reports]


def kept_folder(name: str, settings: Params, work: Work, module: str) -> Path:
    """Return the hidden folder for what these settings and this code leave for the next build."""
    cause = [settings, code_digest(module), versions(*DEPENDS)]
    return work.path.parent / f".{name}-{digest_of(cause)[:16]}"


def sign_shards(steps: Steps, *, incremental: bool) -> Reports:
    """Sign every shard, but take the signatures that an earlier build left of the same bytes."""
    folder = kept_folder("signatures", steps.settings, steps.work, "pipelines.curate.signatures")
    kept = {path.name: str(folder / f"{shard.sha256}.arrow") for shard, path in steps.shards}
    jobs = [
        Job(f"signatures-{number:05d}.arrow", (path,))
        for number, (_, path) in enumerate(steps.shards)
    ]
    given = {**steps.settings, "kept": kept if incremental else {}}
    reports = steps.map(sign_shard, jobs, given)
    forget_unused(folder)
    return reports


def find_candidates(steps: Steps, index: Index, active: Mask) -> tuple[Path, list[Path]]:
    """Return the pairs of records with the same words, and files of pairs that may be similar."""
    folder = steps.work.path
    Order.write(index, folder)
    repeats = join_repeats(index, active, steps.flags, steps.budget)
    bands = [f"band_{n}" for n in range(NUM_BINS // rows_per_band(steps.settings["threshold"]))]
    jobs = []
    for start in range(0, len(bands), BANDS_PER_JOB):
        names = folder / f"bands-{start:03d}.txt"
        names.write_text(" ".join(bands[start : start + BANDS_PER_JOB]))
        job = Job(f"similar-{steps.step}-{start:03d}.bin", (names, steps.flags, *index.paths))
        jobs.append(job)
    return repeats, steps.files(join_bands, jobs, {"budget": steps.budget})


def verify(
    steps: Steps, index: Index, repeats: Path, similar: Sequence[Path], labels: Path
) -> Reports:
    """Write the members of all clusters, partition by partition.

    The candidates are the pairs with the same words, and the files of those that may be similar.
    """
    folder = steps.work.path
    total = count_partitions(index, steps.flags, steps.budget)
    same = scatter_pairs([repeats], labels, total, folder / f"repeats-of-{total}")
    alike = scatter_pairs(similar, labels, total, folder / f"pairs-of-{total}")
    names = [path.name for _, path in steps.shards]
    jobs = [
        Job(f"spill-{steps.step}-{number:05d}-of-{total}.arrow", (path, steps.flags, labels))
        for number, (_, path) in enumerate(steps.shards)
    ]
    firsts = dict(zip(names, index.firsts, strict=True))
    given = {**steps.settings, "partitions": total, "firsts": firsts}
    spilled = steps.files(spill_shard, jobs, given)
    jobs = [
        Job(f"members-{steps.step}-{number:05d}-of-{total}.arrow", (*pairs, *spilled))
        for number, pairs in enumerate(zip(same, alike, strict=True))
    ]
    return steps.map(resolve_partition, jobs, {"threshold": steps.settings["threshold"]})


def members_of(
    files: Sequence[Path], firsts: Sequence[int], shards: Shards
) -> Iterator[tuple[Shard, pa.Table]]:
    """Yield each shard with the members of clusters in it, in the order of their rows."""
    tables = [read_members(file) for file in files]
    numbers = [table["document"].to_numpy() for table in tables]
    for first, (shard, _) in zip(firsts, shards, strict=True):
        mine = pa.concat_tables(
            table.slice(start, stop - start)
            for table, number in zip(tables, numbers, strict=True)
            for start, stop in [np.searchsorted(number, [first, first + shard.rows])]
        )
        yield shard, mine.sort_by("document").combine_chunks()


def write_clusters(
    path: Path, files: Sequence[Path], firsts: Sequence[int], shards: Shards
) -> None:
    """Write the table of all clusters' records."""
    members = members_of(files, firsts, shards)
    with pq.ParquetWriter(path, CLUSTER_SCHEMA, compression="zstd", compression_level=1) as writer:
        for first, (shard, mine) in zip(firsts, members, strict=True):
            if len(mine):
                rows = pa.array(mine["document"].to_numpy() - first)
                both = mine.append_column("file", pa.repeat(shard.file, len(mine)))
                writer.write_table(both.append_column("row", rows).select(CLUSTER_SCHEMA.names))


def read_dropped(clusters: Path, file: str) -> list[dict[str, Any]]:
    """Return the dropped rows of a shard; the table has row groups of one shard each, in order."""
    with pq.ParquetFile(clusters) as table:
        place = table.schema_arrow.get_field_index("file")
        groups = [
            number
            for number in range(table.num_row_groups)
            if table.metadata.row_group(number).column(place).statistics.min == file
        ]
        rows = table.read_row_groups(groups, use_threads=False)
    dropped: list[dict[str, Any]] = rows.filter(pc.not_equal(rows["reason"], KEPT)).to_pylist()
    return dropped


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy a shard (first input) without the records that the clusters (second) drop from it.

    Those left note the joined group (third input) of theirs: split must keep it together, and what
    a later stage reads of this one is its shards. `params`: `kept`, by name of the shard the report
    on an output of the same bytes, which is taken where the same records go and stay.
    """
    shard, clusters, groups = inputs
    marks = find_marks(shard, pq.read_table(groups, use_threads=False))
    dropped = read_dropped(clusters, shard.name)
    drops = {
        entry["row"]: (entry["reason"], f"of {entry['representative']} ({entry['jaccard']:.2f})")
        for entry in dropped
    }
    cause = digest_of([sorted(drops.items()), sorted(marks.items())])
    kept = params["kept"].get(shard.name)
    outcome = reuse_output(Path(kept), cause, output) if kept else None
    if outcome is None:
        outcome = drop_rows(shard, output, drops, marks)
    return replace(outcome, extra={**outcome.extra, "cause": cause})
