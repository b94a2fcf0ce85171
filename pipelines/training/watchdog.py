"""Watches over a run: losses that are no numbers or leap up, and ranks that hang.

Invariant: the spike watch is a pure function of `Progress`, so every rank decides alike and a
resumed run decides as an undisturbed one.
"""

import contextlib
import faulthandler
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pipelines.errors import TrainingError
from pipelines.training.progress import Progress

logger = logging.getLogger(__name__)

MEDIAN_OF = 100  # losses
MEDIAN_FROM = 10  # losses before the first judgement
STALLED = 75  # EX_TEMPFAIL: starting again may help


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise TrainingError where loss or gradient norm is not a number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: loss {loss}, gradient norm {norm}; nothing after the last "
            "checkpoint is kept. Lower training.learning_rate or raise training.warmup_steps"
        )


def check_spike(
    progress: Progress, step: int, loss: float, threshold: float | None, patience: int
) -> None:
    """Note a step's loss; raise TrainingError after `patience` high ones in a row.

    High is above `threshold` x the median of the latest losses that were not high (axolotl's
    watchdog has a fixed threshold; a factor fits any loss). A threshold of None never raises.
    """
    if threshold is None:
        return
    if len(progress.losses) >= MEDIAN_FROM:
        median = statistics.median(progress.losses)
        if loss > threshold * median:
            progress.high.append((step, loss))
            if len(progress.high) >= patience:
                raise TrainingError(_spike(progress.high, threshold, median))
            return
    progress.high = []
    progress.losses = [*progress.losses, loss][-MEDIAN_OF:]


def _spike(high: list[tuple[int, float]], threshold: float, median: float) -> str:
    steps = ", ".join(str(step) for step, _ in high)
    losses = ", ".join(f"{loss:.3f}" for _, loss in high)
    return (
        f"the loss leapt up at steps {steps}: {losses}, above training.loss_spike_threshold "
        f"{threshold:g} x the median {median:.3f}; the last checkpoint from before is kept. Lower "
        "training.learning_rate, raise training.warmup_steps, or raise the threshold"
    )


class Heartbeat:
    """Ends this process where it makes no progress for `limit` seconds: better than a hang.

    Its thread needs nothing from the main one, which may wait forever in a collective for a rank
    that is gone. Every rank has its own, so that one which is itself frozen is ended by torchrun
    when the first of the others ends.
    """

    def __init__(self, limit: float | None, rank: int, report: Callable[[str], None]) -> None:
        """Prepare: `report` gets the error text before the process ends. None watches nothing."""
        self._limit = limit
        self._rank = rank
        self._report = report
        self._what = "starting"
        self._last = time.monotonic()
        self._over = threading.Event()

    def beat(self, what: str) -> None:
        """Say that this rank gets on, and what it does next."""
        self._what, self._last = what, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the block."""
        if self._limit is None:
            yield
            return
        self.beat(self._what)
        thread = threading.Thread(target=self._watch, args=(self._limit,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self, limit: float) -> None:
        while not self._over.wait(min(limit / 4, 10.0)):
            if time.monotonic() - self._last > limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        text = (
            f"rank {self._rank} made no progress for {limit / 60:g} minutes "
            f"(training.stall_minutes) while {self._what}; where each of its threads is stands in "
            "the log. It, or another rank that it waited for, hung: check the GPUs, the network "
            "and the file system, then start it again to resume"
        )
        logger.error("%s", text)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._report(text)
        os._exit(STALLED)
