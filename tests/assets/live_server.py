"""A server with workers of a test's own: its commands, its flow runs, the processes behind them."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter

from flows.services import ROOT

BIN = Path(sys.executable).parent
# Long enough to be interrupted in the middle, with a checkpoint every second or so.
TRAINING = {"training.max_steps": 240, "training.save_steps": 20, "training.eval_steps": 60}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LiveServer:
    """`starloom up` in a data root of its own."""

    def __init__(self, folder):
        self.root = folder / "data"
        self.port = free_port()
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")},
            "STARLOOM_DATA": str(self.root),
            "STARLOOM_PORT": str(self.port),
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def command(self, *arguments, check=True, **changes):
        """Run a command; return what it printed."""
        done = subprocess.run(
            arguments, cwd=ROOT, env=self.env | changes, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    def services(self):
        """Return {service: pid}."""
        record = json.loads((self.root / "state" / "services.json").read_text())
        return {each["name"]: each["pid"] for each in record["services"]}

    @contextmanager
    def client(self):
        with SyncPrefectClient(
            api=self.env["PREFECT_API_URL"], httpx_settings={"trust_env": False}
        ) as client:
            yield client

    def start(self, deployment, **parameters):
        """Start a flow run of a deployment; return its id."""
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def finetune(self, **parameters):
        """Start the smoke finetune whose training can be interrupted."""
        return self.start("finetune/quickstart", smoke=True, overrides=TRAINING, **parameters)

    def state(self, flow_run_id):
        with self.client() as client:
            return client.read_flow_run(flow_run_id).state

    def wait(self, flow_run_id, seconds=240):
        """Return the final state of a flow run."""
        return wait_until(lambda: (s := self.state(flow_run_id)).is_final() and s, seconds)

    def child(self, deployment, states=("RUNNING",)):
        """Return the newest flow run of a deployment in one of the states, or None."""
        with self.client() as client:
            wanted = {
                "deployment_id": {"any_": [client.read_deployment_by_name(deployment).id]},
                "state": {"type": {"any_": list(states)}},
            }
            # One filter object per table.
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
        return max(found, key=lambda run: run.created, default=None)

    def engines(self, flow_run_id):
        """Return the processes that execute a flow run."""
        return [
            process
            for process in psutil.process_iter()
            if _environ(process).get("PREFECT__FLOW_RUN_ID") == str(flow_run_id)
            and any("engine" in part for part in _cmdline(process))
        ]

    def ranks(self):
        """Return the training processes below this data root, launchers left out."""
        return [
            process
            for process in psutil.process_iter()
            if any(part.startswith(f"--run={self.root}") for part in _cmdline(process))
            and not {"torch.distributed.run", "pipelines.training.supervise"}
            & set(_cmdline(process))
        ]

    def runs(self):
        """Return the run folders, those set aside left out."""
        return [p.parent for p in self.root.glob("runs/*/run.json") if ".replaced-" not in str(p)]


def wait_until(condition, seconds=120, every=0.3):
    """Return the first true value of a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {condition}")


def _environ(process):
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
