"""A node other than node 0: waits for the run that node 0 starts, and runs its part of it.

It takes part in every attempt that node 0 announces, until node 0 says how the run ended. It needs
the same command, the same code and the same data root (on shared storage) as node 0.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.errors import Interrupted, StarloomError, TrainingError
from pipelines.fingerprint import code_digest
from pipelines.recipe import Recipe
from pipelines.runs import TRAINER, Run
from pipelines.store import Store
from pipelines.training.launch import Attempt, owned, verify
from pipelines.training.launchers import Node
from pipelines.training.nodes import (
    ATTEMPT,
    LOG_SECONDS,
    NODES,
    Beat,
    Pulse,
    rdzv_id,
    recipe_digest,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LEADERLESS_SECONDS = 600.0  # time to start node 0 again after it was lost


def join(recipe: Recipe, node: Node, store: Store, root: Path, *, force: bool = False) -> Run:
    """Train this node's part of the run that node 0 starts for the same recipe; return the run.

    Waits for it as long as it takes (node 0 may prepare data for hours). A run that is finished
    already is returned at once, without `force`. Raises TrainingError where the run failed,
    Interrupted where it was stopped or node 0 is gone for LEADERLESS_SECONDS.
    """
    run, leader = _find_run(root, recipe_digest(recipe), force=force)
    if run.trained and not force:
        return run
    part = f"{NODES}/{node.name}"
    with owned(run, part) as lock:
        pulse = Pulse(run, f"{part}.json", {"status": "here", "number": 0})
        try:
            _check_same_code(run)
            verify(run, store)
        except StarloomError as error:
            _report_failure(pulse, error)
            raise
        _Member(run, store, node, pulse, lock, leader).take_part()
    return run


class _Member:
    """A node's part in the attempts of a run."""

    def __init__(
        self, run: Run, store: Store, node: Node, pulse: Pulse, lock: int, leader: Beat
    ) -> None:
        self._run = run
        self._node = node
        self._pulse = pulse
        self._leader = leader
        self._told = run.read(ATTEMPT) or {}
        under_way = self._told.get("status") == "training"
        self._number = self._told["number"] if under_way else 0  # too late for that one
        self._attempt = Attempt(
            run, store, lock, None, None, POLL_SECONDS, node,
            log_name=f"{NODES}/{node.name}.log", should_end=self._is_over,
        )  # fmt: skip

    def take_part(self) -> None:
        """Answer node 0 until it says how the run ended."""
        gone_since = time.monotonic()
        while True:
            self._listen()
            if self._leader.alive:
                gone_since = time.monotonic()
                self._answer()
                if self._ended():
                    return
            elif time.monotonic() - gone_since > LEADERLESS_SECONDS:
                raise Interrupted(
                    f"run {self._run.name}: node 0 ({self._node.endpoint}) is gone; start the same "
                    "command on every node to resume"
                )
            time.sleep(POLL_SECONDS)

    def _listen(self) -> None:
        self._told = self._run.read(ATTEMPT) or {}
        self._leader.see(self._told)
        self._pulse.keep_up()

    def _answer(self) -> None:
        """Say that this node is ready for a new attempt, or run its part of one that begins."""
        number, status = self._told.get("number", 0), self._told.get("status")
        if status == "waiting" and number > self._number:
            if self._pulse.content["number"] != number:
                self._pulse.update(status="ready", number=number)
        elif status == "training" and number > self._number:
            if self._node.name not in self._told.get("nodes", ()):
                return  # enough others were ready: this one is a spare
            self._number = number
            self._pulse.update(status="training", number=number)
            self._attempt.lost = False
            self._attempt.rdzv_id = rdzv_id(self._run, number)
            logger.info("train      attempt %d with node 0 at %s", number, self._node.endpoint)
            code = self._attempt.run()
            # Node 0 ends the ranks of others once its own are done.
            how = "by node 0" if self._is_over() else f"here with exit code {code}"
            logger.info("train      attempt %d ended %s", number, how)
            self._pulse.update(status="ended", code=code)

    def _is_over(self) -> bool:
        """Return whether node 0 has ended the attempt that runs here, or is gone."""
        self._listen()
        going_on = self._told.get("number") == self._number and self._told["status"] == "training"
        return self._leader.silent or not going_on

    def _ended(self) -> bool:
        status, error = self._told.get("status"), self._told.get("error", "")
        if status == "failed":
            raise TrainingError(f"node 0: {error}")
        if status == "interrupted":
            raise Interrupted(f"node 0: {error}")
        return status == "finished"


def _find_run(root: Path, digest: str, *, force: bool) -> tuple[Run, Beat]:
    """Return the run of a recipe that node 0 announces below `root`, and node 0's beat in it."""
    beats: dict[Path, Beat] = {}
    said = 0.0
    while True:
        for path in root.glob(f"*/{ATTEMPT}"):
            run = Run(path.parent)
            told = run.read(ATTEMPT) or {}
            if told.get("recipe") != digest or ".replaced-" in run.name:
                continue
            beats.setdefault(path, Beat()).see(told)
            if beats[path].alive or (run.trained and not force):
                return run, beats[path]
        if time.monotonic() - said > LOG_SECONDS:
            said = time.monotonic()
            logger.info(
                "waiting for node 0 to start this recipe's run in %s (it prepares the data first; "
                "the folder has to be the same on every node)",
                root,
            )
        time.sleep(POLL_SECONDS)


def _check_same_code(run: Run) -> None:
    if run.info()["key_parts"]["code"] != code_digest(TRAINER):
        raise TrainingError(
            "this node has another version of starloom than node 0; install the same on every node"
        )


def _report_failure(
    pulse: Pulse, error: StarloomError, wait: Callable[[float], None] = time.sleep
) -> None:
    """Let node 0 see this node's problem: it raises it, too."""
    pulse.update(status="failed", error=str(error))
    for _ in range(5):  # node 0 takes a failure from a living node only
        wait(POLL_SECONDS)
        pulse.update()
