"""Handing a step over: joined in flight, resubmitted after a crash, cancelled with its parent."""

import json
import logging
import threading
import time

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Running

from pipelines.errors import StarloomError, TrainingError
from pipelines.runs import Run
from tasks import children, monitor
from tasks.children import hand_over, submit
from tasks.monitor import Monitor, Picture
from tasks.steps import Stopped, explained
from tasks.training import loss_picture

pytestmark = pytest.mark.flow


@pytest.fixture
def deployment(client, monkeypatch, tmp_path):
    """A deployment that no worker serves; its name is new for each test."""
    monkeypatch.setattr(children, "POLL_SECONDS", 0.05)
    flow_id = client.create_flow_from_name("child")
    client.create_deployment(flow_id, name=tmp_path.name)
    return f"child/{tmp_path.name}"


@pytest.fixture
def run(tmp_path):
    """A run folder with a key."""
    run = Run(tmp_path / "toy-1")
    run.path.mkdir()
    run.write("run.json", {"key": "0123456789abcdef0123"})
    return run


@pytest.fixture
def worker(client, deployment):
    """Play the worker: end each new flow run of the deployment in the next of the given states."""
    over, seen = threading.Event(), []

    def serve(*states):
        thread = threading.Thread(target=work, args=(list(states),))
        threads.append(thread)
        thread.start()
        return seen

    def work(states):
        with get_client(sync_client=True) as own:
            while states and not over.is_set():
                for child in runs_of(own, deployment):
                    if child.id not in {each.id for each in seen} and states:
                        seen.append(child)
                        own.set_flow_run_state(child.id, Running(), force=True)
                        own.set_flow_run_state(child.id, states.pop(0), force=True)
                time.sleep(0.05)

    threads = []
    yield serve
    over.set()
    for thread in threads:
        thread.join()


def runs_of(client, deployment):
    wanted = {"id": {"any_": [client.read_deployment_by_name(deployment).id]}}
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"deployment_id": wanted["id"]})
    )


def test_a_crashed_child_is_submitted_again_under_the_next_key(deployment, run, worker):
    seen = worker(Crashed(message="killed"), Crashed(message="killed"), Completed())

    hand_over(deployment, run, lambda: True)

    assert [child.idempotency_key for child in seen] == [
        f"0123456789abcdef:{deployment}:{attempt}" for attempt in (1, 2, 3)
    ]
    assert {child.parameters["run"] for child in seen} == {"toy-1"}


def test_a_third_crash_is_an_error_and_so_is_the_first_failure(client, deployment, run, worker):
    crash = Crashed(message="killed again")
    worker(crash, crash, crash, Failed(message="the loss is NaN at step 7"))

    with pytest.raises(TrainingError, match="crashed 3 times, last: killed again"):
        hand_over(deployment, run, lambda: True)
    with pytest.raises(StarloomError, match="the loss is NaN at step 7"):
        hand_over(deployment, run, lambda: True)

    assert len(runs_of(client, deployment)) == 4


def test_a_cancelled_child_stops_the_parent_and_the_next_try_is_a_new_one(deployment, run, worker):
    seen = worker(Cancelled(), Completed())

    with pytest.raises(Stopped, match="was cancelled; run it again to resume"):
        hand_over(deployment, run, lambda: True)
    with pytest.raises(TrainingError, match="its result is not in .*toy-1: do both machines"):
        hand_over(deployment, run, lambda: False)

    assert [child.idempotency_key[-2:] for child in seen] == [":1", ":2"]


def test_a_child_in_flight_is_joined_and_another_run_is_not(client, deployment, run, tmp_path):
    other = Run(tmp_path / "toy-2")
    other.path.mkdir()
    other.write("run.json", {"key": "fedcba9876543210fedc"})

    first, again, different = (submit(deployment, each) for each in (run, run, other))

    assert first.id == again.id
    assert different.id != first.id
    assert len(runs_of(client, deployment)) == 2


