"""Fetching and refreshing sources: bring raw input here, compare it, prepare what changed.

An automation on the event could start prepare/default as well, but on SQLite the server's own
RunDeployment action leaves a transaction open when it meets a locked database (Prefect 3.8.8), and
everything waits for a minute. So the flow starts it, and the event is for others to listen to.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from prefect import State
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.states import Completed

from pipelines.errors import PreflightError, RecipeError, did_you_mean
from pipelines.plan import data_root
from pipelines.recipe import Recipe, load_recipe, recipe_names
from pipelines.sources import check_sources
from pipelines.sources.fetch import fetch_missing, fetch_source
from pipelines.sources.raw import Fetched
from pipelines.store import StageRef, write_atomic
from tasks.steps import step

REFRESHED = "starloom.source.refreshed"


@step(task_run_name="fetch")
def fetch(recipe: Recipe) -> State[dict[str, Fetched]]:
    """Fetch the remote sources of a recipe that are not here yet; SourceError where one fails."""
    done = fetch_missing(recipe)
    if not done:
        return Completed(name="Cached", message="every source is here", data=done)
    summary = "; ".join(f"{name}: {fetched.summary}" for name, fetched in done.items())
    return Completed(message=summary, data=done)


@step(task_run_name="fetch {source} for {recipe.name}")
def fetch_changes(source: str, recipe: Recipe) -> State[Fetched | None]:
    """Fetch what changed in a remote source since the last look; None where it is local."""
    [found] = [each for each in recipe.sources if each.id == source]
    fetched = fetch_source(found, refresh=True)
    if fetched is None:
        return Completed(name="Cached", message="read where it is, nothing to fetch", data=None)
    if not fetched.changed:
        return Completed(name="Cached", message=fetched.summary, data=fetched)
    return Completed(message=fetched.summary, data=fetched)


@step(task_run_name="recipes of {source}")
def find_recipes(source: str) -> list[Recipe]:
    """Return the recipes that use a source and can be collected here.

    Raises RecipeError where no recipe names the source, PreflightError where none can be collected.
    """
    recipes = [load_recipe(name) for name in recipe_names()]
    using = [recipe for recipe in recipes if source in {each.id for each in recipe.sources}]
    if not using:
        known = sorted({each.id for recipe in recipes for each in recipe.sources})
        raise RecipeError(
            f"no recipe uses a source {source!r}{did_you_mean(source, known)} "
            f"(sources: {', '.join(known)})"
        )
    problems: dict[str, PreflightError] = {}
    for recipe in using:
        try:
            check_sources(recipe)
        except PreflightError as error:
            problems[recipe.name] = error
    if len(problems) == len(using):
        raise next(iter(problems.values()))
    return [recipe for recipe in using if recipe.name not in problems]


@step(task_run_name="compare {source}")
def find_changes(source: str, collected: Mapping[str, StageRef]) -> list[str]:
    """Return the recipes whose raw data is not what it was at the last look."""
    before = _read_state(source)
    return sorted(name for name, ref in collected.items() if before.get(name) != ref.digest)


@step(task_run_name="start {recipe.name}")
def start_next(source: str, recipe: Recipe, ref: StageRef) -> None:
    """Start prepare/default for a recipe whose source changed, and emit starloom.source.refreshed.

    A recipe with `auto_train` starts its finetune deployment instead, which prepares as well. The
    look is noted last, in data/state/<source>.json: a crash in between starts it again, with the
    same idempotency key, hence the same flow run.
    """
    run_deployment(
        f"finetune/{recipe.name}" if recipe.auto_train else "prepare/default",
        parameters={"recipe": recipe.name},
        timeout=0,
        as_subflow=False,
        idempotency_key=f"{source}:{recipe.name}:{ref.digest}",
    )
    emit_event(
        event=REFRESHED,
        resource={"prefect.resource.id": f"starloom.source.{source}"},
        payload={"recipe": recipe.name, "digest": ref.digest, "rows": ref.rows},
    )
    path = _state_path(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {**_read_state(source), recipe.name: ref.digest}
    write_atomic(path, json.dumps(state, indent=1) + "\n")


def _state_path(source: str) -> Path:
    return data_root() / "state" / f"{source}.json"


def _read_state(source: str) -> dict[str, str]:
    """Return {recipe: digest} of the last look; a missing or cut file is as good as none."""
    try:
        state = json.loads(_state_path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
