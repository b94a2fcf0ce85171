"""Pushes an accepted model to the Hugging Face Hub, once a person has approved it in the UI."""

from prefect import State, flow
from prefect.states import Completed

from pipelines.plan import data_root
from pipelines.runs import find_run
from tasks import reports
from tasks.push import plan_model, push_model, wait_for_approval
from tasks.steps import explained


@flow(flow_run_name="{run} to {repository}")
@explained
def push(run: str, repository: str, public: bool = False) -> State[str]:
    """Show what would be pushed, wait until the run is resumed, push the model and its card.

    Resume approves, cancel does not. A rejected model is never pushed. The token is HF_TOKEN of the
    worker, or a Secret block.

    Args:
        run: Folder name of the run below data/runs, a unique beginning of it, or "latest"; with
            "/preferred" behind it, the model of its preference stage.
        repository: Where to push it, as OWNER/NAME; it is made where there is none.
        public: Make a new repository visible to everybody.
    """
    found = find_run(data_root() / "runs", run)
    plan = plan_model(found, repository, public=public)
    reports.show_push(plan)
    note = wait_for_approval(plan)
    address = push_model(found, plan, note)
    return Completed(message=f"{found.name} is at {address}", data=address)