def test_cancelling_the_parent_cancels_the_child_and_ends_the_parent_cancelled(
    client, deployment, run
):
    @flow
    @explained
    def parent():
        own = flow_run.get_id()
        threading.Timer(0.5, cancel, args=[own]).start()
        hand_over(deployment, run, lambda: True)

    def cancel(flow_run_id):
        with get_client(sync_client=True) as own:
            own.set_flow_run_state(flow_run_id, Cancelling(), force=True)

    state = parent(return_state=True)

    (child,) = runs_of(client, deployment)
    assert child.state.type.value in ("CANCELLING", "CANCELLED")
    assert state.is_cancelled()


def test_the_monitor_publishes_progress_and_notices_a_cancellation(client, monkeypatch):
    monkeypatch.setattr(monitor, "EVERY_SECONDS", 0.1)

    @flow
    def work():
        own = flow_run.get_id()
        with Monitor("train-progress") as watching:
            watching.show(40.0, "step 4")
            before = watching.stopped()
            with get_client(sync_client=True) as other:
                other.set_flow_run_state(own, Cancelling(), force=True)
            deadline = time.monotonic() + 10
            while not watching.stopped() and time.monotonic() < deadline:
                time.sleep(0.05)
            watching.show(50.0, "step 5")
            return before, watching.stopped(), own

    before, after, own = work()

    body = {"artifacts": {"flow_run_id": {"any_": [str(own)]}}}
    (artifact,) = client.request("POST", "/artifacts/filter", json=body).json()
    assert (before, after) == (False, True)
    assert (artifact["key"], artifact["data"], artifact["description"]) == (
        "train-progress", 50.0, "step 5",
    )  # fmt: skip


def test_the_loss_curve_is_drawn_while_training_and_updated_in_place(client, monkeypatch, run):
    monkeypatch.setattr(monitor, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(monitor, "PICTURE_SECONDS", 0.1)
    metrics = run.path / "metrics.jsonl"
    line = {"step": 1, "max_steps": 8, "loss": 4.5, "tokens_per_second": 900.0, "mfu": 0.5}

    def read(own, description):
        body = {"artifacts": {"flow_run_id": {"any_": [str(own)]}}}
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = client.request("POST", "/artifacts/filter", json=body).json()
            if found and found[0]["description"].startswith(description):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{description!r} was not published")

    @flow
    def work():
        own = flow_run.get_id()
        with Monitor("train-progress", loss_picture(run)):
            metrics.write_text('{"step": 0, "eval_loss": 5.0}\n' + json.dumps(line) + "\n")
            first = read(own, "step 1 of 8: training loss 4.500, validation 5.000, 900 tokens/s")
            with metrics.open("a") as file:
                file.write(json.dumps(line | {"step": 2}) + "\n")
            return first, read(own, "step 2 of 8")

    (first,), (second,) = work()

    assert (first["key"], first["id"]) == ("loss-curve", second["id"])
    assert first["data"].startswith("![training and validation loss](data:image/png;base64,iVBOR")
    assert second["data"] != first["data"]
    assert second["description"].endswith(f"MFU 50%, {run.name}")


def test_a_picture_that_cannot_be_drawn_leaves_the_watch_alone(monkeypatch, caplog):
    monkeypatch.setattr(monitor, "PICTURE_SECONDS", 0.0)

    Picture("loss-curve", lambda: 1 / 0).publish()

    assert "loss-curve not drawn" in caplog.text


def test_a_server_that_is_away_neither_stops_nor_delays_the_step(monkeypatch, caplog):
    import httpx

    def away(*arguments, **options):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(monitor, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(monitor, "get_client", away)
    monkeypatch.setattr(monitor, "create_progress_artifact", away)
    watching = Monitor("train-progress")
    watching._id = "00000000-0000-0000-0000-000000000000"

    with caplog.at_level(logging.WARNING), watching:
        watching.show(1.0, "step 1")
        time.sleep(0.3)

    assert watching.stopped() is False
