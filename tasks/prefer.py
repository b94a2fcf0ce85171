"""The preference step: one call of the stage, which runs in a process of its own."""

from typing import Any

from prefect import State
from prefect.states import Completed

from pipelines.plan import open_store
from pipelines.prefer import prefer, preference_settings, preferred_result, summary
from pipelines.runs import Run
from tasks.children import hand_over
from tasks.steps import step


@step(task_run_name="prefer")
def prefer_answers(run: Run, overrides: dict[str, Any] | None = None) -> State[dict[str, Any]]:
    """Return preferred.json of a run, making its preferred model where there is none yet."""
    settings = preference_settings(run.recipe(), overrides)
    cached = preferred_result(run, settings) is not None
    result = prefer(run, open_store(), settings)
    return Completed(name="Cached" if cached else None, message=summary(result), data=result)


@step(task_run_name="prefer")
def prefer_elsewhere(run: Run) -> State[None]:
    """Have prefer/default run the stage as the recipe says, unless its result is there."""
    settings = preference_settings(run.recipe())
    result = preferred_result(run, settings)
    if result is not None:
        return Completed(name="Cached", message=f"preferred before, {summary(result)}")
    hand_over("prefer/default", run, lambda: preferred_result(run, settings) is not None)
    return Completed(message=summary(preferred_result(run, settings) or {}))
