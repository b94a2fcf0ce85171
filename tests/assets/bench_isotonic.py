# SPDX-License-Identifier: BSD-3-Clause
# ruff: noqa: N803
import gc
from timeit import default_timer

from sklearn.isotonic import isotonic_regression


def bench_isotonic_regression(Y):
    """
    Runs a single iteration of isotonic regression on the input data,
    and reports the total time taken (in seconds).
    """
    gc.collect()

    tstart = default_timer()
    isotonic_regression(Y)
    return default_timer() - tstart
