"""Nightly upkeep: verify what is stored, remove what is abandoned, end runs that are dead."""

from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import (
    EventFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventResourceFilter,
)
from prefect.runtime import flow_run
from prefect.states import Crashed

from pipelines.plan import open_store
from tasks.steps import step

# A killed build resumes from its finished shards: give its owner a week to come back.
ABANDONED_SECONDS = 7 * 24 * 3600
SILENT = timedelta(minutes=10)


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


@step(task_run_name="crash zombies")
def crash_zombies() -> list[str]:
    """Set runs to Crashed that began but sent no heartbeat lately; return their names.

    The automation of `starloom up` does so within minutes; this catches what died while the server
    was down, when no event could be missed.
    """
    now = datetime.now(UTC)
    own = str(flow_run.get_id())
    with get_client(sync_client=True) as client:
        running = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(
                {
                    "state": {"type": {"any_": ["RUNNING", "CANCELLING"]}},
                    "start_time": {"before_": now - SILENT},
                }
            )
        )
        dead = [run for run in running if str(run.id) != own and _is_silent(client, run, now)]
        for run in dead:
            message = f"No heartbeat for {SILENT}: its process is gone"
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return [run.name for run in dead]


def _is_silent(client: SyncPrefectClient, run: FlowRun, now: datetime) -> bool:
    heartbeats = client.read_events(
        EventFilter(
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            occurred=EventOccurredFilter(since=now - SILENT, until=now),
        ),
        limit=1,
    )
    return not heartbeats.events
