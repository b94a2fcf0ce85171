"""Batches of packed rows with given documents."""

import numpy as np

from pipelines.training.collate import Collator, PackedRow


def make_rows(shape, vocabulary=64):
    """Return rows whose documents have the lengths of `shape`; all tokens are trained."""
    rng = np.random.default_rng(0)
    rows = []
    for lengths in shape:
        ids = rng.integers(0, vocabulary, sum(lengths))
        rows.append(PackedRow(ids, ids, np.array(lengths)))
    return rows


def make_batch(shape, **options):
    """Return the batch of such rows."""
    return Collator(0, **options)(make_rows(shape))
