"""A push waits for a person: resumed it pushes the model folder, cancelled it pushes nothing."""

import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from prefect.blocks.system import Secret
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Scheduled

from flows.push import push
from pipelines.errors import PreflightError
from pipelines.runs import Run
from tasks import credentials
from tasks.children import submit
from tests.assets.flow_runs import read_artifacts, read_messages

pytestmark = pytest.mark.flow

TOKEN = "hf_canaryCanaryCanary"
CARD = "---\nlicense: mit\n---\n# quickstart\n"


class Hub:
    """What a Hub would have seen."""

    def __init__(self):
        self.commits, self.token = [], None

    def __call__(self, token):
        self.token = token
        return self

    def create_repo(self, repository, **_):
        pass

    def list_repo_files(self, repository, **_):
        return []

    def create_commit(self, repository, *, operations, **_):
        self.commits.append((repository, sorted(each.path_in_repo for each in operations)))
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def run(data_root, monkeypatch):
    """An accepted run with a model, a checkpoint and a card; its name is the same in each test."""
    run = Run(data_root / "runs" / "toy-1")
    for name in ("model/adapter", "checkpoints"):
        (run.path / name).mkdir(parents=True)
    for name in ("model/model.safetensors", "model/adapter/a.safetensors", "checkpoints/b.bin"):
        (run.path / name).write_bytes(b"weights")
    (run.path / "card.md").write_text(CARD)
    run.write("run.json", {"key": "0123456789abcdef0123", "recipe": "quickstart"})
    run.write("training.json", {"status": "finished", "model_files": {}})
    monkeypatch.setattr("pipelines.evals.publish.sha256_file", lambda path: "same")
    accept(run, accepted=True)
    return run


def accept(run, *, accepted):
    reason = "accepted: better" if accepted else "rejected: no better"
    parts = {"training": "same"}
    run.write("scorecard.json", {"accepted": accepted, "reason": reason, "key_parts": parts})


@pytest.fixture
def suspended(client, run, hub):
    """A flow run of the deployment push/default that waits for approval, started as workers do."""
    flow_id = client.create_flow(push)
    deployment = client.create_deployment(flow_id, name="default")
    asked = submit("push/default", run, repository="me/model")
    go_on(client, asked.id)
    assert deployment
    return asked


def go_on(client, flow_run_id):
    """Play the worker: run the flow run to its end or its suspension; return its state."""
    flow_run = client.read_flow_run(flow_run_id)
    parameters = dict(flow_run.parameters)
    with suppress(Pause):
        run_flow(push, flow_run=flow_run, parameters=parameters, return_type="state")
    return client.read_flow_run(flow_run_id).state


def as_state(flow_run_id):
    return SimpleNamespace(state_details=SimpleNamespace(flow_run_id=flow_run_id))


def test_a_suspended_push_shows_its_plan_and_when_resumed_pushes_the_model_folder(
    client, suspended, run, hub
):
    waiting = client.read_flow_run(suspended.id)
    artifact = read_artifacts(client, as_state(suspended.id))["push-plan"]

    assert (waiting.state.name, waiting.name) == ("Suspended", "toy-1 to me/model")
    assert hub.commits == []
    assert "| license    | mit" in artifact["data"]
    assert "adapter/a.safetensors" in artifact["data"]
    client.resume_flow_run(suspended.id)
    state = go_on(client, suspended.id)

    assert (state.type.value, state.message) == (
        "COMPLETED", "toy-1 is at https://hub/me/model/commit/1",
    )  # fmt: skip
    assert hub.commits == [
        ("me/model", ["README.md", "adapter/a.safetensors", "model.safetensors"])
    ]
    assert hub.token == TOKEN
    everything = [*read_messages(client, as_state(suspended.id)), artifact["data"]]
    assert not any(TOKEN in text for text in everything)
    assert TOKEN not in str(client.read_flow_run(suspended.id).model_dump())


def test_a_cancelled_push_pushes_nothing_even_if_it_is_retried(client, suspended, hub):
    client.set_flow_run_state(suspended.id, Cancelled(), force=True)
    assert hub.commits == []

    client.set_flow_run_state(suspended.id, Scheduled(), force=True)
    state = go_on(client, suspended.id)

    assert (state.name, hub.commits) == ("Failed", [])
    assert state.message.startswith("the push to me/model was not approved: start it anew")


@pytest.mark.system
def test_a_model_that_changed_while_it_waited_waits_for_another_approval(
    client, suspended, run, hub
):
    (run.model / "model.safetensors").write_bytes(b"other weights")
    client.resume_flow_run(suspended.id)

    assert go_on(client, suspended.id).name == "Suspended"
    assert hub.commits == []
    accept(run, accepted=False)
    client.resume_flow_run(suspended.id)
    state = go_on(client, suspended.id)
    assert (state.name, hub.commits) == ("Failed", [])
    assert "rejected: no better" in state.message


@pytest.mark.system
def test_without_a_deployment_the_run_itself_waits(client, run, hub):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(push("toy-1", "me/model", return_state=True))
    )
    thread.start()
    deadline = time.monotonic() + 60
    while not (paused := waiting_runs(client)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert hub.commits == []
    client.resume_flow_run(paused[0].id, run_input={"note": "looks good"})
    thread.join(60)

    assert found[0].name == "Completed"
    assert len(hub.commits) == 1


def waiting_runs(client):
    return [each for each in client.read_flow_runs() if each.state and each.state.name == "Paused"]


def test_a_push_is_refused_at_once_for_a_rejected_model_or_without_a_token(
    client, run, hub, monkeypatch
):
    accept(run, accepted=False)
    rejected = push("toy-1", "me/model", return_state=True)
    accept(run, accepted=True)
    bad = push("toy-1", "model", return_state=True)
    monkeypatch.delenv("HF_TOKEN")
    tokenless = push("toy-1", "me/model", return_state=True)

    assert [state.name for state in (rejected, bad, tokenless)] == ["Failed"] * 3
    assert "rejected: no better" in rejected.message
    assert "expected OWNER/NAME" in bad.message
    assert "set HF_TOKEN for the worker, or make a Secret block 'hf-token'" in tokenless.message


def test_the_token_may_be_in_a_secret_block_that_a_setting_names(run, monkeypatch, prefect_server):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Secret(value=TOKEN).save("my-hub")
    monkeypatch.setenv("STARLOOM_HF_TOKEN_BLOCK", "my-hub")
    assert credentials.load_token() == TOKEN
    monkeypatch.setenv("STARLOOM_HF_TOKEN_BLOCK", "no-such")
    with pytest.raises(PreflightError, match="Secret block 'no-such'"):
        credentials.load_token()
