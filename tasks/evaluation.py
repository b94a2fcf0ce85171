"""Evaluation in a fresh process, the gate, the model card and the publication."""

from pathlib import Path
from typing import Any

from prefect import State
from prefect.states import Completed

from pipelines.evals.card import write_card
from pipelines.evals.launch import evaluate
from pipelines.evals.publish import publish
from pipelines.evals.scorecard import Verdict, scorecard_parts, verdict
from pipelines.plan import open_store
from pipelines.runs import Run
from tasks.steps import step


def is_evaluated(run: Run) -> bool:
    """Return whether a scorecard is there that belongs to this model and this code."""
    scorecard = run.read("scorecard.json")
    return bool(run.trained and scorecard and scorecard["key_parts"] == scorecard_parts(run))


@step(task_run_name="evaluate")
def evaluate_model(run: Run) -> State[dict[str, Any]]:
    """Return the run's scorecard, evaluating its model where that was not done yet."""
    cached = is_evaluated(run)
    scorecard = evaluate(run, open_store())
    reason = verdict(scorecard).reason
    return Completed(name="Cached" if cached else None, message=reason, data=scorecard)


@step(task_run_name="gate")
def pass_gate(run: Run) -> State[Verdict]:
    """Return the verdict on an evaluated run; the state carries its name."""
    decision = verdict(run.read("scorecard.json") or {})
    name = "Accepted" if decision.accepted else "Rejected"
    return Completed(name=name, message=decision.reason, data=decision)


def outcome(run: Run, decision: Verdict, *, reused: bool) -> State[str]:
    """Return the final state of a flow run that made a model: Rejected where the gate says so."""
    return Completed(
        name=None if decision.accepted else "Rejected",
        message=f"{run.name}{' (finished before, reused)' if reused else ''}: {decision.reason}",
        data=run.name,
    )


@step(task_run_name="card")
def describe(run: Run) -> State[Path]:
    """Write the model card and return its path."""
    path = write_card(run, open_store())
    return Completed(message=str(path), data=path)


@step(task_run_name="publish")
def publish_model(run: Run) -> State[Path]:
    """Copy an accepted model to data/models and return the path."""
    path = publish(run)
    return Completed(message=str(path), data=path)
