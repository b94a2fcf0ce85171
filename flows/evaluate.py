"""Evaluation by itself: a trained run against its step-0 self on held-out data."""

from prefect import State, flow
from prefect.states import Completed

from pipelines.evals.scorecard import verdict
from pipelines.plan import data_root
from pipelines.runs import find_run
from tasks import reports
from tasks.evaluation import evaluate_model
from tasks.steps import explained


@flow(flow_run_name="{run}")
@explained
def evaluate(run: str) -> State[None]:
    """Reload a trained model in a fresh process, measure it and write the scorecard.

    Args:
        run: Folder name of the run below data/runs, a unique beginning of it, or "latest".
    """
    found = find_run(data_root() / "runs", run)
    scorecard = evaluate_model(found)
    reports.show_scorecard(found)
    return Completed(message=verdict(scorecard).reason)
