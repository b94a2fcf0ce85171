"""What a run has done so far, on all ranks: it travels in every checkpoint.

Invariant: all of it is plain numbers, lists and strings, so that JSON keeps it exactly and a
resumed run decides everything as an undisturbed one.
"""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Sums over all steps so far (and over the window since the last line), on all ranks.

    `pairs` counts (query, key) pairs of attention, `positions` tokens and padding. `losses` and
    `high` are the spike watch's: the latest losses, and [step, loss] of a spike that goes on.
    """

    tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    peak_gpu_memory: int = 0
    window_steps: int = 0
    window_tokens: int = 0
    window_positions: int = 0
    window_pairs: int = 0
    window_loss: float = 0.0
    window_seconds: float = 0.0
    window_wait: float = 0.0
    losses: list[float] = field(default_factory=list)
    high: list[tuple[int, float]] = field(default_factory=list)
    eval_step: int | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    stopped_by: str | None = None


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What all ranks together did in one step, and what they have used since they started.

    `wait` is the mean over ranks of the seconds spent waiting for batches, `peak_gpu_memory` the
    bytes of the rank that took most.
    """

    tokens: int
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    positions: int = 0
    pairs: int = 0
    wait: float = 0.0
    peak_gpu_memory: int = 0
