"""What the server must know: pools, queues, the deployments of prefect.yaml, automations.

Invariant: after `bring_up_to_date` the server holds exactly the deployments and schedules of the
file. Prefect itself ignores misspelled keys, and never removes a schedule or a deployment.
"""

import hashlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.services import POOLS, ROOT, prefect_command
from pipelines.errors import ServiceError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import AutomationCore

PROJECT_FILE = ROOT / "prefect.yaml"
ZOMBIES = "starloom: runs without a heartbeat are Crashed"
# Five heartbeats (prefect.toml); fewer have called healthy trainings dead.
ZOMBIE_SECONDS = 300


class Strict(BaseModel):
    """Base of the file's parts: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class WorkPool(Strict):
    """Where a deployment runs."""

    name: Literal["cpu", "gpu"]
    work_queue_name: Literal["data", "train", "eval"]
    job_variables: dict[Literal["stream_output"], Literal[False]]


class Schedule(Strict):
    """When it starts by itself."""

    cron: str
    timezone: str
    slug: str


class ConcurrencyLimit(Strict):
    """How many runs at once, and what becomes of the next one."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"]


class Deployment(Strict):
    """One entry of the file."""

    name: str
    flow_name: str
    entrypoint: str = Field(pattern=r"^flows/[a-z]+\.py:[a-z]+$")
    description: str = Field(min_length=1)
    tags: list[str] = Field(min_length=1)
    parameters: dict[str, Any] = {}
    concurrency_limit: ConcurrencyLimit | None = None
    schedules: list[Schedule] = []
    work_pool: WorkPool

    @property
    def full_name(self) -> str:
        """Return `flow/deployment`, as commands name it."""
        return f"{self.flow_name}/{self.name}"


class Project(Strict):
    """The whole file."""

    name: Literal["starloom"]
    pull: None
    definitions: dict[str, Any]
    deployments: list[Deployment]


def read_project(path: Path = PROJECT_FILE) -> Project:
    """Read prefect.yaml strictly; ServiceError with every problem on one line."""
    try:
        project = Project.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ServiceError(f"{path}: {error}".replace("\n", " ")) from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise ServiceError(f"{path}: {problems}") from error
    for deployment in project.deployments:
        pool = deployment.work_pool
        if pool.work_queue_name not in POOLS[pool.name]:
            raise ServiceError(
                f"{path}: {deployment.full_name}: pool {pool.name!r} has no queue "
                f"{pool.work_queue_name!r}, only {POOLS[pool.name]}"
            )
    return project


def digest_flows() -> str:
    """Return the digest of what a deployment is made of: prefect.yaml and the flows' signatures."""
    files = [PROJECT_FILE, *sorted((ROOT / "flows").glob("*.py"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def create_pools(client: "SyncPrefectClient") -> None:
    """Create the work pools and queues that are missing."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    present = {pool.name for pool in client.read_work_pools()}
    for name, queues in POOLS.items():
        if name not in present:
            client.create_work_pool(
                WorkPoolCreate(name=name, type="process", base_job_template=template)
            )
        known = {queue.name for queue in client.read_work_queues(work_pool_name=name)}
        for priority, queue in enumerate(queues, start=1):
            if queue not in known:
                client.create_work_queue(name=queue, work_pool_name=name, priority=priority)


def is_up_to_date(client: "SyncPrefectClient", project: Project) -> bool:
    """Return whether the server holds every deployment of the file and none that is not in it."""
    return {name for name, _ in _own_deployments(client)} == {
        deployment.full_name for deployment in project.deployments
    }


def bring_up_to_date(
    client: "SyncPrefectClient", project: Project, env: Mapping[str, str]
) -> list[str]:
    """Deploy all, prune what the file no longer names; return the names of what was pruned."""
    prefect_command(["--no-prompt", "deploy", "--all"], env)
    wanted = {deployment.full_name: deployment for deployment in project.deployments}
    pruned = []
    for name, deployment in _own_deployments(client):
        if name not in wanted:
            client.delete_deployment(deployment.id)
            pruned.append(name)
            continue
        slugs = {schedule.slug for schedule in wanted[name].schedules}
        for schedule in client.read_deployment_schedules(deployment.id):
            if schedule.slug not in slugs:
                client.delete_deployment_schedule(deployment.id, schedule.id)
                pruned.append(f"{name} schedule {schedule.slug or schedule.id}")
    upsert_automation(client, zombie_automation())
    return pruned


def _own_deployments(client: "SyncPrefectClient") -> list[tuple[str, "DeploymentResponse"]]:
    """Return (flow/name, deployment) of those made from this checkout; others are not ours."""
    flows = {flow.id: flow.name for flow in client.read_flows(limit=200)}
    here = str(ROOT)
    return [
        (f"{flows.get(deployment.flow_id)}/{deployment.name}", deployment)
        for deployment in client.read_deployments(limit=200)
        if here in str(deployment.pull_steps) and (deployment.entrypoint or "").startswith("flows/")
    ]


def upsert_automation(client: "SyncPrefectClient", wanted: "AutomationCore") -> None:
    """Create an automation, or update the one of that name; duplicates go."""
    present = client.read_automations_by_name(wanted.name)
    if present:
        client.update_automation(present[0].id, wanted)
    else:
        client.create_automation(wanted)
    for duplicate in present[1:]:
        client.delete_automation(duplicate.id)


def zombie_automation() -> "AutomationCore":
    """Return the automation that crashes a run whose process is gone: no heartbeat, no end."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    heartbeat = "prefect.flow-run.heartbeat"
    ends = (
        "Completed",
        "Rejected",
        "Failed",
        "Cancelled",
        "Cancelling",
        "Crashed",
        "Suspended",
        "Paused",
    )
    return AutomationCore(
        name=ZOMBIES,
        description=f"A flow run that sent a heartbeat and then nothing for {ZOMBIE_SECONDS} s",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ends)},
            threshold=1,
            within=timedelta(seconds=ZOMBIE_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=f"No heartbeat for {ZOMBIE_SECONDS} s: its process is gone. Run it again; "
                "finished work is reused.",
            )
        ],
    )
