"""Preflight: what a recipe needs is there, or one line says what is missing, before any work."""

import os
from contextlib import nullcontext
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client

from pipelines.errors import ServiceError
from pipelines.evals.push import TOKEN, check_push
from pipelines.plan import data_root
from pipelines.preflight.checks import check
from pipelines.preflight.fitting import Asked
from pipelines.recipe import Recipe, load_recipe
from pipelines.training.preference import check_trl
from tasks.cluster import check_cluster
from tasks.credentials import load_token
from tasks.steps import step


@step(task_run_name="preflight")
def check_ready(
    recipe: str,
    data: str | None,
    overrides: dict[str, Any] | None,
    smoke: bool,
    train_pool: str | None = None,
    push: str | None = None,
) -> Recipe:
    """Return the resolved recipe. With `train_pool`, a worker must be online in that pool.

    Without, only the data is prepared, for which no base model is needed, only its tokenizer. With
    `push`, the model could be pushed to that repository of the Hub.

    Raises RecipeError, PreflightError or ServiceError listing what is wrong.
    """
    resolved = load_recipe(recipe, data=data, overrides=overrides, smoke=smoke)
    check_cluster()
    if push:
        check_push(push, {TOKEN: load_token()})
    workers = online_workers(train_pool) if train_pool else []
    if train_pool and not workers:
        raise ServiceError(
            f"no worker is online in pool {train_pool!r}: `starloom up` starts one here; "
            f"elsewhere, `prefect worker start --pool {train_pool}` with PREFECT_API_URL set"
        )
    here = f"@{os.uname().nodename}"
    train_here = bool(workers) and all(name.endswith(here) for name in workers)
    asked = Asked(recipe, data, overrides or {}, smoke)
    check(resolved, data_root(), train_here=train_here, data_only=train_pool is None, asked=asked)
    if train_here and resolved.preference:
        check_trl()
    return resolved


def online_workers(pool: str, client: SyncPrefectClient | None = None) -> list[str]:
    """Return the names of the workers of a pool that sent a heartbeat lately."""
    with nullcontext(client) if client else get_client(sync_client=True) as client:
        if pool not in {each.name for each in client.read_work_pools()}:
            return []
        workers = client.read_workers_for_work_pool(pool)
    return [worker.name for worker in workers if worker.status == "ONLINE"]
