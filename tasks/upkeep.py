"""Nightly upkeep: verify what is stored, remove what is abandoned, end runs that are dead."""

import os

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed

from pipelines.plan import open_store
from tasks.steps import step

# A killed build resumes from its finished shards: give its owner a week to come back.
ABANDONED_SECONDS = 7 * 24 * 3600


@step(task_run_name="verify store")
def verify_store() -> dict[str, str]:
    """Hash every stored stage again; return {folder: problem}. The next run builds them again."""
    return open_store().verify()


@step(task_run_name="remove abandoned builds")
def remove_abandoned() -> dict[str, int]:
    """Remove builds and damaged stages that nobody touched for a week; return the bytes freed.

    Finished stages stay: which of them is no longer wanted is for the user to say.
    """
    store = open_store()
    finished = {str(f.relative_to(store.root)) for f in store.root.glob("*/[!.]*/")}
    return store.collect_garbage(keep=finished, older_than=ABANDONED_SECONDS)


@step(task_run_name="end dead runs")
def end_dead_runs() -> list[str]:
    """Set runs to Crashed whose process is gone; return their names."""
    with get_client(sync_client=True) as client:
        return crash_dead_runs(client)


def crash_dead_runs(client: SyncPrefectClient) -> list[str]:
    """Set the runs to Crashed that are Running on the server, but on no process of this machine.

    The automation of `starloom up` does so by missing heartbeats; this is for what died while the
    server was down, and at once. Does nothing where workers of other machines are known.
    """
    here = f"@{os.uname().nodename}"
    workers = [
        worker.name
        for pool in client.read_work_pools()
        for worker in client.read_workers_for_work_pool(pool.name)
    ]
    if not all(name.endswith(here) for name in workers):
        return []
    alive = {found for process in psutil.process_iter() if (found := _flow_run_of(process))}
    running = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate(
            {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}}
        )
    )
    owners = [(run, _process_owner(client, run)) for run in running]
    dead = [run for run, owner in owners if owner and str(owner.id) not in alive]
    for run in dead:
        state = Crashed(message="Its process is gone; run it again, finished work is reused")
        client.set_flow_run_state(run.id, state, force=True)
    return [run.name for run in dead]


def _flow_run_of(process: psutil.Process) -> str:
    try:
        return process.environ().get("PREFECT__FLOW_RUN_ID", "")
    except (psutil.Error, OSError):
        return ""


def _process_owner(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """Return the flow run that a worker started a process for: this one or its parent, or None."""
    if not run.infrastructure_pid and run.parent_task_run_id and not run.deployment_id:
        parent = client.read_task_run(run.parent_task_run_id).flow_run_id
        run = client.read_flow_run(parent) if parent else run
    return run if run.infrastructure_pid else None
