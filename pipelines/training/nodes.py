"""What the nodes of one run tell each other, through files of the run's folder on shared storage.

Node 0 owns the run (its flock, the attempts, the result) and says in `attempt.json` what the others
are to do; each of them answers in `nodes/NAME.json`. Both files carry a beat that grows while their
writer lives, so that a node that vanished is noticed wherever the collectives hang. A file that is
a leftover of an earlier session is known by a beat that stands still.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import Interrupted, TrainingError
from pipelines.manifest import digest_of
from pipelines.recipe import Recipe
from pipelines.runs import Run
from pipelines.training.launchers import JOIN_SECONDS, Node

logger = logging.getLogger(__name__)

ATTEMPT, NODES = "attempt.json", "nodes"
BEAT_SECONDS = 2.0
SILENT_SECONDS = 120.0  # more than the attribute cache of a network file system
LOG_SECONDS = 60.0
SETTLE_SECONDS = 30.0  # a supervisor's grace, and some


def recipe_digest(recipe: Recipe) -> str:
    """Return what a run's recipe is known by on all nodes before there is any data."""
    return digest_of(recipe.model_dump(mode="json"))


@dataclass
class Beat:
    """Tells whether the writer of a file lives: its beat has changed within SILENT_SECONDS."""

    _last: Any = None
    _changes: int = -1
    _since: float = field(default_factory=time.monotonic)

    def see(self, content: dict[str, Any] | None) -> None:
        """Take what the file holds now."""
        beat = content and (content.get("session"), content.get("beat"))
        if beat and beat != self._last:
            self._last, self._since = beat, time.monotonic()
            self._changes += 1

    @property
    def alive(self) -> bool:
        """Return whether the writer has written again since it was first seen, and lately."""
        return self._changes > 0 and not self.silent

    @property
    def silent(self) -> bool:
        """Return whether nothing new has been written for too long."""
        return time.monotonic() - self._since > SILENT_SECONDS


@dataclass
class Pulse:
    """Writes a file of the run again every BEAT_SECONDS, and at once where its content changes."""

    run: Run
    file: str
    content: dict[str, Any]
    _beat: int = 0
    _written: float = 0.0

    def __post_init__(self) -> None:
        """Begin a session of this file."""
        self.content["session"] = f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}"

    def update(self, **changes: Any) -> None:
        """Change what the file says and write it."""
        self.content |= changes
        self._written = 0.0
        self.keep_up()

    def keep_up(self) -> None:
        """Write the file again where it is time."""
        if time.monotonic() - self._written >= BEAT_SECONDS:
            self._beat += 1
            self._written = time.monotonic()
            self.run.write(self.file, {**self.content, "beat": self._beat})


class Leader:
    """Node 0's side: attempts begin when all nodes are ready, and end when one is lost."""

    def __init__(self, run: Run, node: Node, others: int) -> None:
        """Lead a run on `others` nodes besides this one."""
        self.run = run
        self.node = node
        self.killed = False
        self._others = others
        self._members: dict[str, str] = {}  # name: session
        self._beats: dict[str, Beat] = {}
        (run.path / NODES).mkdir(exist_ok=True)
        number = (run.read(ATTEMPT) or {}).get("number", 0)
        self._pulse = Pulse(
            run,
            ATTEMPT,
            {"recipe": recipe_digest(run.recipe()), "number": number, "status": "waiting"},
        )

    @property
    def rdzv_id(self) -> str:
        """Return the id under which the agents of this attempt meet."""
        return rdzv_id(self.run, self._pulse.content["number"])

    def gather(self, should_stop: Callable[[], bool] | None = None) -> None:
        """Begin an attempt once all nodes are ready for it.

        Raises TrainingError naming what is missing after JOIN_SECONDS, or a node's own problem;
        Interrupted where `should_stop` says so.
        """
        self.killed = False
        number = self._pulse.content["number"] + 1
        self._pulse.update(number=number, status="waiting", nodes=[], endpoint=self.node.endpoint)
        deadline = time.monotonic() + JOIN_SECONDS
        said = 0.0
        while len(ready := self._ready(number)) < self._others:
            if should_stop is not None and should_stop():
                raise Interrupted(f"run {self.run.name}: stopped while waiting for nodes")
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"run {self.run.name}: {len(ready)} of {self._others} other node(s) came in "
                    f"{JOIN_SECONDS} s ({', '.join(ready) or 'none'}); start the same command on "
                    "each, with the same STARLOOM_DATA on shared storage"
                )
            if time.monotonic() - said > LOG_SECONDS:
                said = time.monotonic()
                logger.info("waiting for %d more node(s)", self._others - len(ready))
            self._pulse.keep_up()
            time.sleep(0.2)
        self._members = dict(sorted(ready.items())[: self._others])
        self._pulse.update(status="training", nodes=[*self._members])

    def lost(self) -> bool:
        """Keep the beat; return whether this attempt has lost a node and has to end."""
        self._pulse.keep_up()
        codes = self._codes()
        wrong = [code for code in codes.values() if code]
        self.killed = self.killed or any(code < 0 or code > 128 for code in wrong)
        return bool(wrong)

    def _codes(self) -> dict[str, int]:
        """Return the exit codes of nodes whose part of the attempt is over; -9 if lost."""
        codes = {}
        for name, content in self._answers():
            if name not in self._members:
                continue
            same = content["session"] == self._members[name]
            if same and content["status"] == "ended" and content["number"] == self._number:
                codes[name] = int(content["code"])
            elif not same or self._beats[name].silent:
                codes[name] = -9
        return codes

    def lost_in_attempt(self) -> bool:
        """Return, after an attempt, whether a node was lost in it: one that did not end it well.

        A node that is stopped lets all ranks save and stop together: that looks like an ordered
        stop of the run until that node fails to report.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            if self.lost():
                return True
            if len(self._codes()) == len(self._members):
                return False
            time.sleep(0.2)
        self.killed = True
        return True

    def end(self, status: str, error: str = "") -> None:
        """Tell the others how the run ended: finished, interrupted or failed."""
        self._pulse.update(status=status, error=error)

    @property
    def _number(self) -> int:
        return int(self._pulse.content["number"])

    def _ready(self, number: int) -> dict[str, str]:
        """Return {name: session} of the nodes that are ready for an attempt."""
        ready = {}
        for name, content in self._answers():
            if content.get("status") == "failed" and self._beats[name].alive:
                raise TrainingError(f"run {self.run.name}: node {name}: {content['error']}")
            if content.get("number") == number and content.get("status") == "ready":
                ready[name] = content["session"]
        return ready

    def _answers(self) -> list[tuple[str, dict[str, Any]]]:
        answers = []
        for path in sorted((self.run.path / NODES).glob("*.json")):
            content = self.run.read(f"{NODES}/{path.name}")
            if content is not None:
                self._beats.setdefault(path.stem, Beat()).see(content)
                answers.append((path.stem, content))
        return answers


def rdzv_id(run: Run, number: int) -> str:
    """Return the rendezvous id of an attempt: late agents of an earlier one cannot join it."""
    return f"{run.name}-{number}"
