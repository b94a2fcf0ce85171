"""Starts a run's training under the supervisor, follows it, and starts it again after a crash.

Invariants: one training per run folder at a time (an flock that the supervisor holds too, so that
it lasts until the last rank is gone); whatever ends this process ends the ranks; exit code 0 alone
is no success, only `training.json` with status "finished" is. A crash is retried while each
attempt leaves a newer complete checkpoint; a process killed by a signal before the first one is
retried once, from scratch; an error that training reports itself is raised at once.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil

from pipelines.errors import Interrupted, StoreError, TrainingError
from pipelines.jsonlines import read_new
from pipelines.runs import LOCK, Run
from pipelines.store import Store, write_atomic
from pipelines.training.adopt import adopt_checkpoint
from pipelines.training.checkpoints import newest_checkpoint, step_of
from pipelines.training.environment import (
    DEEPSPEED_ENVIRONMENT,
    child_environment,
    environment_lines,
    hardware_of,
)
from pipelines.training.launchers import (
    NODE,
    Node,
    find_node,
    hostfile_problems,
    in_slurm_job,
    launch_command,
    node_environment,
    target_of,
)
from pipelines.training.nodes import Leader
from pipelines.training.reporters import check_reporters
from pipelines.training.torchrun_log import failing_lines, killed_ranks

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20  # Prefect kills a cancelled flow's process 30 s after its SIGTERM
PROGRESS_SECONDS = 2.0
BARRIER_SECONDS = 10.0
HANDOVER_SECONDS = GRACE_SECONDS + 10  # a dead owner's supervisor is gone by then
LOG, METRICS, OWNER = "train.log", "metrics.jsonl", "owner.json"

OnProgress = Callable[[dict[str, Any]], None]


def launch(
    run: Run,
    store: Store,
    *,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
    poll_seconds: float = 0.5,
) -> dict[str, Any]:
    """Train a run to its end and return its training.json; a finished run returns it at once.

    `on_progress` gets {"step", "max_steps", "loss", "tokens_per_second"} at most every 2 s.
    Raises Interrupted where `should_stop` asked for it or the ranks were told to stop,
    TrainingError where training fails or another process trains this run, StoreError where the
    dataset is damaged.
    """
    hardware = hardware_of(run)
    node = check_launcher(run)
    with owned(run) as lock:
        leader = Leader(run, node, hardware.num_nodes - 1) if node else None
        attempt = Attempt(run, store, lock, on_progress, should_stop, poll_seconds, node, leader)
        try:
            result = _train(run, store, attempt)
        except BaseException as error:
            if leader is not None:
                stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
                leader.end("interrupted" if stopped else "failed", str(error))
            raise
        if leader is not None:
            leader.end("finished")
        return result


def _train(run: Run, store: Store, attempt: "Attempt") -> dict[str, Any]:
    if run.trained:
        return run.read("training.json") or {}
    verify(run, store)
    check_reporters(run)
    adopt_checkpoint(run)
    retried_from_scratch = False
    while True:
        before = _newest_step(run)
        code = attempt.run()
        result = run.read("training.json") or {}
        if run.trained:
            return result
        if result.get("status") == "failed":
            raise TrainingError(f"run {run.name}: {result['error']} (log: {run.path / LOG})")
        if attempt.was_stopped(code, result):
            raise Interrupted(_interrupted(run))
        if _newest_step(run) <= before:
            if retried_from_scratch or before >= 0 or not attempt.was_killed(code):
                raise TrainingError(_failure(run, code, attempt.log()))
            retried_from_scratch = True
        logger.warning(
            "run %s: training crashed (exit code %d); starting again from %s",
            run.name,
            code,
            newest_checkpoint(run.checkpoints) or "scratch",
        )


def check_launcher(run: Run) -> Node | None:
    """Return which node of the run this is, None where it has one; TrainingError where none."""
    hardware = hardware_of(run)
    name = run.recipe().hardware
    if hardware.launcher == "slurm" and not in_slurm_job():
        raise TrainingError(
            f"hardware {name} is for Slurm: `starloom run` (or `--dry-run`) writes the script for "
            "sbatch"
        )
    problems = hostfile_problems(hardware)
    if problems:
        raise TrainingError(f"hardware {name}: " + "; ".join(problems))
    try:
        node = find_node(hardware)
    except TrainingError as error:
        raise TrainingError(f"hardware {name}: {error}") from None
    if node is not None and not node.leader:
        raise TrainingError(
            f"this is node {node.name}, not node 0 of {node.endpoint}: `starloom run` joins the "
            "run that node 0 has started"
        )
    return node


def command(run: Run, store: Store, node: Node | None = None, rdzv_id: str = "") -> list[str]:
    """Return the command that starts this node's ranks of a run."""
    return launch_command(hardware_of(run), target_of(run, store), node, rdzv_id)


