"""The memory that is estimated before training is the memory that training takes."""

from importlib.util import find_spec

import pytest

from benchmarks.training_memory import CASES, compare

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

# One whose peak is in the activations, one in the optimizer's step, one with frozen weights and
# recomputation, where the allocator took twice the memory of the tensors.
CHOSEN = ("full, activations", "full, weights", "LoRA, checkpointing")
# One whose peak is where its base is loaded, one whose layers keep their inputs.
QUANTIZED = ("4 bit, weights", "8 bit, checkpointing")
HERE = CHOSEN + (QUANTIZED if find_spec("bitsandbytes") else ())


@pytest.fixture(scope="module")
def rows():
    return {row["case"].label: row for row in compare(tuple(c for c in CASES if c.label in HERE))}


@pytest.mark.parametrize("label", CHOSEN + QUANTIZED)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(rows, label):
    if label not in HERE:
        pytest.skip("the extra bitsandbytes is not installed")
    row = rows[label]

    assert abs(row["off"]) <= 0.15, f"{row['estimated']:.2f} GiB for {row['measured']:.2f}"
