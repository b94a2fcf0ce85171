"""Shard functions that spawned worker processes can import."""

import os
import signal
import time
from pathlib import Path

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.store import StageSpec, Store


def double(inputs, output, params):
    """Write every input line twice."""
    lines = inputs[0].read_text().splitlines()
    output.write_text("".join(f"{line}{line}\n" for line in lines))
    rejects = ({"id": lines[0], "reason": "first", "detail": ""},)
    counts = Counts(len(lines), len(lines) - 1, len(lines) - 1, {"first": 1})
    return Outcome(counts, rejects=rejects)


def tell_process(inputs, output, params):
    """Write the number of the process that makes the shard."""
    output.write_text(str(os.getpid()))
    return Outcome(Counts())


def die_once(inputs, output, params):
    """Kill the worker process the first time a marked input is seen."""
    marker = Path(params["marker"])
    if inputs[0].name == "in-2" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return double(inputs, output, params)


def die_always(inputs, output, params):
    os.kill(os.getpid(), signal.SIGKILL)


def build_slowly(root, ready):
    """Build a stage of one shard that takes a moment, and note each time it is made."""

    def build(work):
        def write(inputs, output, params):
            ready.set()
            time.sleep(0.3)
            with (root / "calls").open("a") as file:
                file.write("x")
            output.write_text("hello\n" * 9)
            return Outcome(Counts(rows_in=9, rows_out=9, used=9))

        return Built((work.one(write, Job("rows.txt", ()), {}),))

    Store(root).build(StageSpec("stage", {"word": "hello", "rows": 3}, "c0de"), build)