@dataclass
class Attempt:
    """One start of torchrun after another, each under a supervisor, on this node.

    On node 0 of several the `leader` gathers the others first and says when one is lost; on the
    others `rdzv_id` and `should_end` come from what it says.
    """

    run_: Run
    store: Store
    lock: int
    on_progress: OnProgress | None
    should_stop: Callable[[], bool] | None
    poll_seconds: float
    node: Node | None = None
    leader: Leader | None = None
    log_name: str = LOG
    rdzv_id: str = ""
    should_end: Callable[[], bool] | None = None
    stopped: bool = False
    lost: bool = False
    log_start: int = 0
    _reported: float = field(default=0.0)
    _ended_at: float = field(default=float("inf"))

    def run(self) -> int:
        """Start, follow and end one attempt; return the exit code."""
        run = self.run_
        self.lost = False
        end_orphans(run, self._here())
        if self.node is None or self.node.leader:
            (run.path / "training.json").unlink(missing_ok=True)
        if self.leader is not None:
            self.leader.gather(self.should_stop)
            self.rdzv_id, self.should_end = self.leader.rdzv_id, self.leader.lost
        self._ended_at = float("inf")
        with (run.path / self.log_name).open("ab") as log:
            self.log_start = log.tell()
            process = self._start(log)
        metrics = run.path / METRICS
        position = metrics.stat().st_size if metrics.exists() else 0
        try:
            while process.poll() is None:
                position = self._report(metrics, position)
                self._watch(process)
                time.sleep(self.poll_seconds)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
        return process.returncode

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End the attempt where someone asks for it, or where another node's part has ended."""
        if not self.stopped and self.should_stop is not None and self.should_stop():
            self.stopped = True
            process.send_signal(signal.SIGTERM)
        if self.should_end is not None and self.should_end() and not self.lost:
            self.lost = True
            process.send_signal(signal.SIGTERM)
        if self.node is not None and (self.run_.path / "training.json").exists():
            # The ranks are done: torchrun waits 5 minutes for the agent of a node that is gone.
            self._ended_at = min(self._ended_at, time.monotonic())
            if time.monotonic() - self._ended_at > BARRIER_SECONDS:
                self._ended_at = float("inf")
                process.send_signal(signal.SIGTERM)

    def _here(self) -> str:
        return self.node.name if self.node else ""

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start the supervisor; it inherits the lock and watches our end of its stdin."""
        run = self.run_
        recipe, hardware = run.recipe(), hardware_of(run)
        if hardware.launcher == "deepspeed":
            write_atomic(run.path / DEEPSPEED_ENVIRONMENT, environment_lines(recipe, hardware))
        supervisor = [
            sys.executable, "-m", "pipelines.training.supervise", str(GRACE_SECONDS), "--"
        ]  # fmt: skip
        return subprocess.Popen(
            [*supervisor, *command(run, self.store, self.node, self.rdzv_id)],
            cwd=run.path,
            env=child_environment(recipe, hardware) | node_environment(self.node),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(self.lock,),
        )

    def _report(self, metrics: Path, position: int) -> int:
        """Pass on the newest training line written since `position`; return the next position."""
        if self.on_progress is None or time.monotonic() - self._reported < PROGRESS_SECONDS:
            return position
        lines, position = read_new(metrics, position)
        lines = [line for line in lines if "loss" in line]
        if lines:
            keys = ("step", "max_steps", "loss", "tokens_per_second")
            self.on_progress({key: lines[-1][key] for key in keys})
            self._reported = time.monotonic()
        return position

    def was_stopped(self, code: int, result: dict[str, Any]) -> bool:
        """Return whether the end was asked for; the loss of a node stops the others, too."""
        if self.stopped:
            return True
        if self.lost or not (code == 0 or result.get("status") == "interrupted"):
            return False
        return self.leader is None or not self.leader.lost_in_attempt()

    def was_killed(self, code: int) -> bool:
        """Return whether a signal ended torchrun or a rank, as an operator or the kernel does."""
        elsewhere = self.leader is not None and self.leader.killed
        return code < 0 or code > 128 or bool(killed_ranks(self.log())) or elsewhere

    def log(self) -> str:
        """Return what this attempt has written to the log."""
        with (self.run_.path / self.log_name).open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")


@contextlib.contextmanager
def owned(run: Run, part: str = "") -> Iterator[int]:
    """Hold the lock of a run (or a node's `part` of it) and note who does; yield its descriptor."""
    owner = run.path / f"{part}{OWNER}"
    with (run.path / f"{part}{LOCK}").open("a") as file:
        deadline = time.monotonic() + HANDOVER_SECONDS
        while not _try_lock(file):
            held = run.read(f"{part}{OWNER}") or {}
            if _alive(held) or time.monotonic() > deadline:
                raise TrainingError(
                    f"run {run.name} is being trained by process {held.get('pid')} on "
                    f"{held.get('host')} since {held.get('started')}; wait for it, or stop it"
                )
            time.sleep(0.5)
        run.write(
            f"{part}{OWNER}",
            {
                "host": os.uname().nodename,
                "pid": os.getpid(),
                "created": psutil.Process().create_time(),
                "boot_id": _boot_id(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        try:
            yield file.fileno()
        finally:
            owner.unlink(missing_ok=True)


def end_orphans(run: Run, node: str = "", grace: float = GRACE_SECONDS) -> None:
    """End the ranks that a killed supervisor left behind: two trainings would write checkpoints.

    Whoever holds the run's lock has no living supervisor beside it, so all that names this run on
    its command line (and this node in its environment: two may share a machine) is such a rank.
    They get SIGTERM, `grace` seconds, then SIGKILL.
    """
    orphans = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"--run={run.path}" in (process.info["cmdline"] or ()) and _node_of(process) == node
    ]
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(process)
        _, orphans = psutil.wait_procs(orphans, timeout=grace)


def _node_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(NODE, "")
    except psutil.Error:
        return None  # gone, or of another user


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(owner: dict[str, Any]) -> bool:
    """Return whether the noted owner can still be at work; its supervisor may outlive it."""
    here = (os.uname().nodename, _boot_id())
    if (owner.get("host"), owner.get("boot_id")) != here:
        return bool(owner)  # another machine: its processes cannot be seen from here
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["created"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError):
        return False


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def verify(run: Run, store: Store) -> None:
    """Raise StoreError where the data of a run is damaged."""
    for name in ("pack", "tokenizer"):
        folder = store.path(run.refs()[name])
        damage = store.damage(folder)
        if damage is not None:
            raise StoreError(f"{folder}: {damage}; run the same command again to rebuild it")


def _newest_step(run: Run) -> int:
    newest = newest_checkpoint(run.checkpoints)
    return step_of(newest) if newest else -1


def _interrupted(run: Run) -> str:
    step = _newest_step(run)
    kept = f"checkpoint of step {step} is kept" if step >= 0 else "there is no checkpoint yet"
    return f"run {run.name}: training was stopped, the {kept}; start it again to resume"


def _failure(run: Run, code: int, log: str) -> str:
    """Return the error text: the first failing rank's last lines, else those of all ranks."""
    if shutil.disk_usage(run.path).free < 2**20:  # not even a log line may have been written
        step = _newest_step(run)
        kept = f"the checkpoint of step {step} is kept" if step >= 0 else "no checkpoint was made"
        return (
            f"run {run.name}: no space left on the disk of {run.path}; {kept}. Free some space and "
            f"run the same command again (log: {run.path / LOG})"
        )
    where = f"log {run.path / LOG}"
    return f"run {run.name}: training failed (exit code {code}), {where}:\n{failing_lines(log)}"
