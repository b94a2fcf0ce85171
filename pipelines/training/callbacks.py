"""What is measured and agreed on at every step: tokens, time, losses, and whether to stop.

Invariant: metrics.jsonl holds each step at most once. The sums behind its lines travel in the
checkpoint, so that a resumed run writes the lines that an undisturbed one would have written
(times aside).
"""

import json
import logging
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from pipelines.engine import usage
from pipelines.errors import TrainingError
from pipelines.jsonlines import read_lines
from pipelines.store import write_atomic

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Sums over all steps so far (and over the window since the last line), on all ranks."""

    tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    window_steps: int = 0
    window_tokens: int = 0
    window_loss: float = 0.0
    window_seconds: float = 0.0


@dataclass
class Meter:
    """Counts this rank's tokens and writes metrics.jsonl (where `path` is given: on rank 0)."""

    path: Path | None
    logging_steps: int
    progress: Progress = field(default_factory=Progress)
    local_tokens: int = 0
    _attempt: float = field(default_factory=time.monotonic)
    _mark: float = field(default_factory=time.monotonic)
    _earlier: Progress = field(default_factory=Progress)

    def start(self, step: int, progress: dict[str, Any]) -> None:
        """Take up the sums of a checkpoint, and cut metrics.jsonl back to its step.

        A run without a checkpoint starts at step -1, before its first evaluation.
        """
        self.progress = Progress(**progress)
        self._earlier = Progress(**progress)
        if self.path is not None:
            kept = [line for line in read_lines(self.path) if line["step"] <= step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def state(self) -> dict[str, Any]:
        """Return the sums for a checkpoint."""
        self.progress.seconds = self._earlier.seconds + time.monotonic() - self._attempt
        return asdict(self.progress)

    def mark(self) -> None:
        """Start the clock of the next step: what came before is no training."""
        self._mark = time.monotonic()

    def finish_step(self, tokens: int, cpu_seconds: float, peak_rss: int) -> None:
        """Add a step: real tokens of all ranks, and what all ranks have used since they started."""
        progress = self.progress
        progress.tokens += tokens
        progress.window_tokens += tokens
        progress.window_steps += 1
        progress.window_seconds += time.monotonic() - self._mark
        self.used(cpu_seconds, peak_rss)
        self.mark()

    def used(self, cpu_seconds: float, peak_rss: int) -> None:
        """Note CPU seconds and peak memory of all ranks in this attempt."""
        self.progress.cpu_seconds = self._earlier.cpu_seconds + cpu_seconds
        self.progress.peak_rss = max(self._earlier.peak_rss, peak_rss)

    def trained(self, step: int, max_steps: int, logs: dict[str, float]) -> None:
        """Take a step's loss, and write a line when the window is full or training ends.

        Raises TrainingError on every rank where loss or gradient norm is not a number.
        """
        loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}; nothing after the last "
                "checkpoint is kept. Lower training.learning_rate or raise training.warmup_steps"
            )
        progress = self.progress
        progress.loss_sum += loss
        progress.window_loss += loss
        if step % self.logging_steps and step < max_steps:
            return
        self._write(
            {
                "step": step,
                "max_steps": max_steps,
                "loss": progress.window_loss / progress.window_steps,
                "learning_rate": logs["learning_rate"],
                "grad_norm": norm,
                "tokens": progress.tokens,
                "seconds": round(self.state()["seconds"], 2),
                "tokens_per_second": round(progress.window_tokens / progress.window_seconds, 1),
            }
        )
        progress.window_steps = progress.window_tokens = 0
        progress.window_loss = progress.window_seconds = 0.0

    def evaluated(self, step: int, loss: float, tokens: int) -> None:
        """Write the line of an evaluation."""
        self._write({"step": step, "eval_loss": loss, "eval_tokens": tokens})

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class StepAgreement(TrainerCallback):  # type: ignore[misc]
    """After each step, one all-reduce tells every rank the sums and whether any has to stop.

    The ranks get their SIGTERM at different moments: without agreement one would save while the
    others wait for it in the next step.
    """

    def __init__(self, meter: Meter, device: torch.device) -> None:
        """Share this rank's meter; `device` is that of the process group."""
        self._meter = meter
        self._device = device
        self._stop = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock and catch SIGTERM: until here, with nothing to save, it ends the rank."""
        self._meter.mark()
        signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop = True

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Exchange, count, and on a stop ask for a checkpoint and the end."""
        meter = self._meter
        stops, tokens, cpu_seconds, peak_rss = sum_over_ranks(
            [float(self._stop), float(meter.local_tokens), *usage()], self._device
        )
        meter.local_tokens = 0
        meter.finish_step(int(tokens), cpu_seconds, int(peak_rss))
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # whatever eval_steps is, the curve ends at the end
        if stops:
            logger.warning("stopping after step %d: checkpoint follows", state.global_step)
            control.should_save = control.should_training_stop = True
        return control


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the element-wise sum of a list over all ranks."""
    if not distributed.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed
