"""Steps, tokens and hours of a training before it starts.

Steps are counted as transformers.Trainer counts them. Operations per token as `flops` counts them
from a loaded model: 6 per weight of a matrix, 4 where it is frozen, 2 more where it is recomputed.
"""

import math
import time
from dataclasses import dataclass

from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.training.flops import find_peak
from pipelines.training.shapes import Shape

# Shares of the device's peak that training reaches, by experience (anchors: 40 to 55 % on GPUs);
# on CPU, of the rate of one large matrix product on one thread.
GPU_SHARE, CPU_SHARE = 0.4, 0.5
MEAN_DOCUMENT = 700  # tokens: what a token attends to is half of its document
PACKED = 0.995  # of a row is filled


@dataclass(frozen=True, slots=True)
class Length:
    """How much is trained: steps, their tokens, epochs. `rough` where the dataset is not built."""

    steps: int
    tokens: int
    rows: int | None
    rough: bool


def tokens_per_step(recipe: Recipe, hardware: Hardware) -> int:
    """Return the tokens of full rows that all processes train in one step."""
    return rows_per_step(recipe, hardware) * recipe.tokenization.block_size


def rows_per_step(recipe: Recipe, hardware: Hardware) -> int:
    """Return the rows that all processes train in one step."""
    training, ranks = recipe.training, hardware.num_nodes * hardware.processes_per_node
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks


def count_steps(recipe: Recipe, hardware: Hardware, rows: int) -> int:
    """Return max_steps as Trainer computes it from the rows of a pass."""
    training = recipe.training
    if training.max_steps > 0:
        return training.max_steps
    ranks = hardware.num_nodes * hardware.processes_per_node
    batches = math.ceil(rows / (training.per_device_train_batch_size * ranks))
    per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    return math.ceil(training.num_train_epochs * per_epoch)


def estimate_length(
    recipe: Recipe, hardware: Hardware, rows: int | None, rough_tokens: int | None
) -> Length | None:
    """Return how much is trained, from the packed rows, else from a rough number of tokens.

    None where neither is known and the recipe does not fix its steps.
    """
    rough = rows is None
    if rows is None and rough_tokens is not None:
        rows = math.ceil(rough_tokens / (PACKED * recipe.tokenization.block_size))
    if rows is None and recipe.training.max_steps < 1:
        return None
    steps = count_steps(recipe, hardware, rows or 0)
    tokens = int(steps * tokens_per_step(recipe, hardware) * PACKED)
    budget = recipe.training.max_train_tokens
    if budget is not None and tokens > budget:
        steps = math.ceil(steps * budget / tokens)
        tokens = budget
    return Length(steps, tokens, rows, rough and recipe.training.max_steps < 1)


def flops_per_token(recipe: Recipe, shape: Shape) -> float:
    """Return the operations that training one token takes, recomputation included."""
    blocks, head = shape.layers * shape.block_matrices, shape.vocab * shape.hidden
    frozen = recipe.adapter is not None
    total = (4.0 if frozen else 6.0) * (blocks + head)
    if recipe.adapter is not None:
        total += 6 * shape.adapter_parameters(recipe.adapter)
    keys = min(recipe.tokenization.block_size, MEAN_DOCUMENT) / 2
    attention = 4 * shape.layers * shape.query * keys
    total += 3 * attention
    if recipe.training.gradient_checkpointing:
        total += 2 * blocks + attention
    return total


def device_rate(recipe: Recipe, hardware: Hardware, device: str | None) -> float | None:
    """Return the FLOP/s that one process can be expected to reach; None where it is not known.

    `device` is the GPU's name. The CPU's rate is measured here, in a moment.
    """
    if hardware.device == "cpu":
        return CPU_SHARE * _measure_cpu() * hardware.threads_per_process
    peak = find_peak(device, recipe.model.dtype, hardware.peak_tflops)
    return None if peak is None else GPU_SHARE * peak


def estimate_seconds(
    recipe: Recipe, shape: Shape, hardware: Hardware, tokens: int, rate: float
) -> float:
    """Return the seconds that training takes at a rate per process."""
    ranks = hardware.num_nodes * hardware.processes_per_node
    return tokens * flops_per_token(recipe, shape) / (rate * ranks)


def _measure_cpu(size: int = 384, rounds: int = 3) -> float:
    """Return the FLOP per CPU second of one thread's float32 matrix product; the best of a few."""
    import numpy as np
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    matrix = np.ones((size, size), dtype=np.float32)
    best = math.inf
    # On a busy machine threads that wait for each other burn CPU time, 10 to 50 times the work's.
    with threadpool_limits(1):
        matrix @ matrix  # the first one loads the library
        for _ in range(rounds):
            started = time.process_time()
            for _ in range(4):
                matrix @ matrix
            best = min(best, time.process_time() - started)
    return 4 * 2 * size**3 / max(best, 1e-6)
