"""The evaluator ends with the process that started it, however that ends."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.assets.finished_runs import make_finished_run

STARTER = """
import sys
from pathlib import Path
from pipelines.evals.launch import evaluate
from pipelines.runs import Run
from pipelines.store import Store
evaluate(Run(Path(sys.argv[1])), Store(Path(sys.argv[2])))
"""


def processes_of(run):
    everything = psutil.process_iter(["cmdline"])
    return [p.pid for p in everything if str(run.path) in (p.info["cmdline"] or ())]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_evaluator_outlives_its_starter(tmp_path, number):
    run, store = make_finished_run(tmp_path, steps=1)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(run.path), str(store.root)], stderr=subprocess.DEVNULL
    )
    try:
        # Starter, supervisor and evaluator carry the run's path.
        wait_until(lambda: len(processes_of(run)) == 3, 60)
        starter.send_signal(number)
        starter.wait()
        wait_until(lambda: processes_of(run) == [], 30)
    finally:
        starter.kill()

    assert not (run.path / "scorecard.json").exists()
