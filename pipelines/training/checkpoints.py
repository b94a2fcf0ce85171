"""Checkpoints that are complete or do not count.

Invariant: `checkpoint-N` counts only with a `complete.json`, which is written last, after every
rank's files are synced, and lists all files with their sizes. An older checkpoint is removed only
after a newer one is complete. So whatever is killed, or a disk that fills up, leaves the last good
one. Each says in `layout.json` on how many ranks and how many rows a step it was made.
"""

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import DiskFull, TrainingError
from pipelines.settings.hardware import Hardware
from pipelines.settings.training import Training
from pipelines.store import sync_folder, write_atomic

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
PROGRESS = "progress.json"
LAYOUT = "layout.json"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run's steps are spread: what a checkpoint needs to go on exactly."""

    strategy: str
    world_size: int
    rows_per_step: int

    @classmethod
    def of(cls, training: Training, hardware: Hardware) -> "Layout":
        """Return the layout of a recipe's training on a hardware."""
        ranks = hardware.num_nodes * hardware.processes_per_node
        micro = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return cls(hardware.strategy, ranks, micro * ranks)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a run's checkpoints note, and which of them stay: the newest `keep`, and the best."""

    keep: int
    keep_best: bool
    layout: Layout


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step goes."""
    return root / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    match = NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def commit(folder: Path, progress: dict[str, Any], layout: Layout | None = None) -> None:
    """Declare a checkpoint complete. Call it on one rank, after all ranks have written theirs."""
    (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    if layout is not None:
        (folder / LAYOUT).write_text(json.dumps(asdict(layout)), encoding="utf-8")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync_folder(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_atomic(folder / COMPLETE, json.dumps({"step": step_of(folder), "files": sizes}, indent=1))
    sync_folder(folder)
    sync_folder(folder.parent)


def problem(folder: Path) -> str | None:
    """Say why a checkpoint does not count, or return None where it does."""
    try:
        complete = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        step, files = complete["step"], complete["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no {COMPLETE}"
    if step != step_of(folder):
        return f"it is of step {step}"
    for name, size in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints that count, oldest step first."""
    return [folder for folder in _folders(root) if problem(folder) is None]


def newest_checkpoint(root: Path) -> Path | None:
    """Return the complete checkpoint with the highest step, or None."""
    return next(reversed(complete_checkpoints(root)), None)


def read_progress(folder: Path) -> dict[str, Any]:
    """Return what `commit` was given."""
    progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return progress


def best_checkpoint(root: Path) -> Path | None:
    """Return the complete checkpoint with the lowest validation loss at its own step, or None.

    The earlier one where two are equal.
    """
    losses = {}
    for folder in complete_checkpoints(root):
        progress = read_progress(folder)
        if progress.get("eval_step") == step_of(folder):
            losses[folder] = float(progress["eval_loss"])
    return min(losses, key=losses.__getitem__, default=None)


def check_layout(folder: Path, now: Layout) -> None:
    """Raise TrainingError where a checkpoint cannot go on exactly in the present layout."""
    try:
        before = Layout(**json.loads((folder / LAYOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return  # of a time that did not note it; DeepSpeed itself refuses what it cannot load
    sharded = before.strategy != "ddp" or now.strategy != "ddp"
    made = f"{folder} was made by {before.strategy} on {before.world_size} process(es)"
    weights = (
        f"or begin anew from its weights: model.model_name_or_path={folder} and "
        f"tokenizer.name_or_path={_tokenizer_of(folder)} in a new recipe"
        if (folder / "config.json").is_file()
        else "or begin anew with training.resume_from_checkpoint=false"
    )
    if before.strategy != now.strategy or (sharded and before.world_size != now.world_size):
        raise TrainingError(
            f"{made}, now it is {now.strategy} on {now.world_size}: the optimizer's shards fit "
            f"that many processes of that strategy only. Resume on {before.world_size} "
            f"process(es) with {before.strategy} (only strategy ddp on both sides may change "
            f"their number), {weights}"
        )
    if before.rows_per_step != now.rows_per_step:
        raise TrainingError(
            f"{made} with {before.rows_per_step} rows a step, now it is {now.world_size} "
            f"process(es) with {now.rows_per_step}: the learning-rate schedule and the order of "
            "the data would change. Set training.per_device_train_batch_size x "
            "gradient_accumulation_steps x processes to "
            f"{before.rows_per_step}, {weights}"
        )


def _tokenizer_of(folder: Path) -> str:
    """Return the tokenizer's folder of a checkpoint's run, which a checkpoint does not hold."""
    run = folder.absolute().parents[1]
    try:
        stages = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
        return str(run.parents[1] / "store" / stages["tokenizer"]["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return "(the run's tokenizer)"


def remove_incomplete(root: Path) -> list[str]:
    """Remove checkpoints that do not count, naming each in the log; return their names."""
    removed = []
    for folder in _folders(root):
        reason = problem(folder)
        if reason is not None:
            logger.warning("%s is incomplete (%s): removed", folder, reason)
            _remove(folder)
            removed.append(folder.name)
    return removed


def rotate(root: Path, keep: int, *, keep_best: bool = False) -> None:
    """Remove all complete checkpoints but the newest `keep`, and the best where asked."""
    best = best_checkpoint(root) if keep_best else None
    for folder in complete_checkpoints(root)[:-keep]:
        if folder != best:
            _remove(folder)


def raise_disk_full(path: Path, error: BaseException) -> None:
    """Raise DiskFull where an error is one: torch.save hides the errno behind a RuntimeError."""
    no_space = getattr(error, "errno", None) == errno.ENOSPC
    if no_space or shutil.disk_usage(path.parent).free < 2**20:
        raise DiskFull(
            f"{path}: no space left while saving; the last complete checkpoint is kept. "
            "Free some space and run the same command again"
        ) from error


def _folders(root: Path) -> list[Path]:
    found = [p for p in root.glob("checkpoint-*") if p.is_dir() and NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def _remove(folder: Path) -> None:
    """Take the mark of completeness first, so that a kill leaves nothing that seems to count."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)
