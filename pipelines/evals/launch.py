"""Runs the evaluation in a fresh process, which ends with this one, unless its result is there.

A fresh process is the point: it proves that the weights on disk are the model that was trained.
"""

from pathlib import Path
from typing import Any

from pipelines.errors import StarloomError
from pipelines.evals.scorecard import scorecard_parts
from pipelines.recipe import load_hardware
from pipelines.runs import EVALUATOR, Run
from pipelines.store import Store, locked
from pipelines.training.separate import run_separately

LOG = "evaluate.log"


def evaluate(run: Run, store: Store) -> dict[str, Any]:
    """Return the run's scorecard, evaluating its model where there is none that still holds.

    Raises StarloomError where the run is not trained or the evaluation fails; its log is in
    `evaluate.log` of the run.
    """
    if not run.trained:
        raise StarloomError(
            f"run {run.name} is not trained yet: `starloom run {run.info()['recipe']}` resumes it"
        )
    parts = scorecard_parts(run)
    with locked(run.path / ".evaluate.lock"):
        scorecard = run.read("scorecard.json")
        if not scorecard or scorecard["key_parts"] != parts:
            _run_process(run, store.root)
            scorecard = run.read("scorecard.json")
    if not scorecard:
        raise StarloomError(f"run {run.name}: the evaluation left no scorecard: {run.path / LOG}")
    return scorecard


def _run_process(run: Run, store_root: Path) -> None:
    recipe = run.recipe()
    run_separately(
        f"run {run.name}: the evaluation",
        EVALUATOR,
        ["--run", str(run.path.resolve()), "--store", str(store_root.resolve())],
        log=run.path / LOG,
        recipe=recipe,
        hardware=load_hardware(recipe.hardware),
    )
