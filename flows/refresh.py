"""Looks for new raw data of a source, on a schedule. It trains only where a recipe asks for it."""

from prefect import State, flow
from prefect.states import Completed

from tasks.sources import fetch_changes, find_changes, find_recipes, start_next
from tasks.stages import build
from tasks.steps import explained


@flow(flow_run_name="{source}")
@explained
def refresh(source: str) -> State[list[str]]:
    """Fetch and collect a source again; where it changed, prepare the recipes that use it.

    Args:
        source: Id of a source, as recipes name it.
    """
    recipes = {recipe.name: recipe for recipe in find_recipes(source)}
    collected = {}
    for name, recipe in recipes.items():
        fetch_changes(source, recipe)
        collected[name] = build("collect", recipe, {})
    changed = find_changes(source, collected)
    for name in changed:
        start_next(source, recipes[name], collected[name])
    message = f"changed for {', '.join(changed)}" if changed else "nothing new"
    return Completed(message=f"{source}: {message}", data=changed)
