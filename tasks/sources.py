"""Refreshing a source: build its collect stage, compare with what was there, tell who waits."""

import json
from collections.abc import Mapping

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
def announce_changes(source: str, collected: Mapping[str, StageRef]) -> list[str]:
    """Emit an event for each recipe whose raw data changed; return those recipes.

    `collected` maps recipe names to their collect stage. What was seen last is in
    data/state/<source>.json, written after the events: a crash between them announces twice,
    which costs a look into the store, and never not at all.
    """
    path = data_root() / "state" / f"{source}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {name: ref.digest for name, ref in collected.items()}
    changed = sorted(name for name, digest in now.items() if before.get(name) != digest)
    for name in changed:
        emit_event(
            event=REFRESHED,
            resource={"prefect.resource.id": f"starloom.source.{source}"},
            payload={"recipe": name, "digest": now[name], "rows": collected[name].rows},
        )
    if changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**before, **now}, indent=1) + "\n")
    return changed
