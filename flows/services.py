"""The processes of `starloom up`: one server and a worker per pool, started, found again, stopped.

Invariant: a process is ours only while its pid and its start time are those in
data/state/services.json, or while it carries their token in its environment (flow runs and what
they start). Nothing else is ever signaled.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

from pipelines.errors import ServiceError
from pipelines.store import write_atomic

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = 4200
TOKEN = "STARLOOM_SERVICES"  # noqa: S105 - the name of a variable that marks our processes
SERVER = "server"
POOLS = {"cpu": ("data",), "gpu": ("train", "eval")}
# The rank supervisor takes up to 20 s to let the ranks write a checkpoint.
FLOW_GRACE = 30.0
SERVICE_GRACE = 15.0


@dataclass(frozen=True, slots=True)
class Service:
    """A process that we started."""

    name: str
    pid: int
    created: float

    @property
    def process(self) -> psutil.Process | None:
        """Return the running process, or None where it ended (or its pid belongs to another)."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.created) < 0.01
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


@dataclass(slots=True)
class Services:
    """What services.json records: the port, the token and the processes by name."""

    folder: Path
    port: int
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    deployed: str = ""
    services: dict[str, Service] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Services":
        """Read the record; a missing or damaged one means that nothing was started."""
        try:
            data = json.loads((folder / "services.json").read_text(encoding="utf-8"))
            services = {each["name"]: Service(**each) for each in data.pop("services")}
            return cls(folder, **data, services=services)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(folder, chosen_port())

    def save(self) -> None:
        """Write the record, whole or not at all."""
        data = asdict(self) | {"services": [asdict(each) for each in self.services.values()]}
        del data["folder"]
        write_atomic(self.folder / "services.json", json.dumps(data, indent=1) + "\n")

    def running(self, name: str) -> psutil.Process | None:
        """Return the process of a service while it runs."""
        service = self.services.get(name)
        return service.process if service else None

    def start(self, name: str, *arguments: str) -> Service:
        """Start `prefect ARGUMENTS` detached, its output in <folder>/<name>.log, and record it."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=ROOT,
                env=environment(self.port) | {TOKEN: self.token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        created = psutil.Process(process.pid).create_time()
        self.services[name] = Service(name, process.pid, created)
        self.save()
        return self.services[name]

    def start_server(self) -> bool:
        """Start the server where it does not run, wait until it answers; True if it was started.

        Raises ServiceError where the port is taken by another process or the server ends early.
        """
        wanted = chosen_port()
        if self.running(SERVER):
            if wanted != self.port:
                raise ServiceError(
                    f"the server of this checkout runs on port {self.port}, not {wanted}: "
                    f"`starloom down` first, or set STARLOOM_PORT={self.port}"
                )
            wait_healthy(self, self.port)
            return False
        self.port = wanted
        check_port_free(self.port)
        self.start(SERVER, "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_healthy(self, self.port)
        return True

    def start_worker(self, pool: str) -> bool:
        """Start the worker of a pool where none of ours runs; return whether it was started."""
        if self.running(f"worker-{pool}"):
            return False
        queues = [part for queue in POOLS[pool] for part in ("--work-queue", queue)]
        # A GPU holds one training; evaluation takes its turn.
        limit = ["--limit", "1"] if pool == "gpu" else []
        name = ["--name", worker_name(pool)]
        arguments = ["--pool", pool, *queues, *limit, *name, "--type", "process"]
        self.start(f"worker-{pool}", "worker", "start", *arguments, "--install-policy", "never")
        return True

    def stop(self) -> list[str]:
        """Stop all of ours: flow runs first, then workers, then the server.

        A flow run that is told to end saves what it can and reports itself Crashed; a worker that
        is told to end kills its flow runs at once, and they would stay Running on the server.
        """
        stopped = [name for name in self.services if self.running(name)]
        server = self.running(SERVER)
        workers = [p for name in self.services if name != SERVER and (p := self.running(name))]
        recorded = {process.pid for process in (server, *workers) if process}
        flows = [p for p in marked(self.token) if p.pid not in recorded and p.pid != os.getpid()]
        family = _with_children([*workers, *flows])
        engines = [process for process in flows if _is_engine(process)]
        terminate(engines, FLOW_GRACE if engines else 0.0, also_wait_for=flows)
        terminate(workers, SERVICE_GRACE)
        terminate(family, 0.0)
        if server:
            terminate([server, *server.children(recursive=True)], SERVICE_GRACE)
        self.services.clear()
        self.save()
        return stopped


def worker_name(pool: str) -> str:
    """Return the name of this machine's worker of a pool: a restarted one is the same worker."""
    return f"{pool}@{os.uname().nodename}"


