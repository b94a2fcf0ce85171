"""Verifies candidate pairs and decides what stays: one partition of the candidates at a time.

Verified pairs make clusters. In a cluster, from the highest score (then the smallest id) on, a
record stays unless it is similar to one that stays; so whatever is dropped has a verified
duplicate among the kept.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.curate.candidates import Pairs, distinct_pairs
from pipelines.curate.minhash import jaccard
from pipelines.curate.signatures import mapped
from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts

# A record is compared with its candidates among the kept, and with this many others of its
# cluster at most: a long chain of similar records must not cost quadratic time.
MOST_COMPARED = 64
KEPT, EXACT, NEAR = "kept", "exact_duplicate", "near_duplicate"
MEMBER_SCHEMA = pa.schema(
    [
        ("document", pa.int64()),
        ("id", pa.string()),
        ("group", pa.string()),
        ("cluster", pa.int64()),
        ("representative", pa.string()),
        ("jaccard", pa.float64()),
        ("reason", pa.string()),
    ]
)


class Member(NamedTuple):
    """A record of a cluster: what is decided on it, and by comparison with which kept one."""

    place: int
    root: int
    best: int
    jaccard: float
    reason: str


class Partition:
    """The documents of a partition, by their place in it, best first."""

    def __init__(self, batches: Iterable[pa.RecordBatch], threshold: float) -> None:
        """Take the spilled batches of all shards."""
        table = pa.Table.from_batches(batches)
        scores = table["score"].to_pylist()
        ids = table["id"].to_pylist()
        numbers = table["document"].to_pylist()
        order = sorted(range(len(ids)), key=lambda i: (rank_score(scores[i]), ids[i], numbers[i]))
        self.threshold = threshold
        self.documents = [numbers[i] for i in order]
        self.ids = [ids[i] for i in order]
        groups, digests = table["group"].to_pylist(), table["digest"].to_pylist()
        self.groups = [groups[i] for i in order]
        self.digests = [digests[i] for i in order]
        sets = [s for batch in table.to_batches() for s in list_arrays(batch["shingles"])]
        self.shingles = [sets[i] for i in order]
        self.place = {document: place for place, document in enumerate(self.documents)}
        # Documents with the same words have their shingles under the best one of them.
        self.leader = list(range(len(ids)))
        self.roots = list(range(len(ids)))
        self.similarities: dict[tuple[int, int], float] = {}
        self.neighbors: dict[int, list[int]] = defaultdict(list)

    def places(self, pairs: Pairs) -> list[tuple[int, int]]:
        """Return pairs of documents as pairs of places."""
        return [(self.place[a], self.place[b]) for a, b in pairs.tolist()]

    def root(self, place: int) -> int:
        """Return the best record of a place's cluster, shortening the way to it."""
        while self.roots[place] != place:
            self.roots[place] = self.roots[self.roots[place]]
            place = self.roots[place]
        return place

    def join(self, left: int, right: int) -> None:
        """Make one cluster of two."""
        a, b = self.root(left), self.root(right)
        self.roots[max(a, b)] = min(a, b)

    def similarity(self, left: int, right: int) -> float:
        """Return the similarity of two records, or 0.0 where sizes show it to be too small."""
        left, right = sorted((self.leader[left], self.leader[right]))
        if left == right:
            return 1.0
        known = self.similarities.get((left, right))
        return self._compare(left, right) if known is None else known

    def _compare(self, left: int, right: int) -> float:
        mine, theirs = self.shingles[left], self.shingles[right]
        small, large = sorted((len(mine), len(theirs)))
        # The similarity is at most the ratio of the sizes, and comparing sizes is cheap.
        return jaccard(mine, theirs) if small and small >= self.threshold * large else 0.0


def rank_score(score: float | None) -> float:
    """Return what ascends where scores descend; no score, and no number, comes last."""
    return float("inf") if score is None or score != score else -score


def list_arrays(column: pa.LargeListArray) -> list[np.ndarray]:
    """Return the lists of a column as arrays, without copying them."""
    values = column.values.to_numpy()
    bounds = column.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(bounds)]


