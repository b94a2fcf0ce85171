"""The push to the Hub: planned, shown, approved by a person, and only then made."""

from datetime import timedelta
from uuid import UUID

from prefect import State
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from pipelines.errors import StarloomError
from pipelines.evals.push import PushPlan, plan_push, push
from pipelines.evals.scorecard import Verdict
from pipelines.runs import Run
from tasks.children import submit
from tasks.credentials import load_token
from tasks.evaluation import publish_model
from tasks.steps import step

PAUSE = timedelta(days=7)


class Approval(RunInput):
    """What the person who approves may say; to resume the run is to approve."""

    note: str = ""


def release(run: Run, decision: Verdict, *, publish: bool, push: str | None) -> None:
    """Publish an accepted model here and ask to push it, as far as that is wanted."""
    if publish and decision.accepted:
        publish_model(run)
    if push and decision.accepted:
        ask_to_push(run, push)


@step(task_run_name="push")
def ask_to_push(run: Run, repository: str) -> State[None]:
    """Submit push/default, which waits for approval by itself: this run need not wait with it."""
    asked = submit("push/default", run, repository=repository)
    return Completed(message=f"{asked.name!r} shows what would go to {repository}; resume it to")


@step(task_run_name="plan")
def plan_model(run: Run, repository: str, *, public: bool) -> State[PushPlan]:
    """Return what would be pushed; raises StarloomError or PreflightError for what is missing."""
    load_token()
    plan = plan_push(run, repository, private=not public)
    return Completed(message=f"{len(plan.files)} files, {plan.size / 1e6:,.1f} MB", data=plan)


def wait_for_approval(plan: PushPlan) -> str:
    """Suspend the flow run until it is resumed in the UI; return the note that was left there.

    A run of a deployment ends here and starts again, a run without one waits. The key is that of
    the plan: another model needs another approval. Raises StarloomError where the run goes on
    without one, as a cancelled run does that is retried.
    """
    lines = [f"- {name}: {size / 1e6:,.1f} MB" for name, size in plan.files.items()]
    who = "private" if plan.private else "public"
    text = (
        f"Resume pushes run `{plan.run}` to `{plan.repository}` ({who}, license {plan.license}). "
        "Cancel the run to push nothing. The artifact `push-plan` has the card.\n\n"
    )
    form = Approval.with_initial_data(description=text + "\n".join(lines))
    key = f"push-{plan.digest[:16]}"
    try:
        if deployment.id:
            approval = suspend_flow_run(wait_for_input=form, key=key)
        else:
            approval = pause_flow_run(
                wait_for_input=form, key=key, timeout=int(PAUSE.total_seconds()), poll_interval=2
            )
    except FlowPauseTimeout:
        raise StarloomError(f"nobody approved the push to {plan.repository}") from None
    if not _was_resumed(key):
        raise StarloomError(
            f"the push to {plan.repository} was not approved: start it anew, and resume that run"
        )
    return str(approval.note)


def _was_resumed(key: str) -> bool:
    """Return whether this run was resumed from its last pause of that key.

    Prefect lets a run that was cancelled while it waited, and is retried, pass the same pause.
    """
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(UUID(str(flow_run.get_id())))
    states.sort(key=lambda state: state.timestamp)
    pauses = [
        number
        for number, state in enumerate(states)
        if state.is_paused() and state.state_details.pause_key == key
    ]
    behind = states[pauses[-1] + 1 :] if pauses else []
    return bool(behind) and (behind[0].name == "Resuming" or behind[0].is_running())


@step(task_run_name="push")
def push_model(run: Run, plan: PushPlan, note: str) -> State[str]:
    """Push what was approved and return the commit's address."""
    address = push(run, plan, load_token())
    return Completed(message=f"{address}{f' ({note})' if note else ''}", data=address)
