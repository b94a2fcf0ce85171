"""The main job: from raw data to a trained, evaluated and described model."""

from typing import Any

from prefect import State, flow

from flows.prepare import prepare
from pipelines.plan import data_root
from pipelines.runs import open_run
from tasks import reports
from tasks.children import evaluate_elsewhere, finished_steps, train_elsewhere
from tasks.evaluation import describe, outcome, pass_gate
from tasks.prefer import prefer_elsewhere
from tasks.push import release
from tasks.ready import check_ready
from tasks.steps import explained


@flow(flow_run_name="{recipe}")
@explained
def finetune(
    recipe: str = "quickstart",
    data: str | None = None,
    overrides: dict[str, Any] | None = None,
    smoke: bool = False,
    force: bool = False,
    publish: bool = False,
    push: str | None = None,
) -> State[str]:
    """Prepare the data of a recipe, train on pool gpu, evaluate, pass the gate, write the card.

    Whatever is finished already is reused. A model that is not better than step 0 by the recipe's
    margin ends in the state Rejected: it is kept, and nothing is published.

    Args:
        recipe: Name of a shipped recipe (finetune has one deployment for each), or the path of a
            .yaml file.
        data: Local path to read instead of the recipe's source.
        overrides: Dotted recipe keys and their values, e.g. {"training.max_steps": 100}.
        smoke: Shrink everything to a run of about a minute: a tiny random model, few records.
        force: Train again; the finished run is set aside, not deleted.
        publish: Copy the model to data/models when it is accepted.
        push: Ask to push an accepted model to this repository of the Hub (OWNER/NAME): the run
            push/default waits until it is resumed.
    """
    resolved = check_ready(recipe, data, overrides, smoke, train_pool="gpu", push=push)
    refs = prepare(recipe, data, overrides, smoke)
    run = open_run(resolved, refs, data_root() / "runs", force=force)
    reused = finished_steps(run)
    train_elsewhere(run)
    reports.show_loss(run)
    evaluate_elsewhere(run)
    verdict = pass_gate(run)
    reports.show_scorecard(run)
    describe(run)
    reports.show_result(run, refs, reused)
    if resolved.preference:
        prefer_elsewhere(run)
    release(run, verdict, publish=publish, push=push)
    return outcome(run, verdict, reused=bool(reused))
