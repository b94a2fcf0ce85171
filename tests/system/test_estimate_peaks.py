"""The memory that is estimated before training is the memory that training takes."""

import pytest

from benchmarks.training_memory import CASES, compare

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

# One whose peak is in the activations, one in the optimizer's step, one with frozen weights.
CHOSEN = ("full, activations", "full, weights", "LoRA, bfloat16")


@pytest.mark.parametrize("label", CHOSEN)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(label):
    (row,) = compare(tuple(case for case in CASES if case.label == label))

    assert abs(row["off"]) <= 0.15, f"{row['estimated']:.2f} GiB for {row['measured']:.2f}"
