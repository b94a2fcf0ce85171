"""Every test is hermetic: its own data root, no network, no telemetry."""

import os
import socket

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "")


def pytest_collection_modifyitems(items):
    """Give each module to one process as a whole; all flows share one Prefect server."""
    for item in items:
        module = item.nodeid.partition("::")[0]
        group = "flows" if "/flows/" in module else module
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def data_root(tmp_path, monkeypatch):
    """Point the data root at a temporary folder."""
    root = tmp_path / "data-root"
    monkeypatch.setenv("STARLOOM_DATA", str(root))
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection that would leave this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in LOCAL:
            raise OSError(f"tests are offline, but something connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets; tests that need it skip where it is not given."""
    from pathlib import Path

    folder = os.environ.get("STARLOOM_REAL_DATA")
    if not folder:
        pytest.skip("STARLOOM_REAL_DATA is not set: no real data on this machine")
    return Path(folder)
