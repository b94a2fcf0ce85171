"""The runner that makes shards on a Ray cluster: Prefect tasks that get paths and return reports.

Invariant: a task makes the same shards wherever and however often it runs. One whose machine is
lost is repeated by Ray, and what it had finished stays finished; what Ray gives up is left out, so
that the stage asks for it again. A machine with other code or without the shared files is an
error, never another result.
"""

import functools
import logging
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import cloudpickle
from prefect.context import FlowRunContext

from pipelines.engine import (
    Job,
    Params,
    ShardFunction,
    ShardReport,
    Usage,
    find_finished,
    make_shard,
)
from pipelines.errors import PreflightError, StoreError
from pipelines.plan import Stage, chosen_workers, get_stage, software_of
from tasks.cluster import check_api, check_cluster, worker_environment
from tasks.steps import step

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner
    from prefect_ray.task_runners import PrefectRayFuture

logger = logging.getLogger("pipelines.engine")

# Each task run costs about 0.1 s and a row on the server, so small shards share one.
TASKS_PER_WORKER = 4
FEW_TASKS = 64
# Long enough for a network file system to forget that a name was not there.
VISIBLE_SECONDS = 90.0

Made = tuple[ShardReport, Usage]


@dataclass(frozen=True, slots=True)
class Order:
    """The jobs of one task, and the software with which they have to be done."""

    function: ShardFunction
    folder: Path
    jobs: tuple[Job, ...]
    params: Params
    stage: str
    software: tuple[str, dict[str, str]]


def open_cluster(stage: Stage) -> AbstractContextManager["RayCluster | None"]:
    """Return the cluster of STARLOOM_RAY_ADDRESS, or None where this machine does the work."""
    address = check_cluster()
    return nullcontext() if address is None else RayCluster(address, stage, chosen_workers())


