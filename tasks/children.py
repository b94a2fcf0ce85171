"""Hands a step of a run to its own deployment and waits for it.

Invariant: a run is never trained or evaluated twice at once. A flow run in flight is joined; a new
one gets the idempotency key "run key, deployment, attempt", so that two who submit at the same
moment get the same one. A step finished on disk is not submitted at all.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import httpx
from prefect import State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelling, Completed

from pipelines.errors import StarloomError, TrainingError
from pipelines.runs import Run
from tasks.evaluation import is_evaluated
from tasks.steps import Stopped, step
from tasks.training import summary

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

logger = logging.getLogger("pipelines.flows")

POLL_SECONDS = 2.0
LATE_SECONDS = 60.0
# Training resumes from its checkpoint, so a crash costs little; three in a row are no accident.
RESUBMISSIONS = 2


@step(task_run_name="train")
def train_elsewhere(run: Run) -> State[None]:
    """Have train/default train the run, unless it is trained."""
    if run.trained:
        done = summary(run.read("training.json") or {})
        return Completed(name="Cached", message=f"trained before, {done}")
    hand_over("train/default", run, lambda: run.trained)
    return Completed(message=summary(run.read("training.json") or {}))


@step(task_run_name="evaluate")
def evaluate_elsewhere(run: Run) -> State[None]:
    """Have evaluate/default evaluate the run, unless it is evaluated."""
    if is_evaluated(run):
        return Completed(name="Cached", message="evaluated before")
    hand_over("evaluate/default", run, lambda: run.read("scorecard.json") is not None)
    return Completed(message="evaluated")


def finished_steps(run: Run) -> set[str]:
    """Return which of train and evaluate need not be done for a run."""
    done = {"train": run.trained, "evaluate": is_evaluated(run)}
    return {step for step, is_done in done.items() if is_done}


def hand_over(deployment: str, run: Run, is_done: Callable[[], bool]) -> None:
    """Submit or join the flow run of a deployment for this run, and wait until it is done.

    A crashed one is submitted again, RESUBMISSIONS times. Raises Stopped where it was cancelled,
    or where we were; TrainingError with its message where it failed.
    """
    for attempt in range(RESUBMISSIONS + 1):
        child = submit(deployment, run)
        state = wait_for(child)
        if state.is_cancelled():
            raise Stopped(f"{deployment} of run {run.name} was cancelled; run it again to resume")
        if state.is_completed():
            if is_done():
                return
            raise TrainingError(
                f"{deployment} of run {run.name} ended {state.name}, but its result is not in "
                f"{run.path}: do both machines see the same STARLOOM_DATA?"
            )
        if not state.is_crashed():
            raise StarloomError(f"{deployment} of run {run.name}: {state.message}")
        logger.warning("%s crashed (%d): %s", deployment, attempt + 1, state.message)
    raise TrainingError(
        f"{deployment} of run {run.name} crashed {RESUBMISSIONS + 1} times, last: {state.message}"
    )


def submit(deployment: str, run: Run, repository: str | None = None) -> FlowRun:
    """Return the flow run in flight for this run, or a new one under the next idempotency key.

    One with a `repository` is no child of ours: children cannot be suspended.
    """
    parameters = {"run": run.name, **({"repository": repository} if repository else {})}
    prefix = f"{run.info()['key'][:16]}:{':'.join([deployment, *list(parameters.values())[1:]])}:"
    with get_client(sync_client=True) as client:
        before = _runs_of(client, client.read_deployment_by_name(deployment), parameters)
    for child in before:
        if not (child.state and child.state.is_final()):
            logger.info("%s is in flight already: joining %r", deployment, child.name)
            return child
    attempt = sum((child.idempotency_key or "").startswith(prefix) for child in before) + 1
    while True:
        submitted = run_deployment(
            deployment,
            parameters=parameters,
            timeout=0,
            idempotency_key=f"{prefix}{attempt}",
            flow_run_name=" to ".join(parameters.values()),
            as_subflow=repository is None,
        )
        child = cast(FlowRun, submitted)
        if not (child.state and child.state.is_final()):
            return child
        attempt += 1


def _runs_of(
    client: SyncPrefectClient, deployment: "DeploymentResponse", parameters: Mapping[str, str]
) -> list[FlowRun]:
    """Return the latest flow runs of a deployment that have these parameters, newest first."""
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment.id]}}),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=200,
    )
    return [child for child in found if parameters.items() <= child.parameters.items()]


def wait_for(child: FlowRun) -> State[Any]:
    """Wait for the end of a flow run and return its state. If we are cancelled, so is it.

    Prefect cancels children by itself too, but only after the parent is gone.
    """
    own_id = flow_run.get_id()
    try:
        return _poll(child, own_id)
    except BaseException:
        if _is_cancelled(own_id):
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(child.id, Cancelling(message="Its parent was cancelled"))
        raise


def _poll(child: FlowRun, own_id: str | None) -> State[Any]:
    begun, warned = time.monotonic(), False
    while True:
        state = _state(child.id)
        if state is not None and state.is_final():
            return state
        if _is_cancelled(own_id):
            raise Stopped(f"cancelled while {child.name!r} was running")
        waiting = state is not None and (state.is_scheduled() or state.is_pending())
        if waiting and not warned and time.monotonic() - begun > LATE_SECONDS:
            warned = True
            logger.warning("%r still waits for a worker: see `starloom status`", child.name)
        time.sleep(POLL_SECONDS)


def _is_cancelled(flow_run_id: str | None) -> bool:
    state = _state(flow_run_id) if flow_run_id else None
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def _state(flow_run_id: UUID | str) -> State[Any] | None:
    """Return the state of a flow run; None where the server does not answer (it may come back)."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(UUID(str(flow_run_id))).state
    except httpx.HTTPError as error:
        logger.warning("state of %s not read: %s", flow_run_id, type(error).__name__)
        return None
