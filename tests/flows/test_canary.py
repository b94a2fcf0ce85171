"""Facts about Prefect that starloom rests on: they fail here first when a version changes them."""

import pytest
from prefect import flow
from prefect.deployments import run_deployment
from prefect.exceptions import TerminationSignal

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