def chosen_port() -> int:
    """Return STARLOOM_PORT, or PREFECT_SERVER_API_PORT, or 4200."""
    for name in ("STARLOOM_PORT", "PREFECT_SERVER_API_PORT"):
        value = os.environ.get(name)
        if value:
            if not value.isdigit() or not 0 < int(value) < 65536:
                raise ServiceError(f"{name}={value!r}: expected a port number from 1 to 65535")
            return int(value)
    return DEFAULT_PORT


def api_url(port: int) -> str:
    """Return the address of the Prefect API on this machine."""
    return f"http://127.0.0.1:{port}/api"


def environment(port: int) -> dict[str, str]:
    """Return the whole environment of the processes we start.

    STARLOOM_DATA passes through. Telemetry is off, Prefect's home absolute (flow runs start in
    other folders), and loopback is exempt from a proxy.
    """
    given = (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"))
    no_proxy = ",".join(filter(None, (*given, "127.0.0.1", "localhost")))
    changes = {
        "DO_NOT_TRACK": "1",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PREFECT_API_URL": api_url(port),
        "PREFECT_HOME": str(Path(os.environ.get("PREFECT_HOME") or ROOT / ".prefect").absolute()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **changes}


def check_port_free(port: int) -> None:
    """Raise ServiceError naming the process that listens on the port, if one does."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            return
    raise ServiceError(
        f"port {port} is in use by {_listener(port)}: stop it, or choose another port with "
        "STARLOOM_PORT (or PREFECT_SERVER_API_PORT)"
    )


def _listener(port: int) -> str:
    """Name the process that listens on a port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another process"


def healthy(port: int) -> bool:
    """Return whether a Prefect server answers on the port."""
    try:
        return httpx.get(f"{api_url(port)}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def wait_healthy(services: Services, port: int, seconds: float = 120) -> None:
    """Wait until our server answers; ServiceError with its last line where it ends or does not."""
    deadline = time.monotonic() + seconds
    while not healthy(port):
        ended = services.running(SERVER) is None
        if ended or time.monotonic() > deadline:
            log = services.folder / f"{SERVER}.log"
            why = "ended" if ended else f"does not answer within {seconds:.0f} s"
            raise ServiceError(f"the server {why}: {last_line(log)} (all of it in {log})")
        time.sleep(0.3)


def last_line(path: Path) -> str:
    """Return the last line of a text file that is not blank."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def marked(token: str) -> list[psutil.Process]:
    """Return the processes that carry our token in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) == token:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _is_engine(process: psutil.Process) -> bool:
    """Return whether a process runs a flow: those report their end and stop what they started."""
    try:
        return any("prefect" in part and "engine" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes and all below them (ranks have no token: their environment is bare)."""
    found: dict[int, psutil.Process] = {}
    for process in processes:
        try:
            found.update({p.pid: p for p in (process, *process.children(recursive=True))})
        except psutil.Error:
            continue
    return list(found.values())


def terminate(
    processes: list[psutil.Process],
    grace: float,
    also_wait_for: Iterable[psutil.Process] = (),
) -> None:
    """SIGTERM the processes, wait up to `grace` seconds for them and others, SIGKILL the rest."""
    for process in processes:
        if grace:
            _signal(process, kill=False)
    waited = {p.pid: p for p in (*processes, *also_wait_for)}
    _, alive = psutil.wait_procs(list(waited.values()), timeout=grace)
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=5)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    """Signal a process unless it ended meanwhile (psutil checks that the pid is still its own)."""
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


def prefect_command(arguments: Iterable[str], env: Mapping[str, str]) -> None:
    """Run `prefect ARGUMENTS` from the checkout; ServiceError with its last lines if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=ROOT,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-400:]
        raise ServiceError(f"`prefect {' '.join(arguments)}` failed: {said}")
