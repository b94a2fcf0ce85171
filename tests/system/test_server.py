"""A real server with workers: deploy, train, cancel, kill, resume, stop. Some ten minutes."""

import json
import os
import random
import shutil
import signal
import time

import psutil
import pytest

from flows.services import POOLS, TOKEN
from tests.assets.live_server import TRAINING, LiveServer, _environ, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with both workers."""
    live = LiveServer(tmp_path_factory.mktemp("live"))
    live.command("starloom", "up")
    yield live
    live.command("starloom", "down")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, server):
    """Digests and losses of the same recipe, run alone without any server."""
    root = tmp_path_factory.mktemp("undisturbed")
    settings = [part for key, value in TRAINING.items() for part in ("--set", f"{key}={value}")]
    server.command("starloom", "run", "quickstart", "--smoke", *settings, STARLOOM_DATA=str(root))
    (run,) = (path.parent for path in root.glob("runs/*/run.json"))
    return outcome(run)


def outcome(run):
    """Return what must not depend on interruptions: dataset, losses, evaluation."""
    stages = json.loads((run / "run.json").read_text())["stages"]
    training = json.loads((run / "training.json").read_text())
    scorecard = json.loads((run / "scorecard.json").read_text())
    return {
        "dataset": stages["pack"]["digest"],
        "run": run.name,
        "steps": training["global_step"],
        "train_loss": training["train_loss"],
        "eval": [(point["step"], point["loss"]) for point in training["eval"]],
        "test_loss": scorecard["trained"]["loss"],
    }


def training_began(server):
    """Wait until a rank trains and the first checkpoint is complete; return the ranks."""
    wait_until(
        lambda: server.ranks() and list(server.root.glob("runs/*/checkpoints/*/complete.json"))
    )
    time.sleep(random.uniform(0, 2))
    return server.ranks()


def finish_again(server, undisturbed):
    """Give the same command again; everything is as in an undisturbed run."""
    state = server.wait(server.finetune())

    assert state.is_completed(), state.message
    (run,) = server.runs()
    assert outcome(run) == undisturbed


def test_up_again_changes_nothing_and_status_fits_one_screen(server):
    before = server.services()

    again = server.command("starloom", "up")
    shown = server.command("starloom", "status")

    assert server.services() == before
    assert set(before) == {"server", *(f"worker-{pool}" for pool in POOLS)}
    assert "started" not in again
    assert "deployments, unchanged" in again
    assert len(shown.splitlines()) <= 24
    assert f"http://127.0.0.1:{server.port}" in shown


def test_a_cron_deployment_gets_a_scheduled_run(server):
    scheduled = wait_until(lambda: server.child("maintain/nightly", ["SCHEDULED"]), 150)

    assert scheduled.auto_scheduled
    assert scheduled.expected_start_time.hour == 2


def test_deploy_all_by_hand_works_and_what_is_not_in_the_file_is_removed(server):
    server.command("prefect", "--no-prompt", "deploy", "--all")
    with server.client() as client:
        maintain = client.read_deployment_by_name("maintain/nightly")
        entry = {"entrypoint": maintain.entrypoint, "pull_steps": maintain.pull_steps}
        client.create_deployment(maintain.flow_id, name="forgotten", **entry)
        client.create_deployment(maintain.flow_id, name="of-somebody-else")

    said = server.command("starloom", "up")

    assert "removed maintain/forgotten" in said
    with server.client() as client:
        names = {deployment.name for deployment in client.read_deployments()}
    assert "forgotten" not in names
    assert "of-somebody-else" in names


def test_finetune_trains_on_the_pool_and_a_second_one_reuses_everything(server, undisturbed):
    first = server.wait(server.finetune())
    assert first.is_completed(), first.message
    (run,) = server.runs()
    assert outcome(run) == undisturbed
    trained = (run / "training.json").read_bytes()

    second = server.wait(server.finetune())

    assert second.is_completed(), second.message
    assert (run / "training.json").read_bytes() == trained
    assert server.child("train/default", ["COMPLETED"]).idempotency_key.endswith(":1")


def test_cancelling_train_leaves_no_rank_a_checkpoint_and_resumes(server, undisturbed):
    parent = server.finetune(force=True)
    training_began(server)
    child = server.child("train/default")

    server.command("prefect", "flow-run", "cancel", str(child.id))
    wait_until(lambda: not server.ranks(), 30)

    assert server.wait(child.id).is_cancelled()
    assert server.wait(parent).is_cancelled()
    assert list(server.root.glob("runs/*/checkpoints/*/complete.json"))
    finish_again(server, undisturbed)


def test_cancelling_finetune_cancels_the_training_too(server, undisturbed):
    parent = server.finetune(force=True)
    training_began(server)
    child = server.child("train/default")

    server.command("prefect", "flow-run", "cancel", str(parent))
    wait_until(lambda: not server.ranks(), 60)

    assert server.wait(parent).is_cancelled()
    assert server.wait(child.id).is_cancelled()
    finish_again(server, undisturbed)


def test_a_killed_rank_or_training_flow_is_taken_up_again_by_itself(server, undisturbed):
    parent = server.finetune(force=True)
    random.choice(training_began(server)).send_signal(signal.SIGKILL)
    wait_until(lambda: len(server.ranks()) >= 2)
    for engine in server.engines(server.child("train/default").id):
        engine.send_signal(signal.SIGKILL)

    state = server.wait(parent)

    assert state.is_completed(), state.message
    (run,) = server.runs()
    assert outcome(run) == undisturbed


def test_a_killed_finetune_is_resumed_by_the_same_command(server, undisturbed):
    parent = server.finetune(force=True)
    training_began(server)
    for engine in server.engines(parent):
        engine.send_signal(signal.SIGKILL)
    assert server.wait(parent).is_crashed()

    finish_again(server, undisturbed)


def test_killed_workers_are_replaced_by_up_and_the_run_goes_on(server, undisturbed):
    parent = server.finetune(force=True)
    training_began(server)
    before = server.services()
    for name in ("worker-gpu", "worker-cpu"):
        os.kill(before[name], signal.SIGKILL)

    said = server.command("starloom", "up")
    state = server.wait(parent)

    assert said.count("(started)") == 2
    assert server.services()["server"] == before["server"]
    assert state.is_completed(), state.message
    (run,) = server.runs()
    assert outcome(run) == undisturbed


def test_a_finetune_killed_while_it_prepares_builds_the_same_dataset(server, undisturbed):
    shutil.rmtree(server.root / "store")
    parent = server.finetune(force=True)
    wait_until(lambda: list(server.root.glob("store/format/.building-*/*")), every=0.05)
    for engine in server.engines(parent):
        engine.send_signal(signal.SIGKILL)
    assert server.wait(parent).is_crashed()

    finish_again(server, undisturbed)


def test_down_during_training_stops_everything_and_up_goes_on(server, undisturbed):
    server.finetune(force=True)
    training_began(server)
    token = json.loads((server.root / "state" / "services.json").read_text())["token"]

    server.command("starloom", "down")

    assert server.ranks() == []
    assert [p for p in psutil.process_iter() if _environ(p).get(TOKEN) == token] == []
    server.command("starloom", "up")
    finish_again(server, undisturbed)
