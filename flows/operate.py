"""The commands that operate the services: `starloom up`, `down` and `status`.

Found by pipelines.cli through the entry point group starloom.commands, so that pipelines stays
free of Prefect. Running `up` twice changes nothing that is up.
"""

import time
from typing import TYPE_CHECKING

import click

from flows.services import (
    POOLS,
    ROOT,
    SERVER,
    Services,
    api_url,
    environment,
    healthy,
    last_line,
    worker_name,
)
from pipelines.errors import ServiceError, StarloomError
from pipelines.plan import data_root
from pipelines.runs import find_run
from pipelines.store import locked

RECIPES = ROOT / "pipelines" / "recipes"

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


@click.command()
@click.option("--no-workers", is_flag=True, help="Start and fill the server only.")
def up(no_workers: bool) -> None:
    """Start server, pools, deployments, workers.

    Run again, it changes nothing that is up and restarts what died.
    """
    folder = data_root() / "state"
    with locked(folder / "services.lock"):
        services = Services.load(folder)
        started = services.start_server()
        click.echo(f"server   {ui_url(services.port)}{' (started)' * started}")
        click.echo(f"deployed {_fill_server(services)}")
        for name in _end_dead_runs(services):
            click.echo(f"ended    {name}, whose process was gone")
        begun = {pool: services.start_worker(pool) for pool in ([] if no_workers else POOLS)}
        for pool, again in begun.items():
            _wait_online(services, pool)
            click.echo(f"worker   {pool}{' (started)' * again}")


def _fill_server(services: Services) -> str:
    """Create pools and deploy where the server lacks something; say what was done."""
    from flows.deployments import (
        bring_up_to_date,
        create_pools,
        digest_flows,
        is_up_to_date,
        read_project,
    )

    project, digest = read_project(), digest_flows()
    total = f"{len(project.deployments)} deployments"
    with connect(services.port) as client:
        create_pools(client)
        if services.deployed == digest and is_up_to_date(client, project):
            return f"{total}, unchanged"
        pruned = bring_up_to_date(client, project, environment(services.port))
    services.deployed = digest
    services.save()
    return f"{total}{''.join(f', removed {name}' for name in pruned)}"


def _end_dead_runs(services: Services) -> list[str]:
    """Free what dead runs hold (slots, the place of a training in flight) before work goes on."""
    from tasks.upkeep import crash_dead_runs

    with connect(services.port) as client:
        return crash_dead_runs(client)


def _wait_online(services: Services, pool: str, seconds: float = 60) -> None:
    """Wait until our worker of a pool has reported to the server; ServiceError where it ends."""
    from tasks.ready import online_workers

    name = f"worker-{pool}"
    with connect(services.port) as client:
        deadline = time.monotonic() + seconds
        while worker_name(pool) not in online_workers(pool, client):
            log = services.folder / f"{name}.log"
            if services.running(name) is None or time.monotonic() > deadline:
                raise ServiceError(f"worker {pool}: {last_line(log)} (all of it in {log})")
            time.sleep(0.3)


@click.command()
def down() -> None:
    """Stop what `up` started, and nothing else."""
    folder = data_root() / "state"
    with locked(folder / "services.lock"):
        stopped = Services.load(folder).stop()
    click.echo(f"stopped  {', '.join(stopped)}" if stopped else "nothing of ours was running")


@click.command()
def status() -> None:
    """Show server, workers and the last flow runs."""
    services = Services.load(data_root() / "state")
    if not healthy(services.port):
        click.echo("server   down (start it with `starloom up`)")
        return
    process = services.running(SERVER)
    click.echo(
        f"server   {ui_url(services.port)} {f'pid {process.pid}' if process else 'not ours'}"
    )
    with connect(services.port) as client:
        _show_workers(client, services)
        _show_runs(client)
    _show_latest_run()
    click.echo(f"ui       {ui_url(services.port)}")


