"""prepare on a real Ray cluster of two raylets: the bytes of one machine, also with some killed.

Needs the extra `ray`, and its commands beside the interpreter that runs pytest. Three minutes.
"""

import hashlib
import shutil
import threading
import time

import pytest
from prefect.client.schemas.filters import FlowRunFilter

from pipelines.plan import STAGES, prepare
from pipelines.recipe import load_recipe
from pipelines.store import Store
from tests.assets.live_server import LiveServer

pytest.importorskip("ray", reason="needs the extra `ray` (pip install -e '.[ray]')")
pytest.importorskip("prefect_ray", reason="needs the extra `ray` (pip install -e '.[ray]')")

from tests.assets.ray_cluster import TwoRaylets

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
# Small shards, so that every stage has some for each raylet.
OVERRIDES = {"tokenization.rows_per_shard": 256}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with TwoRaylets(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def server(tmp_path_factory, cluster):
    """A server with workers that know the cluster: all that a user sets is its address."""
    live = LiveServer(tmp_path_factory.mktemp("live"))
    token = {name: value for name, value in cluster.env.items() if name.startswith("RAY_AUTH")}
    live.env |= {**token, "STARLOOM_RAY_ADDRESS": cluster.address}
    live.command("starloom", "up")
    yield live
    live.command("starloom", "down")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files of all stages, made by one worker of this process."""
    root = tmp_path_factory.mktemp("alone")
    recipe = load_recipe("quickstart", overrides=OVERRIDES)
    assert len(list(prepare(recipe, Store(root, workers=1)))) == len(STAGES)
    return read_files(root)


def read_files(store):
    """Return {stage/key/file: sha256} of all finished stages; manifests tell times, too."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.glob("*/[0-9a-f]*/*"))
        if path.name != "manifest.json"
    }


def run_prepare(server, while_running):
    """Run prepare/default on an empty store, `while_running` beside it; return its final state."""
    shutil.rmtree(server.root / "store", ignore_errors=True)
    ended = threading.Event()
    watcher = threading.Thread(target=while_running, args=(ended,))
    flow_run_id = server.start("prepare/default", recipe="quickstart", overrides=OVERRIDES)
    watcher.start()
    try:
        return server.wait(flow_run_id, 300)
    finally:
        ended.set()
        watcher.join()


def read_task_names(server, state):
    wanted = FlowRunFilter.model_validate({"id": {"any_": [state.state_details.flow_run_id]}})
    with server.client() as client:
        return [task.name for task in client.read_task_runs(flow_run_filter=wanted)]


def test_two_raylets_make_the_same_bytes_as_one_process(server, cluster, alone):
    seen = set()

    def look(ended):
        while not ended.wait(0.02):
            seen.update(number for number in (0, 1) if cluster.busy(number))

    state = run_prepare(server, look)

    assert state.is_completed(), state.message
    assert read_files(server.root / "store") == alone
    assert seen == {0, 1}
    names = read_task_names(server, state)
    on_cluster = {name.split()[0] for name in names if "-00000" in name}
    assert {"collect", "language", "dedup", "tokenize", "pack"} <= on_cluster


def test_a_killed_worker_and_a_killed_raylet_change_no_byte(server, cluster, alone):
    killed = []

    def kill(ended):
        while not ended.is_set() and not killed:
            for process in cluster.busy(0):
                process.kill()
                killed.append("worker")
        while not ended.is_set() and not list(server.root.glob("store/redact/*/manifest.json")):
            time.sleep(0.02)
        while not ended.is_set() and "raylet" not in killed:
            if cluster.busy(1):
                cluster.kill_node(1)
                killed.append("raylet")

    state = run_prepare(server, kill)

    assert state.is_completed(), state.message
    assert killed[0] == "worker"
    assert killed[-1] == "raylet"
    assert read_files(server.root / "store") == alone
