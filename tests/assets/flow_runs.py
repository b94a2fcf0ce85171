"""What flow tests read from the server, and a training and evaluation that take no time."""

import base64
import time

from prefect.client.schemas.filters import FlowRunFilter, LogFilter

from pipelines.evals.report import scorecard_text
from pipelines.evals.scorecard import scorecard_parts, verdict

LICENSE = {"sources.0.license": "PSF-2.0"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def read_tasks(client, state, expected):
    """Return the ended task runs of a flow run by start; the server records them a little later."""
    wanted = FlowRunFilter.model_validate({"id": {"any_": [state.state_details.flow_run_id]}})
    deadline = time.monotonic() + 30
    while True:
        found = client.read_task_runs(flow_run_filter=wanted)
        ended = [run for run in found if run.state and run.state.is_final() and run.start_time]
        if len(ended) >= expected or time.monotonic() > deadline:
            return sorted(ended, key=lambda run: run.start_time)
        time.sleep(0.2)


def read_artifacts(client, state):
    """Return {key: artifact} of a flow run."""
    body = {"artifacts": {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}}
    found = client.request("POST", "/artifacts/filter", json=body).json()
    return {artifact["key"]: artifact for artifact in found}


def read_messages(client, state):
    """Return the log messages of a flow run."""
    wanted = LogFilter.model_validate(
        {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}
    )
    return [log.message for log in client.read_logs(wanted)]


def finish_training(run):
    """Leave what a finished training leaves."""
    run.model.mkdir()
    (run.model / "model.safetensors").write_bytes(b"weights")
    (run.path / "loss.png").write_bytes(PIXEL)
    result = {
        "status": "finished",
        "global_step": 20,
        "max_steps": 20,
        "train_loss": 4.5,
        "eval": [],
        "seconds": 7200.0,
        "cpu_seconds": 14_400.0,
        "peak_rss": 500_000_000,
        "tokens_seen": 10_000,
        "parameters": 1000,
        "trainable_parameters": 1000,
        "world_size": 2,
    }
    run.write("training.json", result)


def finish_evaluation(run, after):
    """Leave what an evaluation leaves, with loss 6 before and `after` after training."""
    card = {
        "key_parts": scorecard_parts(run),
        "run": run.name,
        "step0": {"loss": 6.0, "perplexity": 403.0},
        "trained": {"loss": after, "perplexity": 90.0},
        "rows": 3,
        "tokens": 500,
        "improvement": None,
        "min_improvement": 0.5,
        "reload_check": {"status": "not made", "reason": "a test"},
        "device": "cpu",
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "peak_rss": 1_000_000,
    }
    decision = verdict(card)
    card |= {"accepted": decision.accepted, "reason": decision.reason}
    (run.path / "scorecard.md").write_text(scorecard_text(card))
    run.write("scorecard.json", card)
