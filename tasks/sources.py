"""Refreshing a source: build its collect stage, compare with what was there, prepare what changed.

An automation on the event could start prepare/default as well, but on SQLite the server's own
RunDeployment action leaves a transaction open when it meets a locked database (Prefect 3.8.8), and
everything waits for a minute. So the flow starts it, and the event is for others to listen to.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from prefect.deployments import run_deployment
from prefect.events import emit_event

from pipelines.errors import PreflightError, RecipeError, did_you_mean
from pipelines.plan import data_root
from pipelines.recipe import Recipe, load_recipe, recipe_names
from pipelines.sources import check_sources
from pipelines.store import StageRef, write_atomic
from tasks.steps import step

REFRESHED = "starloom.source.refreshed"


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


@step(task_run_name="prepare {recipe}")
def start_prepare(source: str, recipe: str, ref: StageRef) -> None:
    """Start prepare/default for a recipe whose source changed, and emit starloom.source.refreshed.

    The look is noted last, in data/state/<source>.json: a crash in between starts it again, with
    the same idempotency key, hence the same flow run.
    """
    run_deployment(
        "prepare/default",
        parameters={"recipe": recipe},
        timeout=0,
        as_subflow=False,
        idempotency_key=f"{source}:{recipe}:{ref.digest}",
    )
    emit_event(
        event=REFRESHED,
        resource={"prefect.resource.id": f"starloom.source.{source}"},
        payload={"recipe": recipe, "digest": ref.digest, "rows": ref.rows},
    )
    path = _state_path(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({**_read_state(source), recipe: ref.digest}, indent=1) + "\n")


def _state_path(source: str) -> Path:
    return data_root() / "state" / f"{source}.json"


def _read_state(source: str) -> dict[str, str]:
    """Return {recipe: digest} of the last look; a missing or cut file is as good as none."""
    try:
        state = json.loads(_state_path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
