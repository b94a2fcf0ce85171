"""finetune: the steps of the plan in order, reuse, the gate, publication and errors."""

from types import SimpleNamespace

import pytest

from flows.finetune import finetune
from pipelines.plan import RUN_STEPS, STAGES, data_root
from pipelines.runs import Run
from tasks import children, push, ready
from tests.assets.flow_runs import (
    LICENSE,
    finish_evaluation,
    finish_training,
    read_artifacts,
    read_messages,
    read_tasks,
)

pytestmark = pytest.mark.flow


@pytest.fixture
def handed(monkeypatch):
    """Train and evaluate at once instead of on the pool; the list says what was handed over.

    Its `after` is the loss that the evaluation will find.
    """

    class Handed(list):
        after = 4.0

    calls = Handed()

    def hand_over(deployment, run, is_done):
        calls.append(deployment)
        finish_training(run) if deployment.startswith("train") else finish_evaluation(
            run, calls.after
        )
        assert is_done()

    monkeypatch.setattr(children, "hand_over", hand_over)
    monkeypatch.setattr(ready, "online_workers", lambda pool: ["gpu@elsewhere"])
    return calls


@pytest.fixture
def asked(monkeypatch):
    """The pushes that were asked for, as (deployment, run, repository)."""
    calls = []

    def submit(deployment, run, repository):
        calls.append((deployment, run.name, repository))
        return SimpleNamespace(name="a push")

    monkeypatch.setattr(push, "submit", submit)
    monkeypatch.setenv("HF_TOKEN", "a token")
    return calls


def run_finetune(corpus, **parameters):
    return finetune("quickstart", str(corpus), LICENSE, smoke=True, return_state=True, **parameters)


def test_finetune_walks_the_plan_and_hands_training_and_evaluation_to_the_pool(
    client, prepared_root, corpus, handed
):
    state = run_finetune(corpus)

    assert [task.name for task in read_tasks(client, state, 6)] == [
        "preflight", "prepare-0", *RUN_STEPS,
    ]  # fmt: skip
    assert handed == ["train/default", "evaluate/default"]
    assert (state.type.value, state.name) == ("COMPLETED", "Completed")
    run = Run(data_root() / "runs" / state.result())
    assert (run.path / "card.md").is_file()
    assert not (data_root() / "models").exists()
    found = read_artifacts(client, state)
    assert set(found) == {"loss-curve", "scorecard", "cost-by-stage", "lineage", "model-card"}
    assert found["scorecard"]["description"].startswith("accepted: held-out loss 6.000 -> 4.000")
    assert "data:image/png;base64," in found["loss-curve"]["data"]
    costs = found["cost-by-stage"]["data"]
    steps = [line.split("|")[1].strip() for line in costs.split("\n")[2:]]
    assert steps == [*(stage.name for stage in STAGES), "train", "evaluate", "total"]
    assert "| 7,200.0 " in costs
    assert "price" not in costs


def test_a_second_finetune_reuses_the_trained_and_evaluated_run_and_says_so(
    client, prepared_root, corpus, handed
):
    first = run_finetune(corpus)
    del handed[:]

    second = run_finetune(corpus)

    assert handed == []
    assert second.result() == first.result()
    states = {task.name: task.state for task in read_tasks(client, second, 6)}
    assert (states["train"].name, states["evaluate"].name) == ("Cached", "Cached")
    assert states["train"].message == "trained before, 20 steps in 7200 s, training loss 4.500"
    description = read_artifacts(client, second)["cost-by-stage"]["description"]
    assert description.startswith("0 s of work, 7,2")


def test_force_sets_the_finished_run_aside_and_trains_again(prepared_root, corpus, handed):
    first = run_finetune(corpus)

    second = run_finetune(corpus, force=True)

    assert handed == ["train/default", "evaluate/default"] * 2
    assert second.result() == first.result()
    assert len(list((data_root() / "runs").glob(f"{first.result()}.replaced-*"))) == 1


def test_a_model_that_is_no_better_ends_rejected_and_is_kept_but_not_published(
    client, prepared_root, corpus, handed, asked
):
    handed.after = 5.8

    state = run_finetune(corpus, publish=True, push="me/model")

    assert (state.type.value, state.name) == ("COMPLETED", "Rejected")
    assert "rejected: held-out loss 6.000 -> 5.800" in state.message
    assert "needed 0.500" in state.message
    states = {task.name: task.state_name for task in read_tasks(client, state, 6)}
    assert states["gate"] == "Rejected"
    assert {"publish", "push"} & set(states) == set()
    assert asked == []
    assert Run(data_root() / "runs" / state.result()).model.is_dir()
    assert not (data_root() / "models").exists()


def test_an_accepted_model_is_published_and_offered_to_the_hub_when_asked(
    prepared_root, corpus, handed, asked
):
    state = run_finetune(corpus, publish=True, push="me/model")

    assert state.name == "Completed"
    assert asked == [("push/default", state.result(), "me/model")]
    assert (data_root() / "models" / "quickstart" / "model.safetensors").read_bytes() == b"weights"


def test_a_wrong_repository_stops_finetune_before_any_work(corpus, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a token")

    state = run_finetune(corpus, push="model")

    assert state.name == "Failed"
    assert state.message == "repository 'model': expected OWNER/NAME, e.g. my-org/my-model"


def test_without_a_worker_finetune_stops_in_preflight_and_says_what_to_do(client, corpus):
    state = run_finetune(corpus)

    assert state.name == "Failed"
    assert state.message.startswith("no worker is online in pool 'gpu': `starloom up`")
    assert not [text for text in read_messages(client, state) if "Traceback" in text]