def resolve_partition(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write all members of a partition's clusters, kept or not, in order of document numbers.

    Inputs: pairs of documents with the same words, pairs that may be similar, and the spilled
    documents of all shards; `params`: threshold. The name of a file of pairs ends in the
    partition's number.
    """
    number = int(inputs[0].stem.split("-")[-1])
    batches = []
    for path in inputs[2:]:
        with pa.memory_map(str(path)) as file:
            batches.append(pa.ipc.open_file(file).get_batch(number))
    partition = Partition(batches, params["threshold"])
    repeats = distinct_pairs_of(inputs[0])
    members = resolve(partition, repeats, distinct_pairs_of(inputs[1]))
    table = member_table(partition, members)
    with pa.OSFile(str(output), "wb") as file, pa.ipc.new_file(file, MEMBER_SCHEMA) as writer:
        writer.write_table(table)
    return Outcome(Counts(), extra={"clusters": len({member.root for member in members})})


def read_members(path: Path) -> pa.Table:
    """Map a file that `resolve_partition` wrote."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def distinct_pairs_of(path: Path) -> Pairs:
    """Read a file of pairs, each once."""
    return distinct_pairs([np.array(mapped(path, np.int64)).reshape(-1, 2)])


def resolve(partition: Partition, repeats: Pairs, similar: Pairs) -> list[Member]:
    """Return the members of all clusters of at least two records, best first."""
    for left, right in partition.places(repeats):
        partition.join(left, right)
    _share_shingles(partition)
    for left, right in partition.places(similar):
        a, b = partition.leader[left], partition.leader[right]
        partition.neighbors[a].append(b)
        partition.neighbors[b].append(a)
        # A pair inside one cluster cannot change it, so it needs no verification.
        if partition.root(a) == partition.root(b):
            continue
        value = partition.similarities[min(a, b), max(a, b)] = partition.similarity(a, b)
        if value >= partition.threshold:
            partition.join(a, b)
    return _decide(partition)


def _share_shingles(partition: Partition) -> None:
    """Give the shingles of each set of records with the same words to the best of them."""
    for place in range(len(partition.leader)):
        leader = partition.leader[place] = partition.root(place)
        if len(partition.shingles[place]):
            partition.shingles[leader] = partition.shingles[place]


def _decide(partition: Partition) -> list[Member]:
    matches: dict[int, tuple[int, float]] = {}
    digests: set[tuple[int, Any]] = set()
    kept: dict[int, list[int]] = defaultdict(list)
    members = []
    for place, leader in enumerate(partition.leader):
        root, seen = partition.root(place), (leader, partition.digests[place])
        if leader in matches:
            reason = EXACT if seen in digests else NEAR
            best, value = matches[leader]
        else:
            match = _first_similar(partition, leader, kept[root])
            reason = NEAR if match else KEPT
            best, value = match or (place, 1.0)
            matches[leader] = best, value
            if match is None:
                kept[root].append(place)
        digests.add(seen)
        members.append(Member(place, root, best, value, reason))
    sizes = np.bincount([member.root for member in members], minlength=1)
    return [member for member in members if sizes[member.root] > 1]


def _first_similar(
    partition: Partition, leader: int, kept: Sequence[int]
) -> tuple[int, float] | None:
    """Return the best of the kept records that is similar to one, and its similarity."""
    compared: Iterable[int] = kept
    if len(kept) > MOST_COMPARED:
        near = {n for n in partition.neighbors[leader] if n < leader and _is_in(n, kept)}
        compared = sorted({*kept[:MOST_COMPARED], *sorted(near)[:MOST_COMPARED]})
    for other in compared:
        value = partition.similarity(leader, other)
        if value >= partition.threshold:
            return other, value
    return None


def _is_in(place: int, ascending: Sequence[int]) -> bool:
    found = bisect_left(ascending, place)
    return found < len(ascending) and ascending[found] == place


def member_table(partition: Partition, members: Sequence[Member]) -> pa.Table:
    """Return the members as a table; a cluster is named by its first document."""
    first: dict[int, int] = {}
    for member in members:
        document = partition.documents[member.place]
        first[member.root] = min(first.get(member.root, document), document)
    members = sorted(members, key=lambda member: partition.documents[member.place])
    places = [member.place for member in members]
    columns: list[list[Any]] = [
        [partition.documents[place] for place in places],
        [partition.ids[place] for place in places],
        [partition.groups[place] for place in places],
        [first[member.root] for member in members],
        [partition.ids[member.best] for member in members],
        [member.jaccard for member in members],
        [member.reason for member in members],
    ]
    return pa.table(columns, schema=MEMBER_SCHEMA)
