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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.curate.candidates import Order, join_bands, join_repeats
from pipelines.curate.clusters import KEPT, read_members, resolve_partition
from pipelines.curate.groups import GROUPS, read_joined, write_groups
from pipelines.curate.minhash import NUM_BINS, rows_per_band
from pipelines.curate.partitions import (
    count_partitions,
    label_documents,
    scatter_pairs,
    spill_shard,
)
from pipelines.curate.rows import sum_sources
from pipelines.curate.selection import drop_rows
from pipelines.curate.signatures import Index, forget_unused, sign_shard
from pipelines.engine import (
    Built,
    Input,
    Job,
    Outcome,
    Params,
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
    signed = sign_shards(shards, settings, work, incremental=given.incremental)
    index = Index(paths_of(signed, work))
    flags = work.path / FLAGS
    repeats, similar = find_candidates(index, flags, settings, work, budget)
    found = verify(shards, index, [[repeats], similar], settings, work, budget)
    side = work.keep(CLUSTERS)
    write_clusters(side, paths_of(found, work), index.firsts, shards)
    joined = work.keep(GROUPS)
    groups = write_groups(joined, paths_of(found, work))
    jobs = [Job(shard.file, (path, side, joined)) for shard, path in shards]
    reused = sum(report.extra["reused"] for report in signed)
    report = {
        "clusters": sum(report.extra["clusters"] for report in found),
        "joined_groups": groups,
        "signatures": {"shards": len(shards), "reused": reused},
    }
    made = work.map(filter_shard, jobs, {})
    return Built(made, {**report, "sources": sum_sources(made)})


def paths_of(reports: Reports, work: Work) -> list[Path]:
    """Return the files that reports are about."""
    return [work.path / report.shard.file for report in reports]


def sign_shards(shards: Shards, settings: Params, work: Work, *, incremental: bool) -> Reports:
    """Sign every shard, but take the signatures that an earlier build left of the same bytes."""
    cause = [settings, code_digest("pipelines.curate.signatures"), versions(*DEPENDS)]
    folder = work.path.parent / f".signatures-{digest_of(cause)[:16]}"
    kept = {path.name: str(folder / f"{shard.sha256}.arrow") for shard, path in shards}
    jobs = [
        Job(f"signatures-{number:05d}.arrow", (path,)) for number, (_, path) in enumerate(shards)
    ]
    reports = work.map(sign_shard, jobs, {**settings, "kept": kept if incremental else {}})
    forget_unused(folder)
    return reports


def find_candidates(
    index: Index, flags: Path, settings: Params, work: Work, budget: int
) -> tuple[Path, list[Path]]:
    """Return the pairs of records with the same words, and files of pairs that may be similar."""
    Order.write(index, work.path)
    repeats = join_repeats(index, flags, budget)
    bands = [f"band_{n}" for n in range(NUM_BINS // rows_per_band(settings["threshold"]))]
    jobs = []
    for start in range(0, len(bands), BANDS_PER_JOB):
        names = work.path / f"bands-{start:03d}.txt"
        names.write_text(" ".join(bands[start : start + BANDS_PER_JOB]))
        jobs.append(Job(f"similar-{start:03d}.bin", (names, flags, *index.paths)))
    return repeats, paths_of(work.map(join_bands, jobs, {"budget": budget}), work)


def verify(
    shards: Shards,
    index: Index,
    candidates: Sequence[Sequence[Path]],
    settings: Params,
    work: Work,
    budget: int,
) -> Reports:
    """Write the members of all clusters, partition by partition.

    `candidates` are the files of pairs with the same words, then those that may be similar.
    """
    flags = work.path / FLAGS
    repeats, similar = candidates
    labels = label_documents(repeats, similar, flags)
    total = count_partitions(index, flags, budget)
    repeats = scatter_pairs(repeats, labels, total, work.path / f"repeats-of-{total}")
    similar = scatter_pairs(similar, labels, total, work.path / f"pairs-of-{total}")
    firsts = dict(zip((path.name for _, path in shards), index.firsts, strict=True))
    jobs = [
        Job(f"spill-{number:05d}-of-{total}.arrow", (path, flags, labels))
        for number, (_, path) in enumerate(shards)
    ]
    given = {**settings, "partitions": total, "firsts": firsts}
    spilled = paths_of(work.map(spill_shard, jobs, given), work)
    jobs = [
        Job(f"members-{number:05d}-of-{total}.arrow", (*pairs, *spilled))
        for number, pairs in enumerate(zip(repeats, similar, strict=True))
    ]
    return work.map(resolve_partition, jobs, {"threshold": settings["threshold"]})


def write_clusters(
    path: Path, members: Sequence[Path], firsts: Sequence[int], shards: Shards
) -> None:
    """Write the table of all clusters' records, in the order in which they are stored."""
    tables = [read_members(file) for file in members]
    numbers = [table["document"].to_numpy() for table in tables]
    with pq.ParquetWriter(path, CLUSTER_SCHEMA, compression="zstd", compression_level=1) as writer:
        for first, (shard, _) in zip(firsts, shards, strict=True):
            mine = pa.concat_tables(
                table.slice(start, stop - start)
                for table, number in zip(tables, numbers, strict=True)
                for start, stop in [np.searchsorted(number, [first, first + shard.rows])]
            ).sort_by("document")
            if len(mine):
                rows = pa.array(mine["document"].to_numpy() - first)
                files = pa.repeat(shard.file, len(mine))
                both = mine.append_column("file", files).append_column("row", rows)
                writer.write_table(both.select(CLUSTER_SCHEMA.names).combine_chunks())


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy a shard (first input) without the records that the clusters (second) drop from it.

    Those left note the joined group (third input) of theirs: split must keep it together, and what
    a later stage reads of this one is its shards.
    """
    shard, clusters, groups = inputs
    joined = read_joined(groups)
    filters = [("file", "=", shard.name), ("reason", "!=", KEPT)]
    dropped = pq.read_table(clusters, filters=filters, use_threads=False).to_pylist()
    return drop_rows(
        shard,
        output,
        {
            entry["row"]: (
                entry["reason"],
                f"of {entry['representative']} ({entry['jaccard']:.2f})",
            )
            for entry in dropped
        },
        joined,
    )
