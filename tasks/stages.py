"""One task run per data stage of the plan; a stage that is in the store already ends Cached."""

from collections.abc import Mapping

from prefect import State
from prefect.runtime import flow_run
from prefect.states import Completed

from pipelines.plan import build_stage, get_stage, open_store
from pipelines.recipe import Recipe
from pipelines.store import StageRef
from tasks.engine import open_cluster
from tasks.steps import step


@step(task_run_name="{name}")
def build(name: str, recipe: Recipe, refs: Mapping[str, StageRef]) -> State[StageRef]:
    """Return the reference of a finished stage, building it where it is not in the store."""
    stage = get_stage(name)
    with open_cluster(stage) as cluster:
        own_id = str(flow_run.get_id() or "")
        store = open_store(recipe.name, flow_run_id=own_id, cluster=cluster)
        ref = build_stage(stage, recipe, refs, store)
    if ref.cached:
        return Completed(
            name="Cached",
            message=f"{ref.rows:,} rows, built in {ref.seconds:.1f} s before",
            data=ref,
        )
    return Completed(message=f"{ref.rows:,} rows, built in {ref.seconds:.1f} s", data=ref)
