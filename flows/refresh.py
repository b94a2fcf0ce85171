"""Looks for new raw data of a source, on a schedule. It never trains."""

from prefect import State, flow
from prefect.states import Completed

from tasks.sources import find_changes, find_recipes, start_prepare
from tasks.stages import build
from tasks.steps import explained


@flow(flow_run_name="{source}")
@explained
def refresh(source: str) -> State[list[str]]:
    """Collect a source again; where it changed, start prepare/default for the recipes that use it.

    Args:
        source: Id of a source, as recipes name it.
    """
    recipes = find_recipes(source)
    collected = {recipe.name: build("collect", recipe, {}) for recipe in recipes}
    changed = find_changes(source, collected)
    for name in changed:
        start_prepare(source, name, collected[name])
    message = f"changed for {', '.join(changed)}" if changed else "nothing new"
    return Completed(message=f"{source}: {message}", data=changed)
