"""The training step: one call of the supervisor, its progress shown, a cancellation passed on."""

import logging
import time
from typing import Any

from prefect import State
from prefect.states import Completed

from pipelines.errors import Interrupted
from pipelines.jsonlines import read_lines
from pipelines.plan import open_store
from pipelines.runs import Run
from pipelines.training.launch import METRICS, launch
from pipelines.training.plots import show_live
from pipelines.training.reload import check_saved, reload_summary
from tasks.monitor import Monitor, Picture
from tasks.steps import Stopped, step

logger = logging.getLogger("pipelines.training")

LOG_SECONDS = 30.0


@step(task_run_name="launch")
def launch_training(run: Run) -> State[dict[str, Any]]:
    """Train a run to its last step and return its training.json.

    The signal that ends this process (Prefect's TerminationSignal) passes through `launch`, which
    lets the ranks save a checkpoint and ends them first. Raises Stopped where the flow run was
    cancelled, Interrupted where training ended early and can go on, TrainingError otherwise.
    """
    if run.trained:
        before = run.read("training.json") or {}
        return Completed(name="Cached", message=f"trained before, {summary(before)}", data=before)
    logged = time.monotonic()

    def on_progress(state: dict[str, Any]) -> None:
        nonlocal logged
        text = "  ".join(f"{key} {_short(value)}" for key, value in state.items())
        monitor.show(100 * state["step"] / max(1, state["max_steps"]), text)
        if time.monotonic() - logged >= LOG_SECONDS:
            logged = time.monotonic()
            logger.info("%s", text)

    with Monitor("train-progress", loss_picture(run)) as monitor:
        try:
            result = launch(run, open_store(), on_progress=on_progress, should_stop=monitor.stopped)
        except Interrupted as error:
            if monitor.stopped():
                raise Stopped(
                    f"run {run.name}: cancelled, a checkpoint is kept ({error})"
                ) from error
            raise
        monitor.show(100.0, summary(result))
    return Completed(message=summary(result), data=result)


@step(task_run_name="reload")
def reload_model(run: Run) -> State[None]:
    """Load a trained model in a fresh process and let it write; TrainingError where it cannot."""
    return Completed(message=reload_summary(check_saved(run)))


def loss_picture(run: Run) -> Picture:
    """Return the live loss curve of a run, drawn anew when metrics.jsonl has grown."""
    drawn = 0

    def draw() -> tuple[str, str] | None:
        nonlocal drawn
        metrics = read_lines(run.path / METRICS)
        if len(metrics) == drawn:
            return None
        drawn = len(metrics)
        return show_live(metrics, run.name)

    return Picture("loss-curve", draw)


def summary(result: dict[str, Any]) -> str:
    """Return a training result in a few words."""
    return (
        f"{result['global_step']} steps in {result['seconds']:.0f} s, "
        f"training loss {result['train_loss']:.3f}"
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
