"""The preference stage of a trained run, on the GPU pool: the better of two answers wins."""

from typing import Any

from prefect import State, flow
from prefect.states import Completed

from pipelines.plan import data_root
from pipelines.prefer import summary
from pipelines.runs import find_run
from tasks import reports
from tasks.prefer import prefer_answers
from tasks.steps import explained


@flow(flow_run_name="{run}")
@explained
def prefer(run: str, overrides: dict[str, Any] | None = None) -> State[None]:
    """Train a finished run on pairs of its own records; RUN/preferred names the result.

    Args:
        run: Folder name of the run below data/runs, a unique beginning of it, or "latest".
        overrides: Keys of the recipe's section `preference` and values, e.g. {"beta": 0.2}.
    """
    found = find_run(data_root() / "runs", run)
    result = prefer_answers(found, overrides)
    reports.show_preference(found, result)
    return Completed(message=summary(result))