def _show_latest_run() -> None:
    """Name the files of the run that was opened last."""
    try:
        run = find_run(data_root() / "runs", "latest")
    except StarloomError:
        return
    for label, file in (("model", "model"), ("report", "report.md"), ("loss", "loss.png")):
        if (run.path / file).exists():
            click.echo(f"{label:8} {run.path / file}")


def _show_workers(client: "SyncPrefectClient", services: Services) -> None:
    from tasks.ready import online_workers

    for pool, queues in POOLS.items():
        online = online_workers(pool, client)
        process = services.running(f"worker-{pool}")
        here = f"pid {process.pid}" if process else "none started here"
        names = ", ".join(online) or "nobody"
        click.echo(f"worker   {pool} (queues {', '.join(queues)}): {here}; online: {names}")


def _show_runs(client: "SyncPrefectClient") -> None:
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    begun = FlowRunFilter.model_validate({"start_time": {"is_null_": False}})
    runs = client.read_flow_runs(flow_run_filter=begun, sort=FlowRunSort.START_TIME_DESC, limit=8)
    flows = {flow.id: flow.name for flow in client.read_flows(limit=200)}
    for run in runs:
        state = run.state_name or "?"
        seconds = run.total_run_time.total_seconds()
        when = f"{run.start_time:%Y-%m-%d %H:%M}" if run.start_time else ""
        flow = flows.get(run.flow_id, "?")
        click.echo(f"run      {when}  {flow:9} {run.name:24} {state:10} {seconds:6.0f} s")
        if run.state and run.state.message and not run.state.is_running():
            click.echo(f"         {' '.join(run.state.message.split())[:400]}")
    if not runs:
        click.echo("run      none yet: prefect deployment run finetune/quickstart --watch")


@click.command()
@click.argument("name")
@click.option("--from", "origin", required=True, metavar="PATH|REPOSITORY|HUB_ID")
@click.option("--revision", help="Tag, branch or commit of a repository or hub dataset.")
@click.option("--license", "license_", metavar="SPDX", help="License of rows that name none.")
@click.option("--allow-openai-outputs", is_flag=True, help="You may train on OpenAI's output.")
@click.option("--gpu/--cpu", default=None, help="Which model to train; by default what is here.")
def new(
    name: str,
    origin: str,
    revision: str | None,
    license_: str | None,
    allow_openai_outputs: bool,
    gpu: bool | None,
) -> None:
    """Write a recipe and deployment for your data.

    NAME is the recipe's; its data is a local file or folder, a GitHub repository
    (https://github.com/OWNER/NAME) or a hub dataset (OWNER/NAME).
    """
    from flows.deployments import PROJECT_FILE
    from pipelines.preflight.machine import count_gpus
    from pipelines.scaffold import add_deployment, check_name, recipe_text, write_recipe
    from pipelines.sources.origins import find_origin

    check_name(name, RECIPES)
    found = find_origin(
        origin,
        name,
        revision=revision,
        license_=license_,
        allow_openai_outputs=allow_openai_outputs,
    )
    text = recipe_text(name, found.source, found.body, gpu=count_gpus() > 0 if gpu is None else gpu)
    recipe = write_recipe(name, text, RECIPES)
    add_deployment(PROJECT_FILE, recipe)
    click.echo(f"recipe   {RECIPES / name}.yaml ({found.summary})")
    services = Services.load(data_root() / "state")
    if healthy(services.port):
        click.echo(f"deployed {_fill_server(services)}")
    else:
        click.echo("deploy   starloom up")
    click.echo(f"run      prefect deployment run finetune/{name} --watch, or starloom run {name}")


def connect(port: int) -> "SyncPrefectClient":
    """Return a client of the server on this machine, whatever PREFECT_API_URL or profile says."""
    from prefect.client.orchestration import SyncPrefectClient

    return SyncPrefectClient(api=api_url(port), httpx_settings={"trust_env": False})


def ui_url(port: int) -> str:
    """Return the address of the UI."""
    return api_url(port).removesuffix("/api")


commands = [up, down, status, new]
