"""Shard functions that spawned worker processes can import."""

import os
import signal
from pathlib import Path

from pipelines.engine import Outcome
from pipelines.manifest import Counts


def double(inputs, output, params):
    """Write every input line twice."""
    lines = inputs[0].read_text().splitlines()
    output.write_text("".join(f"{line}{line}\n" for line in lines))
    rejects = ({"id": lines[0], "reason": "first", "detail": ""},)
    counts = Counts(len(lines), len(lines) - 1, len(lines) - 1, {"first": 1})
    return Outcome(counts, rejects=rejects)


def die_once(inputs, output, params):
    """Kill the worker process the first time a marked input is seen."""
    marker = Path(params["marker"])
    if inputs[0].name == "in-2" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return double(inputs, output, params)


def die_always(inputs, output, params):
    os.kill(os.getpid(), signal.SIGKILL)
