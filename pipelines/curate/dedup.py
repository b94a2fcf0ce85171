"""Stage `dedup`: of records that say the same, the best one stays.

Exact duplicates have the same text up to whitespace. Near-duplicates share word n-grams with a
Jaccard similarity of at least the recipe's threshold. Similar records are joined into clusters;
in a cluster, from the highest score (then the smallest id) on, a record stays unless it is similar
to one that stays, so whatever is dropped has a verified duplicate among the kept. Only bodies of
one kind are compared: a function is no duplicate of its file. The result depends neither on the
order of the records nor on the number of workers.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.curate.minhash import (
    NUM_BANDS,
    Hashes,
    band_hashes,
    candidate_pairs,
    jaccard,
    shingle,
    sketch,
)
from pipelines.curate.rows import body_kind, filter_rows
from pipelines.engine import Built, Input, Job, Outcome, Params, Work
from pipelines.recipe import Dedup, Recipe
from pipelines.records import Row, body_text, read_rows

DEPENDS = ("numpy", "pyarrow")
CLUSTERS = "clusters.parquet"
KINDS = ("messages", "prompt", "text")
BODY_COLUMNS = ["id", "score", "messages", "prompt", "completion", "text"]
CLUSTER_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("cluster", pa.int32()),
        pa.field("representative", pa.string()),
        pa.field("jaccard", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("file", pa.string()),
        pa.field("row", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Document:
    """What deduplication knows of a record. `file` and `row` say where it is stored."""

    id: str
    score: float | None
    kind: str
    digest: bytes
    shingles: Hashes
    file: str
    row: int

    @property
    def rank(self) -> tuple[float, str, str, int]:
        """Return the order in which records are preferred: best score, then smallest id."""
        known = self.score is not None and self.score == self.score
        return (-(self.score or 0.0) if known else float("inf"), self.id, self.file, self.row)


class Duplicate(NamedTuple):
    """A record that is dropped, and the kept one of its cluster that it repeats."""

    document: Document
    cluster: int
    representative: Document
    jaccard: float
    reason: str


def params(recipe: Recipe) -> dict[str, Any]:
    """Return n-gram length, threshold and seed."""
    return recipe.curation.dedup.model_dump(mode="json")


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Find the duplicates over all shards, then write each shard without its own.

    The side file clusters.parquet tells for every dropped record its cluster, the record that
    represents it, their similarity and the reason.
    """
    shards = inputs["quality"].paths()
    settings = recipe.curation.dedup
    documents = [d for shard, path in shards for d in read_documents(path, shard.file, settings)]
    duplicates = find_duplicates(documents, settings.threshold)
    side = work.keep(CLUSTERS)
    write_clusters(side, duplicates)
    jobs = [Job(shard.file, (path, side)) for shard, path in shards]
    clusters = len({duplicate.cluster for duplicate in duplicates})
    return Built(work.map(filter_shard, jobs, {}), {"clusters": clusters})


def read_documents(path: Path, file: str, settings: Dedup) -> Iterable[Document]:
    """Yield the documents of one shard."""
    for number, row in enumerate(read_rows(path, BODY_COLUMNS)):
        text = body_text(row)
        yield Document(
            id=row["id"],
            score=row["score"],
            kind=body_kind(row),
            digest=hashlib.sha256(" ".join(text.split()).encode()).digest(),
            shingles=shingle(text, settings.ngram, settings.seed),
            file=file,
            row=number,
        )


def find_duplicates(documents: Iterable[Document], threshold: float) -> list[Duplicate]:
    """Return the records to drop, in order of preference."""
    ranked = sorted(documents, key=lambda document: document.rank)
    first: dict[tuple[str, bytes], int] = {}
    originals = [first.setdefault((d.kind, d.digest), index) for index, d in enumerate(ranked)]
    roots = _join_similar(ranked, originals, threshold)
    kept: dict[int, list[int]] = {}
    chosen: list[tuple[int, float]] = []
    numbers: dict[int, int] = {}
    found = []
    for index, original in enumerate(originals):
        root = _root(roots, original)
        if original != index:
            chosen.append(chosen[original])
        else:
            others = kept.setdefault(root, [])
            match = _first_similar(ranked, index, others, threshold)
            if match is None:
                others.append(index)
            chosen.append(match or (index, 1.0))
        best, similarity = chosen[index]
        if best != index:
            reason = "near_duplicate" if original == index else "exact_duplicate"
            cluster = numbers.setdefault(root, len(numbers))
            found.append(Duplicate(ranked[index], cluster, ranked[best], similarity, reason))
    return found


def _join_similar(
    ranked: Sequence[Document], originals: Sequence[int], threshold: float
) -> list[int]:
    """Join every candidate pair that is similar; return the links to each cluster's best record."""
    roots = list(range(len(ranked)))
    unique = [i for i, first in enumerate(originals) if i == first and len(ranked[i].shingles)]
    bands = [
        band_hashes(sketch(ranked[i].shingles), KINDS.index(ranked[i].kind) + 1) for i in unique
    ]
    table = np.array(bands, np.uint64).reshape(len(unique), NUM_BANDS)
    for a, b in candidate_pairs(table).tolist():
        left, right = _root(roots, unique[a]), _root(roots, unique[b])
        # A pair inside one cluster cannot change it, so it needs no verification.
        if left != right and _first_similar(ranked, unique[b], [unique[a]], threshold):
            roots[max(left, right)] = min(left, right)
    return roots


def _root(roots: list[int], index: int) -> int:
    """Return the best record of an index's cluster, shortening the way to it."""
    while roots[index] != index:
        roots[index] = roots[roots[index]]
        index = roots[index]
    return index


def _first_similar(
    ranked: Sequence[Document], index: int, others: Iterable[int], threshold: float
) -> tuple[int, float] | None:
    """Return the first of `others` that is at least `threshold` similar, and its similarity."""
    mine = ranked[index].shingles
    for other in others:
        theirs = ranked[other].shingles
        small, large = sorted((len(mine), len(theirs)))
        # The similarity is at most the ratio of the sizes, and counting sizes is cheap.
        if small >= threshold * large and (similarity := jaccard(mine, theirs)) >= threshold:
            return other, similarity
    return None


def write_clusters(path: Path, duplicates: Iterable[Duplicate]) -> None:
    """Write the table of dropped records, ordered by where they are stored."""
    rows = [
        {
            "id": duplicate.document.id,
            "cluster": duplicate.cluster,
            "representative": duplicate.representative.id,
            "jaccard": duplicate.jaccard,
            "reason": duplicate.reason,
            "file": duplicate.document.file,
            "row": duplicate.document.row,
        }
        for duplicate in sorted(duplicates, key=lambda d: (d.document.file, d.document.row))
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=CLUSTER_SCHEMA), path)


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy a shard (first input) without the records that the clusters (second) drop from it."""
    shard, clusters = inputs
    mine = pq.read_table(clusters, filters=[("file", "=", shard.name)]).to_pylist()
    dropped = {entry["row"]: entry for entry in mine}
    position = itertools.count()

    def decide(row: Row) -> tuple[str, str] | None:
        entry = dropped.get(next(position))
        if entry is None:
            return None
        return entry["reason"], f"of {entry['representative']} ({entry['jaccard']:.2f})"

    return filter_rows(shard, output, decide)
