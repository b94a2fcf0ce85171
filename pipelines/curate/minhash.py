"""Near-duplicate candidates: word n-gram shingles, one-permutation MinHash, banding; exact Jaccard.

A document is the sorted set of its shingle hashes. Sketches only propose pairs; `jaccard` decides,
so a wrong hash can cost a candidate but never makes two documents duplicates.

Sources: Li, Owen, Zhang, "One Permutation Hashing" (2012); Shrivastava, "Optimal Densification for
Fast and Accurate Minwise Hashing" (2017); Broder, "On the resemblance and containment of
documents" (1997).
"""

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

# At Jaccard 0.7 a pair shares at least one of 42 bands of 6 with probability 0.995.
NUM_BANDS = 42
ROWS_PER_BAND = 6
NUM_BINS = NUM_BANDS * ROWS_PER_BAND
NUM_PROBES = 32

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def mix(values: Hashes) -> Hashes:
    """Spread every bit over all others (the finalizer of MurmurHash3, 64 bits)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def _numbers(start: int, count: int) -> Hashes:
    return mix(np.arange(start, start + count, dtype=np.uint64) * MULTIPLIER)


def _is_word_byte() -> npt.NDArray[np.bool_]:
    table = np.zeros(256, np.bool_)
    table[list(b"_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = True
    # Bytes of other scripts: a run of them is one word.
    table[128:] = True
    return table


WORD_BYTE = _is_word_byte()
BYTE_HASHES = _numbers(1, 256)
BIN_STARTS = np.array([-(-(b << 64) // NUM_BINS) for b in range(NUM_BINS)], np.uint64)
PROBES = (_numbers(1_000, NUM_PROBES * NUM_BINS) % np.uint64(NUM_BINS)).reshape(NUM_PROBES, -1)


def shingle(text: str, ngram: int, seed: int) -> Hashes:
    """Return the sorted set of hashes of a text's word n-grams; empty below `ngram` words."""
    data = np.frombuffer(text.encode(), np.uint8)
    is_word = WORD_BYTE[data]
    edges = np.flatnonzero(np.diff(is_word.astype(np.int8), prepend=0, append=0))
    lengths = edges[1::2] - edges[::2]
    if len(lengths) < ngram:
        return np.empty(0, np.uint64)
    firsts = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
    powers: Hashes = np.cumprod(np.full(lengths.max(), MULTIPLIER), dtype=np.uint64)
    letters = BYTE_HASHES[data[is_word]] * powers[position]
    words: Hashes = mix(np.add.reduceat(letters, firsts))
    count = len(words) - ngram + 1
    hashes: Hashes = np.full(count, _numbers(seed, 1)[0], np.uint64)
    for k in range(ngram):
        hashes = hashes * MULTIPLIER + words[k : k + count]
    return np.unique(mix(hashes))


def sketch(shingles: Hashes) -> Hashes:
    """Return the NUM_BINS minima of a non-empty sorted shingle set, one for each range of hashes.

    Two sketches agree in a bin with a probability equal to the Jaccard similarity of the sets. An
    empty bin copies another one, the same for every document (optimal densification).
    """
    first = np.searchsorted(shingles, BIN_STARTS)
    filled = first < np.append(first[1:], len(shingles))
    minima = np.where(filled, shingles[np.minimum(first, len(shingles) - 1)], shingles[0])
    empty = np.flatnonzero(~filled)
    for probe in PROBES:
        if not len(empty):
            break
        donors = probe[empty]
        found = filled[donors]
        minima[empty[found]] = minima[donors[found]]
        empty = empty[~found]
    # What is still empty (sets of a few shingles) keeps the overall minimum.
    return minima


def band_hashes(minima: Hashes, salt: int) -> Hashes:
    """Return one hash for each band of a sketch; documents of different `salt` never meet."""
    hashes = _numbers(salt * NUM_BANDS, NUM_BANDS)
    for column in minima.reshape(NUM_BANDS, ROWS_PER_BAND).T:
        hashes = mix(hashes * MULTIPLIER + column)
    return hashes


def candidate_pairs(bands: Hashes) -> npt.NDArray[np.int64]:
    """Return the sorted distinct pairs (i < j) of documents that share a band.

    `bands` has shape [documents, NUM_BANDS]. A bucket yields its first member with each other one
    and neighbors with each other, so that many alike documents cost linear, not quadratic, time.
    """
    count = len(bands)
    codes: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for column in bands.T:
        order = np.argsort(column, kind="stable")
        same = column[order[1:]] == column[order[:-1]]
        start = np.maximum.accumulate(np.where(same, 0, np.arange(1, len(same) + 1)))
        member = order[1:][same]
        codes += [order[start][same] * count + member, order[:-1][same] * count + member]
    pairs = np.unique(np.concatenate(codes))
    return np.stack([pairs // max(count, 1), pairs % max(count, 1)], axis=1)


def jaccard(left: Hashes, right: Hashes) -> float:
    """Return the exact Jaccard similarity of two sorted shingle sets (0.0 for empty ones)."""
    both = len(np.intersect1d(left, right, assume_unique=True))
    either = len(left) + len(right) - both
    return both / either if either else 0.0
