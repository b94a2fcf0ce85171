"""Near-duplicate candidates: one-permutation MinHash sketches, cut into bands; exact Jaccard.

Sketches only propose pairs; `jaccard` decides, so a wrong hash can cost a candidate but never
makes two documents duplicates.

Sources: Li, Owen, Zhang, "One Permutation Hashing" (2012); Shrivastava, "Optimal Densification for
Fast and Accurate Minwise Hashing" (2017); Broder, "On the resemblance and containment of
documents" (1997).
"""

import functools

import numpy as np
import numpy.typing as npt

from pipelines.curate.words import MULTIPLIER, Grams, Hashes, mix, numbers

NUM_BINS = 256
NUM_PROBES = 32
LARGEST_MISS = 0.0055
EMPTY = np.uint64(2**64 - 1)


@functools.cache
def _probes() -> npt.NDArray[np.int64]:
    chosen = (numbers(1_000, NUM_PROBES * NUM_BINS) % np.uint64(NUM_BINS)).astype(np.int64)
    return chosen.reshape(NUM_PROBES, NUM_BINS)


def rows_per_band(threshold: float) -> int:
    """Return the most sketch rows per band that miss a pair at the threshold in 0.55 % at most.

    >>> [rows_per_band(threshold) for threshold in (0.3, 0.5, 0.7, 0.8, 0.9)]
    [2, 3, 6, 8, 13]
    """
    rows = 1
    while rows < NUM_BINS // 8:
        if (1 - threshold ** (rows + 1)) ** (NUM_BINS // (rows + 1)) > LARGEST_MISS:
            break
        rows += 1
    return rows


def sketch(grams: Grams) -> Hashes:
    """Return the minimum hash in each of NUM_BINS ranges, shape [documents, NUM_BINS].

    Two sketches agree in a bin with a probability equal to the Jaccard similarity of the sets. An
    empty bin copies another one, the same for every document (optimal densification). Documents
    without hashes stay EMPTY.
    """
    minima = np.full((len(grams.counts), NUM_BINS), EMPTY)
    row = np.repeat(np.arange(len(minima)) * NUM_BINS, grams.counts)
    row += (grams.hashes >> np.uint64(56)).view(np.int64)
    np.minimum.at(minima.reshape(-1), row, grams.hashes)
    _fill_empty(minima)
    return minima


def _fill_empty(minima: Hashes) -> None:
    flat, lowest = minima.reshape(-1), minima.min(axis=1, initial=EMPTY)
    filled = flat != EMPTY
    empty = np.flatnonzero(~filled)
    for probe in _probes():
        if not len(empty):
            return
        donors = (empty & -NUM_BINS) + probe[empty & (NUM_BINS - 1)]
        found = filled[donors]
        flat[empty[found]] = flat[donors[found]]
        empty = empty[~found]
    # What is still empty (sets of a few shingles) keeps the overall minimum.
    flat[empty] = lowest[empty // NUM_BINS]


def band_hashes(minima: Hashes, salts: Hashes, rows: int) -> Hashes:
    """Return one hash per band, shape [bands, documents]; documents of other salt never meet."""
    bands = NUM_BINS // rows
    hashes = numbers(0, bands)[:, None] + salts * MULTIPLIER
    columns = minima[:, : bands * rows].reshape(len(minima), bands, rows).transpose(2, 1, 0)
    for column in columns:
        hashes = mix(hashes * MULTIPLIER + column)
    return hashes


def jaccard(left: Hashes, right: Hashes) -> float:
    """Return the exact Jaccard similarity of two sorted shingle sets (0.0 for empty ones)."""
    both = np.concatenate((left, right))
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    either = len(both) - shared
    return shared / either if either else 0.0
