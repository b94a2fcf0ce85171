"""The data side: all stages of the plan, in order; what is in the store is reused."""

from typing import Any

from prefect import State, flow
from prefect.states import Completed

from pipelines.plan import STAGES, Refs
from tasks import reports
from tasks.ready import check_ready
from tasks.sources import fetch
from tasks.stages import build
from tasks.steps import explained


@flow(flow_run_name="{recipe}")
@explained
def prepare(
    recipe: str = "quickstart",
    data: str | None = None,
    overrides: dict[str, Any] | None = None,
    smoke: bool = False,
) -> State[Refs]:
    """Build the packed dataset of a recipe and show what became of its rows.

    Args:
        recipe: Name of a shipped recipe, or the path of a .yaml file.
        data: Local path to read instead of the recipe's source.
        overrides: Dotted recipe keys and their values, e.g. {"tokenization.block_size": 1024}.
        smoke: Use few records.
    """
    resolved = check_ready(recipe, data, overrides, smoke)
    fetch(resolved)
    refs: Refs = {}
    for stage in STAGES:
        upstream = {name: refs[name] for name in stage.upstream}
        refs[stage.name] = build(stage.name, resolved, upstream)
    reports.show_dataset(resolved, refs)
    reused = sum(ref.cached for ref in refs.values())
    return Completed(
        message=f"{refs['pack'].rows:,} packed rows, {refs['pack'].tokens:,} tokens; "
        f"{reused} of {len(refs)} stages reused",
        data=refs,
    )
