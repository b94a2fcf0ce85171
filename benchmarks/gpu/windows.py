"""Times training steps: warm-up first, then a few windows of whole steps, synchronized at the ends.

Counts may be tensors on the device; they are read at the end of a window, so that counting forces
no synchronization within one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

MOST_STEPS = 40


@dataclass
class Window:
    """What went through in one window."""

    seconds: float
    steps: int
    tokens: int
    positions: int
    pairs: int


@dataclass
class Windows:
    """`repeats` windows of at least `seconds` each, after `warmup` steps."""

    synchronize: Callable[[], None]
    warmup: int = 3
    repeats: int = 3
    seconds: float = 4.0
    found: list[Window] = field(default_factory=list)
    warmup_seconds: float = 0.0
    _counts: Any = (0, 0, 0)
    _steps: int = 0
    _size: int = 0
    _done: int = 0
    _began: float = field(default_factory=time.perf_counter)

    def add(self, tokens: Any, positions: Any, pairs: Any) -> None:
        """Count a micro-step: real tokens, positions, and (query, key) pairs of real tokens."""
        new = (tokens, positions, pairs)
        self._counts = tuple(a + b for a, b in zip(self._counts, new, strict=True))

    def step(self) -> bool:
        """Count a step; return whether all windows are full.

        The step after the warm-up is timed to choose how many steps a window has.
        """
        self._done += 1
        self._steps += 1
        if self._done < self.warmup:
            return False
        if self._done == self.warmup:
            self.warmup_seconds = self._close().seconds
        elif not self._size:
            needed = self.seconds / max(self._close().seconds, 1e-6)
            self._size = min(max(round(needed), 2), MOST_STEPS)
        elif self._steps == self._size:
            self.found.append(self._close())
        return len(self.found) == self.repeats

    def _close(self) -> Window:
        self.synchronize()
        now = time.perf_counter()
        window = Window(now - self._began, self._steps, *(int(n) for n in self._counts))
        self._counts, self._steps, self._began = (0, 0, 0), 0, now
        return window

    def rate(self, of: Callable[[Window], float]) -> float:
        """Return the median over the windows of a count per second."""
        return median(of(window) / window.seconds for window in self.found)
