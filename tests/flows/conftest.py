"""One Prefect server for all flow tests, and one small corpus prepared once."""

import asyncio
import email
import json
import shutil
from pathlib import Path

import pytest
from prefect import settings
from prefect.client.orchestration import get_client
from prefect.settings import temporary_settings
from prefect.testing.utilities import prefect_test_harness

from tests.assets.flow_runs import LICENSE


@pytest.fixture(scope="session", autouse=True)
def prefect_server(tmp_path_factory):
    """A server with its own database and home: the harness alone would write into ./.prefect."""
    home = tmp_path_factory.mktemp("prefect-home")
    changes = {
        settings.PREFECT_HOME: home,
        settings.PREFECT_RESULTS_LOCAL_STORAGE_PATH: home / "storage",
        settings.PREFECT_SERVER_ANALYTICS_ENABLED: False,
        settings.PREFECT_LOGGING_LEVEL: "ERROR",
    }
    with temporary_settings(changes), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def client():
    """A client of that server."""
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of real Python sources: some packages of the standard library."""
    folder = tmp_path_factory.mktemp("corpus") / "stdlib"
    for package in (asyncio, email, json):
        source = Path(package.__file__).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def first_root(tmp_path_factory):
    """The data root that `prepared` fills."""
    return tmp_path_factory.mktemp("first-root")


@pytest.fixture(scope="session")
def prepared(prefect_server, corpus, first_root):
    """Prepare the corpus once; return the final state of the flow run."""
    from flows.prepare import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLOOM_DATA", str(first_root))
        return prepare("quickstart", str(corpus), LICENSE, smoke=True, return_state=True)


@pytest.fixture
def prepared_root(prepared, first_root, tmp_path, monkeypatch):
    """A data root of this test's own in which every data stage is built."""
    root = tmp_path / "root"
    shutil.copytree(first_root, root)
    monkeypatch.setenv("STARLOOM_DATA", str(root))
    return root
