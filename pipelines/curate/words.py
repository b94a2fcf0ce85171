"""Hashes the words and word n-grams of many documents at once, from their bytes.

A word is a run of ASCII letters, digits, underscores and bytes of other scripts; case counts, and
what lies between words does not. All arrays of one call fit the processor's cache when the
documents together have 0.1 to 2 MB, which is what makes this fast.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Hashes = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
PADDING = 8
# What of a machine word of 8 bytes belongs to a span that ends after 0, 1 ... 8 of them.
FIRST_BYTES = np.array([(1 << (8 * count)) - 1 for count in range(9)], np.uint64)


class Packed(NamedTuple):
    """Documents in one buffer, a newline before each and PADDING after the last.

    Document i is data[starts[i] : starts[i + 1] - 1].
    """

    data: Bytes
    starts: Integers


class Grams(NamedTuple):
    """Hashes of all documents in order; those of document i are hashes[bounds[i] : bounds[i+1]]."""

    hashes: Hashes
    bounds: Integers

    @property
    def counts(self) -> Integers:
        """Return how many hashes each document has."""
        return np.diff(self.bounds)

    def sums(self) -> Hashes:
        """Return the sum of each document's hashes, which does not depend on their order."""
        sums = np.zeros(len(self.bounds) - 1, np.uint64)
        filled = np.flatnonzero(self.counts)
        if len(filled):
            sums[filled] = np.add.reduceat(self.hashes, self.bounds[filled])
        return sums


def mix(values: Hashes) -> Hashes:
    """Spread every bit over all others (the finalizer of MurmurHash3, 64 bits)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def numbers(start: int, count: int) -> Hashes:
    """Return `count` fixed numbers that look random, from the place `start` of a sequence."""
    return mix(np.arange(start, start + count, dtype=np.uint64) * MULTIPLIER)


def pack(texts: pa.Array) -> Packed:
    """Return the texts (strings without nulls) in one buffer.

    >>> pack(pa.array(["ab", "c"])).starts.tolist()
    [1, 4, 6]
    """
    lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.ones(len(texts) + 1, np.int64)
    np.cumsum(lengths + 1, out=starts[1:])
    starts[1:] += 1
    data = np.full(int(starts[-1]) + PADDING, 10, np.uint8)
    if len(texts):
        every = pa.LargeListArray.from_arrays(pa.array([0, len(texts)], pa.int64()), texts)
        joined = pc.binary_join(every, "\n")[0].as_buffer()
        data[1 : 1 + joined.size] = np.frombuffer(joined, np.uint8)
    return Packed(data, starts)


def hash_words(packed: Packed, *, fold_case: bool = False) -> Grams:
    """Return the hashes of all words of all documents; folded, ASCII case does not count."""
    data = packed.data
    if fold_case:
        data = data | (((data - np.uint8(65)) < 26).view(np.uint8) << np.uint8(5))
    is_word = ((data | 0x20) - np.uint8(97)) < 26
    is_word |= (data - np.uint8(48)) < 10
    is_word |= data == 95
    is_word |= data >= 128
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])
    starts = edges[::2] + 1
    hashes = hash_spans(data, starts, edges[1::2] + 1 - starts)
    return Grams(hashes, np.searchsorted(starts, packed.starts))


def hash_strings(texts: pa.Array) -> Hashes:
    """Return one hash for each string."""
    packed = pack(texts)
    return hash_spans(packed.data, packed.starts[:-1], np.diff(packed.starts) - 1)


def hash_spans(data: Bytes, starts: Integers, lengths: Integers) -> Hashes:
    """Return one hash for each span of bytes; PADDING bytes must follow the last one."""
    # Every byte position as the start of 8 bytes, without a copy.
    eights = np.ndarray(len(data) - 7, np.dtype("<u8"), data, strides=(1,))
    values = eights[starts] & FIRST_BYTES[np.minimum(lengths, 8)]
    long = np.flatnonzero(lengths > 8)
    rests = lengths[long] - 8
    values[long] += (eights[starts[long] + 8] & FIRST_BYTES[np.minimum(rests, 8)]) * MULTIPLIER
    longer = long[rests > 8]
    if len(longer):
        values[longer] += MULTIPLIER * _hash_rests(
            eights, starts[longer] + 16, lengths[longer] - 16
        )
    return mix(values)


def _hash_rests(eights: Hashes, starts: Integers, lengths: Integers) -> Hashes:
    """Return a polynomial over the spans' pieces of 8 bytes."""
    pieces = -(-lengths // 8)
    firsts = np.cumsum(pieces) - pieces
    place = np.arange(pieces.sum()) - np.repeat(firsts, pieces)
    left = np.repeat(lengths, pieces) - 8 * place
    values = eights[np.repeat(starts, pieces) + 8 * place] & FIRST_BYTES[np.minimum(left, 8)]
    powers: Hashes = np.cumprod(np.full(pieces.max(), MULTIPLIER), dtype=np.uint64)
    sums: Hashes = np.add.reduceat(values * powers[place], firsts)
    return sums


def hash_ngrams(words: Grams, ngram: int, seed: int) -> Grams:
    """Return the hashes of all runs of `ngram` words that lie within one document."""
    counts = np.maximum(words.counts - (ngram - 1), 0)
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    total = len(words.hashes) - ngram + 1
    if total < 1:
        return Grams(np.empty(0, np.uint64), bounds)
    hashes: Hashes = words.hashes[:total] + numbers(seed, 1)[0]
    for k in range(1, ngram):
        hashes *= MULTIPLIER
        hashes += words.hashes[k : k + total]
    inside = np.ones(total, np.bool_)
    across = (words.bounds[1:-1, None] - np.arange(1, ngram)).ravel()
    inside[across[(across >= 0) & (across < total)]] = False
    return Grams(mix(hashes if inside.all() else hashes[inside]), bounds)


def shingle(text: str, ngram: int, seed: int) -> Hashes:
    """Return the sorted set of hashes of a text's word n-grams; empty below `ngram` words."""
    words = hash_words(pack(pa.array([text])))
    return np.unique(hash_ngrams(words, ngram, seed).hashes)
