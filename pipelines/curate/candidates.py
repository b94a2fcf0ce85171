"""Finds pairs of documents that may be similar: those that share a band, out of core.

One band of all documents is sorted at a time, in ranges of its hashes that fit the memory given.
A bucket (documents with equal hash) pairs its best member with each other one and neighbors with
each other, so that many alike documents cost linear, not quadratic, time. Buckets are ordered by
score and by hash of the id, so the pairs do not depend on the order of the shards.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.curate.signatures import Index, gather, mapped
from pipelines.curate.words import Hashes, Integers
from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts

# Of one document in the range being sorted: hash, number, order, and what sorting needs.
BYTES_PER_DOCUMENT = 64

# What is known of a document, as bits of one byte.
SIMILAR = np.uint8(1)  # is in a pair that may be similar
REPEATED = np.uint8(2)  # has the words of another document
REPEAT = np.uint8(4)  # is not the best one with its words
LONG = np.uint8(8)  # has shingles

Pairs = npt.NDArray[np.int64]  # [pairs, 2]


class Buckets:
    """Documents with equal keys: `documents` in the order of their bucket, best first."""

    def __init__(self, documents: Integers, numbers: Integers) -> None:
        """`numbers` [documents] ascends from bucket to bucket."""
        self.documents = documents
        is_first = np.ones(len(numbers), np.bool_)
        is_first[1:] = numbers[1:] != numbers[:-1]
        first_at = np.maximum.accumulate(np.where(is_first, np.arange(len(numbers)), 0))
        self.others = np.flatnonzero(~is_first)
        self.best = documents[first_at]

    def star(self) -> Pairs:
        """Return each bucket's best document with every other one."""
        return np.stack([self.best[self.others], self.documents[self.others]], axis=1)

    def pairs(self) -> Pairs:
        """Return the star and each document with the next one of its bucket."""
        chain = np.stack([self.documents[self.others - 1], self.documents[self.others]], axis=1)
        return np.concatenate([self.star(), chain])


class Order:
    """What puts the documents of a bucket in order: the score, then a hash of the id."""

    def __init__(self, folder: Path) -> None:
        """Map the two arrays that `write` left in the folder."""
        self._score = mapped(folder / "order-score.bin", np.float64)
        self._id_hash = mapped(folder / "order-id.bin", np.uint64)

    @classmethod
    def write(cls, index: Index, folder: Path) -> None:
        """Write the scores and id hashes of all documents."""
        gather(index.columns("score"), folder / "order-score.bin", np.float64)
        gather(index.columns("id_hash"), folder / "order-id.bin", np.uint64)

    def sort(self, documents: Integers, *keys: npt.NDArray[np.generic]) -> Integers:
        """Return the order of documents by the last key first, then best first."""
        score = -self._score[documents]
        score[np.isnan(score)] = np.inf
        return np.lexsort((documents, self._id_hash[documents], score, *keys))


def bucket(
    index: Index, column: str, order: Order, budget: int, *, chosen: npt.NDArray[np.bool_] | None
) -> Iterator[Buckets]:
    """Yield the buckets of a column over the chosen documents, in ranges that fit the budget."""
    size = index.size if chosen is None else int(np.count_nonzero(chosen))
    passes = max(1, -(-size * BYTES_PER_DOCUMENT // budget))
    for number in range(passes):
        keys, documents = _select(index, column, chosen, number, passes)
        by_key = np.argsort(keys)
        keys, documents = keys[by_key], documents[by_key]
        same = keys[1:] == keys[:-1]
        shared = np.zeros(len(keys), np.bool_)
        shared[1:] |= same
        shared[:-1] |= same
        keys, documents = keys[shared], documents[shared]
        ordered = order.sort(documents, keys)
        numbers = np.cumsum(np.append(False, np.diff(keys[ordered]) != 0)[: len(ordered)])
        yield Buckets(documents[ordered], numbers)


def _select(
    index: Index, column: str, chosen: npt.NDArray[np.bool_] | None, number: int, passes: int
) -> tuple[Hashes, Integers]:
    """Return keys and numbers of the chosen documents whose key lies in one of `passes` ranges."""
    keys, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for first, values in index.columns(column):
        wanted = np.ones(len(values), np.bool_)
        if chosen is not None:
            wanted &= chosen[first : first + len(values)]
        if passes > 1:
            place = ((values >> np.uint64(32)) * np.uint64(passes)) >> np.uint64(32)
            wanted &= place == number
        places = np.flatnonzero(wanted)
        keys.append(values[places])
        documents.append(places + first)
    return np.concatenate(keys), np.concatenate(documents)


def join_repeats(
    index: Index, active: npt.NDArray[np.bool_], flags_file: Path, budget: int
) -> Path:
    """Write the pairs (best, other) of active documents with the same words, and flags for all."""
    folder = flags_file.parent
    order = Order(folder)
    gather(index.columns("shingles"), flags_file, np.bool_)
    flags = mapped(flags_file, np.uint8, "r+")
    flags *= LONG * active
    gather(index.columns("words_sum"), folder / "words.bin", np.uint64)
    words = mapped(folder / "words.bin", np.uint64)
    found = folder / "repeats.bin"
    with found.open("wb") as file:
        for buckets in bucket(index, "sum", order, budget, chosen=active):
            # Both sums must agree: one alone may meet by chance among billions.
            star = buckets.star()
            star = star[words[star[:, 0]] == words[star[:, 1]]]
            flags[star[:, 0]] |= REPEATED
            flags[star[:, 1]] |= REPEATED | REPEAT
            star.tofile(file)
    return found


def join_bands(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the distinct pairs (best, other) that share one of some bands.

    Inputs are a file with the names of the bands, the flags by `join_repeats` in the folder that
    holds the order, too, and all signature files; `params`: `budget` in bytes.
    """
    names, flags_file, *signed = inputs
    index, order = Index(signed), Order(flags_file.parent)
    flags = mapped(flags_file, np.uint8)
    chosen = (flags & (LONG | REPEAT)) == LONG
    held: list[Pairs] = []
    with output.open("wb") as file:
        for band in names.read_text().split():
            for buckets in bucket(index, band, order, params["budget"], chosen=chosen):
                held.append(buckets.pairs())
                if sum(pairs.nbytes for pairs in held) > params["budget"]:
                    distinct_pairs(held).tofile(file)
                    held = []
        distinct_pairs(held).tofile(file)
    return Outcome(Counts())


def distinct_pairs(pairs: Sequence[Pairs]) -> Pairs:
    """Return the pairs without repetition, the smaller number first, sorted."""
    both = np.sort(np.concatenate([np.empty((0, 2), np.int64), *pairs]), axis=1)
    ordered = both[np.lexsort((both[:, 1], both[:, 0]))]
    is_new = np.ones(len(ordered), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return ordered[is_new]
