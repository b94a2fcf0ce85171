"""Runs the evaluation in a fresh process, which ends with this one, unless its result is there.

A fresh process is the point: it proves that the weights on disk are the model that was trained.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.errors import StarloomError
from pipelines.evals.scorecard import scorecard_parts
from pipelines.fingerprint import ROOT
from pipelines.recipe import load_hardware
from pipelines.runs import EVALUATOR, Run
from pipelines.store import Store, locked
from pipelines.training.environment import child_environment

GRACE_SECONDS = 5
LOG = "evaluate.log"
LOG_LINES = 5
ERROR = "error: "


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
    """Run the evaluator under the supervisor, which stops it when our end of its stdin closes."""
    supervisor = [sys.executable, "-m", "pipelines.training.supervise", str(GRACE_SECONDS), "--"]
    folders = ["--run", str(run.path.resolve()), "--store", str(store_root.resolve())]
    evaluator = [sys.executable, "-m", EVALUATOR, *folders]
    recipe = run.recipe()
    with (run.path / LOG).open("wb") as log:
        process = subprocess.Popen(
            [*supervisor, *evaluator],
            cwd=ROOT,
            env=child_environment(recipe, load_hardware(recipe.hardware)),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
    if code:
        raise StarloomError(_failure(run, code))


def _failure(run: Run, code: int) -> str:
    """Return what went wrong: the evaluator's own error, or the last lines of a crash."""
    text = (run.path / LOG).read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()] or ["no output"]
    if lines[-1].startswith(ERROR):
        return lines[-1].removeprefix(ERROR)
    return (
        f"run {run.name}: the evaluation failed (exit code {code}): "
        f"{' | '.join(lines[-LOG_LINES:])} (all of it: {run.path / LOG})"
    )
