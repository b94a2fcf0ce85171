"""Training by itself, on the GPU pool: the second half of finetune, or a resume by hand."""

from prefect import State, flow
from prefect.states import Completed

from pipelines.plan import data_root, open_store
from pipelines.preflight.checks import check, check_run
from pipelines.runs import find_run
from tasks import reports
from tasks.steps import explained
from tasks.training import launch_training, reload_model, summary


@flow(flow_run_name="{run}")
@explained
def train(run: str) -> State[None]:
    """Train a run to its last step; it goes on from its newest complete checkpoint.

    Its model is then loaded in a fresh process, where it writes some tokens.

    Args:
        run: Folder name of the run below data/runs, a unique beginning of it, or "latest".
    """
    found = find_run(data_root() / "runs", run)
    if not found.trained:
        check_run(found, open_store())
        check(found.recipe(), data_root(), train_here=True)
    result = launch_training(found)
    reports.show_loss(found)
    reload_model(found)
    return Completed(message=summary(result))
