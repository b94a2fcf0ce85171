"""Facts about Prefect that starloom rests on: they fail here first when a version changes them."""

import time

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments import run_deployment
from prefect.exceptions import TerminationSignal

from flows.operate import connect
from flows.services import Services
from tests.assets.live_server import free_port

pytestmark = pytest.mark.flow


def test_the_same_idempotency_key_returns_the_same_flow_run(client):
    flow_id = client.create_flow_from_name("twin")
    client.create_deployment(flow_id, name="default")

    runs = [run_deployment("twin/default", timeout=0, idempotency_key=key) for key in "aab"]

    assert runs[0].id == runs[1].id
    assert runs[2].id != runs[0].id


def test_hooks_are_called_with_the_keywords_flow_flow_run_and_state():
    called = []

    def hook(flow, flow_run, state):
        called.append((flow.name, flow_run.name, state.name))

    @flow(name="hooked", flow_run_name="one", on_completion=[hook])
    def hooked():
        return None

    hooked()

    assert called == [("hooked", "one", "Completed")]


def test_the_signal_of_a_cancellation_is_no_exception_that_code_would_catch():
    assert issubclass(TerminationSignal, BaseException)
    assert not issubclass(TerminationSignal, Exception)


def test_a_real_server_schedules_a_cron_deployment(tmp_path, monkeypatch):
    """FastAPI from 0.155 on ends the server at import; SQLAlchemy 2.1 schedules nothing."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STARLOOM_PORT", str(free_port()))
    services = Services.load(tmp_path)
    nightly = CronSchedule(cron="15 2 * * *", timezone="UTC")
    try:
        assert services.start_server() is True
        with connect(services.port) as client:
            client.create_deployment(
                client.create_flow_from_name("canary"),
                name="nightly",
                schedules=[DeploymentScheduleCreate(schedule=nightly, active=True)],
            )
            scheduled = wait_for_runs(client)
    finally:
        assert services.stop() == ["server"]

    assert {run.state_name for run in scheduled} == {"Scheduled"}
    assert {
        (run.expected_start_time.hour, run.expected_start_time.minute) for run in scheduled
    } == {(2, 15)}


def wait_for_runs(client: SyncPrefectClient):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        runs = client.read_flow_runs()
        if runs:
            return runs
        time.sleep(0.2)
    raise AssertionError("an active cron schedule made no Scheduled run within a minute")
