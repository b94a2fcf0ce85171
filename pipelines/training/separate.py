"""Runs a module of the project in a process of its own, which ends with this one.

What it loads is what lies on the disk, and its memory is free again at its end.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import StarloomError
from pipelines.fingerprint import ROOT
from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.training.environment import child_environment

GRACE_SECONDS = 5
LOG_LINES = 5
ERROR = "error: "


def run_separately(
    what: str,
    module: str,
    arguments: Sequence[str],
    *,
    log: Path,
    recipe: Recipe,
    hardware: Hardware,
) -> None:
    """Run `python -m module arguments` to its end, in the environment of training.

    The supervisor ends it when our end of its stdin closes; its output is in `log`. Raises
    StarloomError: with the text of a last line that begins with ERROR, else with the end of the log
    behind `what` ("run x: the evaluation").
    """
    supervisor = [sys.executable, "-m", "pipelines.training.supervise", str(GRACE_SECONDS), "--"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*supervisor, sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=child_environment(recipe, hardware),
            stdin=subprocess.PIPE,
            stdout=file,
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
        raise StarloomError(explain_failure(what, log, code))


def explain_failure(what: str, log: Path, code: int) -> str:
    """Return the process's own error, or the end of its log in one line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()] or ["no output"]
    if lines[-1].startswith(ERROR):
        return lines[-1].removeprefix(ERROR)
    return f"{what} failed (exit code {code}): {' | '.join(lines[-LOG_LINES:])} (all of it: {log})"
