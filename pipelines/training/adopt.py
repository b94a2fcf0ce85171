"""Goes on from a checkpoint of another run: other hardware, another budget, the same training.

Invariant: an adopted checkpoint is linked into the run's own folder and declared complete last, so
that from then on the run resumes as any other. It is adopted only where data, model and all that
decides the weights are equal.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pipelines.errors import TrainingError
from pipelines.jsonlines import read_lines
from pipelines.runs import Run
from pipelines.store import write_atomic
from pipelines.training.checkpoints import (
    COMPLETE,
    LAYOUT,
    PROGRESS,
    Layout,
    check_layout,
    checkpoint_folder,
    commit,
    newest_checkpoint,
    problem,
    read_progress,
    step_of,
)
from pipelines.training.environment import hardware_of

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# What may differ between the run that made a checkpoint and the one that goes on from it.
SPREAD = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
FREE = SPREAD | {
    "per_device_eval_batch_size", "gradient_checkpointing", "logging_steps", "eval_steps",
    "save_steps", "save_total_limit", "load_best_model_at_end", "resume_from_checkpoint",
    "early_stopping_patience", "early_stopping_threshold", "max_hours", "max_train_tokens",
    "loss_spike_threshold", "loss_spike_patience", "torch_compile",
}  # fmt: skip
SAME = ("dataset", "tokenizer", "model", "base", "adapter")
RANKS = ("strategy", "num_nodes", "processes_per_node")


def adopt_checkpoint(run: Run) -> None:
    """Link the checkpoint that training.resume_from_checkpoint names, where the run has none.

    Raises TrainingError where it cannot go on exactly, and where an unfinished run differs from
    this one in its hardware only and nothing is said about it.
    """
    named = run.recipe().training.resume_from_checkpoint
    if named is False or newest_checkpoint(run.checkpoints) is not None:
        return
    if named is None:
        _refuse_to_forget(run)
        return
    source = _find(run, named)
    other = Run(source.parents[1])
    differing = _differences(run, other, FREE)
    if differing:
        raise TrainingError(
            f"training.resume_from_checkpoint: {source} is of a run with another "
            f"{', '.join(differing)}; only hardware, batch layout, logging, checkpoints and limits "
            "may differ"
        )
    check_layout(source, _layout(run))
    _link(source, run)


def _find(run: Run, named: str) -> Path:
    """Return the checkpoint folder that a path or a run's name means."""
    for folder in (Path(named).expanduser(), run.path.parent / named):
        if step := newest_checkpoint(folder / "checkpoints"):
            return step.resolve()
        if folder.name.startswith("checkpoint-") and folder.is_dir():
            reason = problem(folder)
            if reason is None:
                return folder.resolve()
            raise TrainingError(f"training.resume_from_checkpoint: {folder}: {reason}")
    raise TrainingError(
        f"training.resume_from_checkpoint: {named!r} is no complete checkpoint, nor a run's folder "
        f"or the name of a run in {run.path.parent} that has one"
    )


def _differences(run: Run, other: Run, free: frozenset[str]) -> list[str]:
    """Return what else than the hardware and `free` keys of training differs, by name."""
    mine, theirs = (r.info().get("key_parts", {}) for r in (run, other))
    found = [name for name in SAME if mine.get(name) != theirs.get(name)]
    ours, old = mine.get("training", {}), theirs.get("training", {})
    keys = sorted((ours.keys() | old.keys()) - free)
    return found + [f"training.{key}" for key in keys if ours.get(key) != old.get(key)]


def _refuse_to_forget(run: Run) -> None:
    """Raise where an unfinished run of the same training on other hardware has a checkpoint."""
    mine = run.info()["key_parts"]
    for path in sorted(run.path.parent.glob("*/run.json")):
        other = Run(path.parent)
        if other.path == run.path or ".replaced-" in other.name or other.trained:
            continue
        parts = other.info().get("key_parts", {})
        there = parts.get("hardware", {})
        moved = any(there.get(key) != mine["hardware"].get(key) for key in RANKS)
        checkpoint = newest_checkpoint(other.checkpoints) if moved else None
        if (
            checkpoint is None
            or parts.get("code") != mine.get("code")
            or _differences(run, other, SPREAD)
        ):
            continue
        check_layout(checkpoint, _layout(run))
        raise TrainingError(
            f"run {other.name} of the same training on other hardware stopped at step "
            f"{step_of(checkpoint)}. To go on from it, set "
            f"training.resume_from_checkpoint={other.name}; to begin anew, set it to false"
        )


def _layout(run: Run) -> Layout:
    return Layout.of(run.recipe().training, hardware_of(run))


def _link(source: Path, run: Run) -> None:
    """Link the files of a checkpoint, take over the metrics up to it, and declare it complete."""
    step = step_of(source)
    folder = checkpoint_folder(run.checkpoints, step)
    shutil.rmtree(folder, ignore_errors=True)
    made = (COMPLETE, PROGRESS, LAYOUT)
    for path in sorted(p for p in source.rglob("*") if p.is_file() and p.name not in made):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system
            shutil.copyfile(path, target)
    lines = [line for line in read_lines(source.parents[1] / METRICS) if line["step"] <= step]
    write_atomic(run.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    progress: dict[str, Any] = read_progress(source)
    # The limits may be others now, and whether they are reached is judged again.
    progress |= {"stopped_by": None, "evaluations_without_gain": 0}
    layout = Layout(**json.loads((source / LAYOUT).read_text(encoding="utf-8")))
    commit(folder, progress, layout)
    logger.info("run %s goes on from %s", run.name, source)