class RayCluster:
    """Runs a stage's shard functions on a Ray cluster. It connects when the first is needed."""

    def __init__(self, address: str, stage: Stage, workers: int = 0) -> None:
        """Prepare for one stage; `workers` 0 means one per CPU that the cluster has by now."""
        self.address = address
        self.stage = stage
        self._wanted = workers
        self._runner: RayTaskRunner[Any] | None = None

    def __enter__(self) -> Self:
        """Return the cluster."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cluster; what is running there is ended by Ray."""
        if self._runner is not None:
            self._runner.__exit__(kind, error, trace)
            self._runner = None

    @property
    def workers(self) -> int:
        """How many shards are made at a time, over all machines."""
        if self._wanted:
            return self._wanted
        import ray

        self._connect()
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def make(
        self, function: ShardFunction, folder: Path, jobs: Sequence[Job], params: Params
    ) -> Iterator[tuple[Job, ShardReport, Usage]]:
        """Yield each job with its report and cost as tasks end, those of lost workers left out."""
        import ray

        runner, workers, software = self._connect(), self.workers, software_of(self.stage)
        check_api(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        waiting = deque(
            Order(function, folder, group, params, self.stage.name, software)
            for group in split_jobs(jobs, workers)
        )
        # Futures of Python: ray.wait does not see the signal that cancels a flow run.
        running: dict[Future[Any], tuple[PrefectRayFuture[list[Made]], Order]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    order = waiting.popleft()
                    future = _submit(runner, order)
                    running[future.wrapped_future.future()] = (future, order)
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for done in ended:
                    yield from _collect(done, *running.pop(done))
        finally:
            for future, _ in running.values():
                ray.cancel(future.wrapped_future)

    def _connect(self) -> "RayTaskRunner[Any]":
        """Return the started task runner; PreflightError where Ray refuses us."""
        if self._runner is not None:
            return self._runner
        from prefect_ray import RayTaskRunner

        # Without an address Ray would start a cluster of its own.
        named = {"address": "auto"} if self.address == "auto" else {}
        options = {
            "runtime_env": {"env_vars": worker_environment()},
            "log_to_driver": False,
            **named,
        }
        runner: RayTaskRunner[Any] = RayTaskRunner(address=self.address, init_kwargs=options)
        handler = signal.getsignal(signal.SIGTERM)
        _ship_flow()
        try:
            self._runner = runner.__enter__()
        except (RuntimeError, ConnectionError, ValueError) as error:
            said = " ".join(str(error).split())
            raise PreflightError(
                f"the Ray cluster {self.address} refuses us (its token, Ray and Python have to be "
                f"those of this machine): {said}"
            ) from error
        finally:
            # Ray takes the signal by which Prefect tells us that the flow run was cancelled.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        return self._runner


def _ship_flow() -> None:
    """Let the module of the flow around us travel whole where no other machine can import it.

    Prefect loads a deployment's file by its path, as a module without its package, and sends the
    flow along with each task.
    """
    from ray import cloudpickle as ray_pickle

    context = FlowRunContext.get()
    name = context.flow.fn.__module__ if context and context.flow else ""
    if name in sys.modules and not name.startswith("flows."):
        ray_pickle.register_pickle_by_value(sys.modules[name])


def split_jobs(jobs: Sequence[Job], workers: int) -> list[tuple[Job, ...]]:
    """Return the jobs in groups of about the same size, one for each task run."""
    wanted = max(workers, min(TASKS_PER_WORKER * workers, FEW_TASKS))
    number = min(len(jobs), wanted)
    return [tuple(jobs[n::number]) for n in range(number)]


@step(task_run_name="{name}")
def make_shards(name: str, order: bytes) -> list[Made]:
    """Do a pickled order on the machine this runs on (Prefect would look into every part of it)."""
    # Made by this very flow a moment ago, and brought by the cluster's own authenticated channel.
    return do_order(cloudpickle.loads(order))


def do_order(order: Order) -> list[Made]:
    """Make the shards of an order that are not there yet; return all their reports and costs.

    Raises StoreError where this machine does not see the folder, PreflightError where it would
    compute something else.
    """
    if not order.folder.is_dir():
        raise StoreError(
            f"{_here()} does not see {order.folder}: mount the folder that STARLOOM_DATA names at "
            "the same path on every machine of the cluster"
        )
    _check_software(order.stage, order.software)
    made = []
    for job in order.jobs:
        found = find_finished(order.folder, job)
        if found is not None:
            made.append((found, Usage(0.0, 0)))
        else:
            made.append(make_shard(order.function, order.folder, job, order.params))
    return made


@functools.cache
def _own_software(stage: str) -> tuple[str, dict[str, str]]:
    return software_of(get_stage(stage))


def _check_software(stage: str, expected: tuple[str, dict[str, str]]) -> None:
    code, installed = _own_software(stage)
    if code != expected[0]:
        raise PreflightError(
            f"{_here()} has other code for stage {stage!r} than the flow: check out the same "
            "commit on every machine of the cluster"
        )
    wrong = [f"{name} {installed[name]} (expected {v})" for name, v in expected[1].items()
             if installed[name] != v]  # fmt: skip
    if wrong:
        raise PreflightError(
            f"{_here()} has {', '.join(wrong)}: install with -c constraints.txt on every machine"
        )


def _here() -> str:
    return socket.gethostname()


def _submit(runner: "RayTaskRunner[Any]", order: Order) -> "PrefectRayFuture[list[Made]]":
    from prefect_ray.context import remote_options

    more = f" and {len(order.jobs) - 1} more" if len(order.jobs) > 1 else ""
    name = f"{order.stage} {order.jobs[0].file}{more}"
    parameters = {"name": name, "order": cloudpickle.dumps(order)}
    with remote_options(scheduling_strategy="SPREAD"):
        return runner.submit(make_shards.task, parameters)  # type: ignore[attr-defined]


def _collect(
    done: "Future[Any]", future: "PrefectRayFuture[list[Made]]", order: Order
) -> Iterator[tuple[Job, ShardReport, Usage]]:
    """Yield what an ended task made; nothing where its worker was lost. Raises its error."""
    from ray.exceptions import RayError, RayTaskError

    try:
        done.result()
        future.wait()
        lost = future.state.message if future.state.is_crashed() else None
    except RayTaskError:
        raise
    except RayError as error:
        lost = str(error)
    if lost is not None:
        logger.warning("lost on the cluster: %s", " ".join(lost.split()))
        return
    for job, (report, cost) in zip(order.jobs, future.result(), strict=True):
        _wait_visible(order.folder / report.shard.file, report.shard.bytes)
        yield job, report, cost


def _wait_visible(path: Path, size: int) -> None:
    """Wait until a file made elsewhere is here; StoreError where it does not come."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (path.exists() and path.stat().st_size == size):
        if time.monotonic() > deadline:
            raise StoreError(
                f"{path} was made on the cluster, but is not here: does every machine mount the "
                "same file system for STARLOOM_DATA?"
            )
        time.sleep(0.5)
