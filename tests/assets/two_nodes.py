"""Two machines as far as one allows it: two network namespaces with a cable between them.

Where namespaces are not allowed, two agents on the loopback interface.
"""

import contextlib
import os
import shutil
import subprocess

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class TwoNodes:
    """Starts commands on one of two nodes; `isolated` says whether they are namespaces."""

    def __init__(self, isolated):
        self.isolated = isolated
        self.names = [f"starloom{os.getpid()}n{i}" for i in (0, 1)]

    def environment(self, number):
        """Return what tells the nodes where they meet."""
        if self.isolated:
            return {"STARLOOM_RDZV_ENDPOINT": f"{ADDRESSES[0]}:29500"}
        return {
            "STARLOOM_RDZV_ENDPOINT": "127.0.0.1:29571",
            "STARLOOM_ALLOW_LOOPBACK": "1",
            "STARLOOM_NODE_RANK": str(number),
        }

    def start(self, number, command, **options):
        """Start a command on a node."""
        inside = ["ip", "netns", "exec", self.names[number]] if self.isolated else []
        env = {**os.environ, **self.environment(number), **options.pop("env", {})}
        return subprocess.Popen([*inside, *map(str, command)], env=env, text=True, **options)


@contextlib.contextmanager
def two_nodes():
    """Make the namespaces and the cable, and remove them afterwards."""
    nodes = TwoNodes(isolated=True)
    ends = [f"sl{os.getpid() % 100000}e{i}" for i in (0, 1)]
    try:
        nodes.isolated = bool(shutil.which("ip")) and _make(nodes.names, ends)
        yield nodes
    finally:
        for name in nodes.names:
            _ip("netns", "del", name)


def _make(names, ends):
    made = [_ip("netns", "add", name) for name in names]
    made.append(_ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]))
    for name, end, address in zip(names, ends, ADDRESSES, strict=True):
        inside = ("-n", name)
        made += [
            _ip("link", "set", end, "netns", name),
            _ip(*inside, "addr", "add", f"{address}/24", "dev", end),
            _ip(*inside, "link", "set", end, "up"),
            _ip(*inside, "link", "set", "lo", "up"),
        ]
    return all(made)


def _ip(*arguments):
    if shutil.which("ip") is None:
        return False
    return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0
