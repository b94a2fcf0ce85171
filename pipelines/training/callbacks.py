"""What is measured and agreed on at every step: tokens, time, losses, and whether to stop.

Times are wall time. A window is what lies between two lines of metrics.jsonl.

Invariant: metrics.jsonl holds each step at most once. The sums behind its lines travel in the
checkpoint, so that a resumed run writes the lines that an undisturbed one would have written
(times aside).
"""

import json
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from pipelines.engine import usage
from pipelines.jsonlines import read_lines
from pipelines.store import write_atomic
from pipelines.training.budgets import Limits
from pipelines.training.checkpoints import raise_disk_full
from pipelines.training.flops import Flops, Speed
from pipelines.training.progress import Progress, StepCounts
from pipelines.training.watchdog import Heartbeat, check_finite, check_spike

logger = logging.getLogger(__name__)

SPEED_UNKNOWN = Speed(Flops(0, 0), None)


@dataclass
class Local:
    """What this rank has taken in since the last step ended."""

    tokens: int = 0
    positions: int = 0
    pairs: int = 0
    wait: float = 0.0


@dataclass
class Meter:
    """Counts this rank's tokens and writes metrics.jsonl (where `path` is given: on rank 0).

    `spike` is (loss_spike_threshold, loss_spike_patience).
    """

    path: Path | None
    logging_steps: int
    speed: Speed = SPEED_UNKNOWN
    spike: tuple[float | None, int] = (None, 3)
    progress: Progress = field(default_factory=Progress)
    local: Local = field(default_factory=Local)
    _attempt: float = field(default_factory=time.monotonic)
    _mark: float = field(default_factory=time.monotonic)
    _earlier: Progress = field(default_factory=Progress)
    _rates: dict[str, Any] = field(default_factory=dict)

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
        self.progress.seconds = self.seconds()
        return asdict(self.progress)

    def seconds(self) -> float:
        """Return the wall time of this attempt and those before it."""
        return self._earlier.seconds + time.monotonic() - self._attempt

    def mark(self) -> None:
        """Start the clock of the next step: what came before is no training."""
        self._mark = time.monotonic()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Return the same batches; the time until each is there counts as waiting for data."""
        return _TimedBatches(batches, self.local)

    def count(self, batches: Sequence[dict[str, torch.Tensor]], pad_id: int) -> None:
        """Count the real tokens, positions and attended pairs of this rank's batches of a step.

        A token at position p of its document attends to p + 1 keys. One transfer from the device.
        """
        if not batches:
            return
        counts = torch.zeros(2, dtype=torch.int64, device=batches[0]["input_ids"].device)
        for batch in batches:
            real = batch["input_ids"] != pad_id
            keys = (batch["position_ids"] + 1) * real
            counts += torch.stack([real.sum(), keys.sum()])
            self.local.positions += real.numel()
        tokens, pairs = counts.tolist()
        self.local.tokens += tokens
        self.local.pairs += pairs

    def take_local(self) -> Local:
        """Return this rank's counts of the step, and begin anew."""
        taken = Local(**asdict(self.local))
        # In place: the iterator of batches adds its waiting to this very object.
        self.local.tokens = self.local.positions = self.local.pairs = 0
        self.local.wait = 0.0
        return taken

    def finish_step(self, counts: StepCounts) -> None:
        """Add a step of all ranks."""
        progress = self.progress
        progress.tokens += counts.tokens
        progress.window_tokens += counts.tokens
        progress.window_positions += counts.positions
        progress.window_pairs += counts.pairs
        progress.window_wait += counts.wait
        progress.window_steps += 1
        progress.window_seconds += time.monotonic() - self._mark
        progress.peak_gpu_memory = max(progress.peak_gpu_memory, counts.peak_gpu_memory)
        self.used(counts.cpu_seconds, counts.peak_rss)
        self.mark()

    def used(self, cpu_seconds: float, peak_rss: int) -> None:
        """Note CPU seconds and peak memory of all ranks in this attempt."""
        self.progress.cpu_seconds = self._earlier.cpu_seconds + cpu_seconds
        self.progress.peak_rss = max(self._earlier.peak_rss, peak_rss)

    def trained(self, step: int, max_steps: int, logs: dict[str, float]) -> dict[str, Any] | None:
        """Take a step's loss; write and return a line when the window is full or training ends.

        Raises TrainingError on every rank where loss or gradient norm is not a number, or where
        the loss leaps up.
        """
        loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
        check_finite(step, loss, norm)
        check_spike(self.progress, step, loss, *self.spike)
        progress = self.progress
        progress.loss_sum += loss
        progress.window_loss += loss
        self._rates = {
            "step": step,
            "max_steps": max_steps,
            "learning_rate": logs["learning_rate"],
            "grad_norm": norm,
        }
        if step % self.logging_steps and step < max_steps and progress.stopped_by is None:
            return None
        return self.close_window()

    def close_window(self) -> dict[str, Any] | None:
        """Write and return the line of the window so far, None where it is empty."""
        progress = self.progress
        if not progress.window_steps:
            return None
        seconds = max(progress.window_seconds, 1e-9)
        tokens, positions = progress.window_tokens, progress.window_positions
        line = {
            **self._rates,
            "loss": progress.window_loss / progress.window_steps,
            "tokens": progress.tokens,
            "seconds": round(self.seconds(), 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(1 - tokens / positions, 4) if positions else 0.0,
            "data_wait_share": round(progress.window_wait / seconds, 4),
            **self.speed.utilization(tokens, progress.window_pairs, seconds),
            "peak_rss": progress.peak_rss,
            "peak_gpu_memory": progress.peak_gpu_memory,
        }
        self._write(line)
        progress.window_steps = progress.window_tokens = 0
        progress.window_positions = progress.window_pairs = 0
        progress.window_loss = progress.window_seconds = progress.window_wait = 0.0
        return line

    def evaluated(
        self, step: int, loss: float, tokens: int, parts: dict[str, Any] | None = None
    ) -> None:
        """Write the line of an evaluation, with more numbers (`parts`) where there are some."""
        self.progress.eval_step, self.progress.eval_loss = step, loss
        self._write({"step": step, **(parts or {}), "eval_loss": loss, "eval_tokens": tokens})

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise_disk_full(self.path, error)
            raise


class _TimedBatches:
    """An iterator that adds the time until each of its items is there to `local.wait`."""

    def __init__(self, batches: Iterator[Any], local: Local) -> None:
        self._batches = batches
        self._local = local

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self._local.wait += time.monotonic() - start


class StepAgreement(TrainerCallback):  # type: ignore[misc]
    """After each step, one exchange tells every rank the sums and whether any has to stop.

    The ranks get their SIGTERM at different moments: without agreement one would save while the
    others wait for it in the next step. The clock of a time budget is that of rank 0.
    """

    def __init__(
        self,
        meter: Meter,
        device: torch.device,
        limits: Limits | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Share this rank's meter; `device` is that of the process group."""
        self._meter = meter
        self._device = device
        self._limits = limits or Limits()
        self._heartbeat = heartbeat or Heartbeat(None, 0, lambda _: None)
        self._stop = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock and catch SIGTERM: until here, with nothing to save, it ends the rank."""
        self._meter.mark()
        signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop = True

    def on_substep_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Tell the heartbeat of a batch that is done."""
        self._heartbeat.beat(f"in step {state.global_step + 1}")

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Exchange, count, and on a stop ask for a checkpoint and the end."""
        meter, step = self._meter, state.global_step
        self._heartbeat.beat(f"in step {step}, waiting for the other ranks")
        stops, counts, seconds = self._exchange()
        meter.finish_step(counts)
        self._heartbeat.beat(f"in step {step + 1}")
        if step >= state.max_steps:
            control.should_evaluate = True  # whatever eval_steps is, the curve ends at the end
        elif (budget := self._limits.after_step(meter.progress, seconds)) is not None:
            self._end(control, step, budget)
            control.should_evaluate = True
        if stops:
            logger.warning("stopping after step %d: checkpoint follows", step)
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(self, _args: Any, state: Any, control: Any, **options: Any) -> Any:
        """End training where evaluations have got no better for too long."""
        step, loss = state.global_step, options["metrics"]["eval_loss"]
        reason = self._limits.after_evaluation(self._meter.progress, loss)
        if reason and step < state.max_steps and self._meter.progress.stopped_by is None:
            self._end(control, step, reason)
            self._meter.close_window()
        return control

    def _end(self, control: Any, step: int, reason: str) -> None:
        logger.info("training ends after step %d: %s", step, reason)
        self._meter.progress.stopped_by = reason
        control.should_save = control.should_training_stop = True

    def _exchange(self) -> tuple[float, StepCounts, float]:
        """Return (ranks that have to stop, counts of all ranks, seconds of rank 0)."""
        local, meter = self._meter.take_local(), self._meter
        on_gpu = self._device.type == "cuda"
        gpu = torch.cuda.max_memory_allocated(self._device) if on_gpu else 0
        mine = [
            float(self._stop), local.tokens, local.positions, local.pairs, local.wait,
            *usage(), gpu, meter.seconds(),
        ]  # fmt: skip
        ranks = gather_over_ranks([float(value) for value in mine], self._device)
        columns = list(zip(*ranks, strict=True))
        stops, tokens, positions, pairs, wait, cpu_seconds, peak_rss = map(sum, columns[:7])
        counts = StepCounts(
            tokens=int(tokens),
            cpu_seconds=cpu_seconds,
            peak_rss=int(peak_rss),
            positions=int(positions),
            pairs=int(pairs),
            wait=wait / len(ranks),
            peak_gpu_memory=int(max(columns[7])),
        )
        return stops, counts, columns[8][0]


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the element-wise sum of a list over all ranks."""
    if not distributed.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def gather_over_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """Return the lists of all ranks, in their order."""
    if not distributed.is_initialized():
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    all_ranks = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_ranks, mine)
    return [tensor.tolist() for tensor in all_ranks]
