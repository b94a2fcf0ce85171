"""Services: found again by pid and start time, stopped with all they started, and nothing else."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from flows import services
from flows.services import TOKEN, Service, Services, chosen_port, environment
from pipelines.errors import ServiceError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# Ignores SIGTERM, and has a child in a session of its own, as torchrun's ranks are.
STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    " start_new_session=True, env={}); print(child.pid, flush=True); time.sleep(60)"
)


@pytest.fixture
def spawn():
    """Start processes; whatever is left of them ends with the test."""
    started = []

    def start(arguments=SLEEP, token="", **options):
        env = {**os.environ, **({TOKEN: token} if token else {})}
        process = subprocess.Popen(arguments, env=env, start_new_session=True, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def record(name, process):
    return Service(name, process.pid, psutil.Process(process.pid).create_time())


def test_the_record_is_read_back_and_a_damaged_one_means_that_nothing_runs(tmp_path, spawn):
    first = Services(tmp_path, 4711, deployed="abc")
    first.services["server"] = record("server", spawn())
    first.save()

    again = Services.load(tmp_path)

    assert (again.port, again.token, again.deployed) == (4711, first.token, "abc")
    assert again.services == first.services
    assert again.running("server").pid == first.services["server"].pid
    (tmp_path / "services.json").write_text('{"port": 1')
    assert Services.load(tmp_path).services == {}


def test_a_process_that_only_has_the_same_pid_is_not_ours(spawn):
    process = spawn()
    ours = record("server", process)

    assert ours.process.pid == process.pid
    assert Service("server", process.pid, ours.created - 100).process is None
    process.kill()
    deadline = time.monotonic() + 10
    while ours.process is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ours.process is None  # a zombie is no running process either


def test_stop_ends_services_what_they_started_and_nothing_else(tmp_path, spawn, monkeypatch):
    monkeypatch.setattr(services, "SERVICE_GRACE", 0.5)
    ours = Services(tmp_path, 4711)
    server, worker = (
        spawn(token=ours.token),
        spawn([sys.executable, "-c", STUBBORN], ours.token, stdout=subprocess.PIPE, text=True),
    )
    grandchild = psutil.Process(int(worker.stdout.readline()))
    flow_run, stranger, other = spawn(token=ours.token), spawn(), spawn(token="another")
    ours.services = {
        "server": record("server", server),
        "worker-cpu": record("worker-cpu", worker),
        "worker-gpu": Service("worker-gpu", stranger.pid, 1.0),
    }

    stopped = ours.stop()

    assert stopped == ["server", "worker-cpu"]
    assert [p.wait(10) is not None for p in (server, worker, flow_run)] == [True] * 3
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    assert [p.poll() for p in (stranger, other)] == [None, None]
    assert Services.load(tmp_path).services == {}


def test_a_port_in_use_is_an_error_that_names_port_process_and_remedy(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("STARLOOM_PORT", str(port))

        with pytest.raises(ServiceError) as error:
            Services.load(tmp_path).start_server()

    text = str(error.value)
    assert f"port {port} is in use by " in text
    assert f"(pid {os.getpid()})" in text
    assert "STARLOOM_PORT (or PREFECT_SERVER_API_PORT)" in text
    assert "\n" not in text


def test_the_port_comes_from_the_environment_and_a_wrong_one_is_named(monkeypatch):
    monkeypatch.delenv("STARLOOM_PORT", raising=False)
    monkeypatch.delenv("PREFECT_SERVER_API_PORT", raising=False)
    assert chosen_port() == 4200
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", "4300")
    assert chosen_port() == 4300
    monkeypatch.setenv("STARLOOM_PORT", "4400")
    assert chosen_port() == 4400
    monkeypatch.setenv("STARLOOM_PORT", "http")
    with pytest.raises(ServiceError, match="STARLOOM_PORT='http': expected a port number"):
        chosen_port()


def test_another_port_than_that_of_the_running_server_is_refused(tmp_path, spawn, monkeypatch):
    running = Services(tmp_path, 4711)
    running.services["server"] = record("server", spawn())
    monkeypatch.setenv("STARLOOM_PORT", "4712")

    with pytest.raises(ServiceError, match="runs on port 4711, not 4712: `starloom down` first"):
        running.start_server()


def test_child_processes_get_an_absolute_home_no_telemetry_and_no_proxy_for_loopback(monkeypatch):
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("NO_PROXY", "internal.example")
    monkeypatch.setenv("STARLOOM_DATA", "/elsewhere")

    env = environment(4711)

    assert env["PREFECT_HOME"] == str(services.ROOT / ".prefect")
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4711/api"
    assert (env["DO_NOT_TRACK"], env["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")
    assert env["NO_PROXY"] == "internal.example,127.0.0.1,localhost"
    assert env["STARLOOM_DATA"] == "/elsewhere"
