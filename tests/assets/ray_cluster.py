"""A Ray cluster of a test's own: two raylets on loopback, each ended by its own processes only."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.assets.live_server import free_port, wait_until

BIN = Path(sys.executable).parent


class TwoRaylets:
    """A head with one CPU and a second raylet with one CPU; with a token of their own."""

    def __init__(self, folder):
        # Ray's sockets lie below it, and their names may have 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        self.address = f"127.0.0.1:{free_port()}"
        token = folder / "ray-token"
        token.write_text("0123456789abcdef" * 4)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_"))},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "home-of-nodes"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.folder = folder
        self.nodes = []

    def __enter__(self):
        port = self.address.rpartition(":")[2]
        head = ("--head", f"--port={port}", f"--temp-dir={self.temporary}")
        try:
            self.add(*head, "--include-dashboard=false")
            self.add(f"--address={self.address}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for number in reversed(range(len(self.nodes))):
            self.kill_node(number)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, *arguments):
        """Start a raylet with one CPU, and wait until it is up."""
        ports = ("dashboard-agent-listen", "metrics-export", "runtime-env-agent")
        options = (
            "--block", "--num-cpus=1", "--object-store-memory=80000000",
            "--node-ip-address=127.0.0.1", *(f"--{name}-port={free_port()}" for name in ports),
        )  # fmt: skip
        path = self.folder / f"raylet-{len(self.nodes)}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [BIN / "ray", "start", *arguments, *options],
                cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(psutil.Process(process.pid))
        wait_until(lambda: "Ray runtime started" in path.read_text() or process.poll(), 60)
        assert process.poll() is None, path.read_text()

    def busy(self, number):
        """Return the processes of a raylet that are at a task of ours."""
        return [p for p in _tree(self.nodes[number]) if "ray::make_shards" in _cmdline(p)]

    def kill_node(self, number):
        """Kill -9 a raylet with all its processes, and no other."""
        tree = _tree(self.nodes[number])
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)


def _tree(process):
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _cmdline(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
