"""Spikes, hangs, budgets and early stopping: when a run ends before its last step, and how."""

import json
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from pipelines.errors import TrainingError
from pipelines.settings.training import OWN_KEYS, Training
from pipelines.training.budgets import Limits
from pipelines.training.callbacks import Meter, StepAgreement
from pipelines.training.progress import Progress, StepCounts
from pipelines.training.watchdog import STALLED, check_spike


def watch(losses, threshold=2.0, patience=3, progress=None):
    """Feed losses to the spike watch from step 1; return its progress."""
    progress = progress or Progress()
    for step, loss in enumerate(losses, 1):
        check_spike(progress, step, loss, threshold, patience)
    return progress


def test_three_high_losses_in_a_row_stop_training_and_name_their_steps():
    with pytest.raises(TrainingError) as error:
        watch([3.0] * 20 + [9.0, 6.5, 7.25])

    text = str(error.value)
    assert "leapt up at steps 21, 22, 23: 9.000, 6.500, 7.250" in text
    assert "training.loss_spike_threshold 2 x the median 3.000" in text
    assert "the last checkpoint from before is kept. Lower training.learning_rate" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("losses", "threshold"),
    [
        ([3.0] * 20 + [9.0, 9.0, 3.0, 9.0, 9.0, 3.0], 2.0),  # never three in a row
        ([3.0] * 20 + [5.9] * 9, 2.0),  # high, but below the factor
        ([9.0] * 5 + [1.0] * 3 + [9.0] * 9, 2.0),  # too early to judge
        ([3.0] * 20 + [900.0] * 9, None),  # off
    ],
)
def test_single_spikes_early_losses_and_an_absent_threshold_stop_nothing(losses, threshold):
    watch(losses, threshold)


def test_high_losses_do_not_raise_the_median_and_a_resumed_watch_decides_alike():
    losses = [3.0] * 150 + [9.0, 9.0]
    whole = watch(losses)
    assert (len(whole.losses), set(whole.losses)) == (100, {3.0})
    assert whole.high == [(151, 9.0), (152, 9.0)]

    resumed = Progress(**json.loads(json.dumps(asdict(watch(losses[:151])))))
    check_spike(resumed, 152, 9.0, 2.0, 3)
    with pytest.raises(TrainingError, match="steps 151, 152, 153"):
        check_spike(resumed, 153, 9.0, 2.0, 3)


STALL = """
import sys, threading, time
from pipelines.training.watchdog import Heartbeat

heartbeat = Heartbeat(float(sys.argv[1]), 3, lambda text: print("REPORT", text, flush=True))
with heartbeat.watching():
    for _ in range(6):
        heartbeat.beat("in step 7")
        time.sleep(0.1)
    print("worked", flush=True)
    if sys.argv[2] == "hang":
        threading.Event().wait(60)
print("ended", flush=True)
"""


@pytest.mark.parametrize("end", ["hang", "end"])
def test_a_rank_that_hangs_ends_itself_and_says_where_it_was(end):
    done = subprocess.run(
        [sys.executable, "-c", STALL, "0.4", end], capture_output=True, text=True, check=False
    )

    if end == "end":
        assert (done.returncode, done.stdout.split()) == (0, ["worked", "ended"])
        return
    assert done.returncode == STALLED
    assert done.stdout.startswith("worked\nREPORT rank 3 made no progress for 0.00666667 minutes")
    assert "(training.stall_minutes) while in step 7" in done.stdout
    assert 'File "<string>", line 12 in <module>' in done.stderr  # the stack that hangs


def test_budgets_end_training_at_their_limit_and_time_before_a_resume_counts():
    limits = Limits(max_hours=2.0, max_train_tokens=1000)

    assert limits.after_step(Progress(tokens=999), 7199.0) is None
    assert limits.after_step(Progress(tokens=1000), 0.0) == "max_train_tokens"
    assert limits.after_step(Progress(tokens=1), 7200.0) == "max_hours"
    assert Limits().after_step(Progress(tokens=10**12), 1e9) is None
    meter = Meter(None, 1)
    meter.start(4, {"seconds": 7190.0})
    assert 7190.0 <= meter.seconds() < 7199.0


def test_early_stopping_counts_as_that_of_transformers():
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    losses = [5.0, 4.0, 3.95, 3.97, 3.0, 2.95, 2.91, 2.9, 1.0]
    limits = Limits(early_stopping_patience=3, early_stopping_threshold=0.1)
    progress = Progress()
    ours = [limits.after_evaluation(progress, loss) is not None for loss in losses]

    theirs, callback = [], EarlyStoppingCallback(3, 0.1)
    arguments = TrainingArguments(metric_for_best_model="eval_loss", greater_is_better=False)
    state, control = TrainerState(), TrainerControl()
    for loss in losses:
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        state.best_metric = min(loss, state.best_metric or loss)
        theirs.append(control.should_training_stop)
        control.should_training_stop = False

    assert ours == theirs
    assert ours.index(True) == 7
    assert progress.best_eval_loss == 1.0


def agreement(limits, **progress):
    """Return (callback, meter, control) of a rank after a step."""
    meter = Meter(None, 4)
    meter.start(1, progress)
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=False)
    return StepAgreement(meter, torch.device("cpu"), limits), meter, control


def test_a_used_up_budget_asks_for_an_evaluation_a_checkpoint_and_the_end():
    callback, meter, control = agreement(Limits(max_train_tokens=100), tokens=90)
    meter.local.tokens = 10

    callback.on_step_end(None, SimpleNamespace(global_step=3, max_steps=9), control)

    assert meter.progress.stopped_by == "max_train_tokens"
    assert (control.should_save, control.should_training_stop, control.should_evaluate) == (
        True,
    ) * 3


def test_a_budget_that_ends_with_the_last_step_is_not_what_stopped_training():
    callback, meter, control = agreement(Limits(max_train_tokens=100), tokens=100)

    callback.on_step_end(None, SimpleNamespace(global_step=9, max_steps=9), control)

    assert meter.progress.stopped_by is None
    assert control.should_evaluate


def test_early_stopping_writes_the_open_window_and_asks_for_the_end(tmp_path):
    callback, meter, control = agreement(Limits(early_stopping_patience=1), best_eval_loss=2.0)
    meter.path = tmp_path / "metrics.jsonl"
    meter.finish_step(StepCounts(10))
    meter.trained(2, 9, {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.1})
    state = SimpleNamespace(global_step=2, max_steps=9)

    callback.on_evaluate(None, state, control, metrics={"eval_loss": 2.5})

    assert (control.should_save, control.should_training_stop) == (True, True)
    assert meter.progress.stopped_by == "early_stopping"
    (line,) = map(json.loads, meter.path.read_text().splitlines())
    assert (line["step"], line["loss"]) == (2, 3.0)


def test_the_last_line_is_written_where_a_budget_ends_training_within_a_window(tmp_path):
    meter = Meter(tmp_path / "metrics.jsonl", logging_steps=5)
    meter.finish_step(StepCounts(10))
    meter.progress.stopped_by = "max_hours"

    line = meter.trained(2, 9, {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.1})

    assert json.loads(meter.path.read_text()) == line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load_best_model_at_end": True, "save_steps": 50, "eval_steps": 40}, "multiple of"),
        ({"loss_spike_threshold": 1.0}, "greater than 1"),
        ({"stall_minutes": 0}, "greater than 0"),
        ({"max_hours": float("inf")}, "finite"),
        ({"max_train_tokens": 0}, "greater than or equal to 1"),
        ({"early_stopping_patience": 0}, "greater than or equal to 1"),
        ({"report_to": ["wandb", "excel"]}, "'wandb', 'tensorboard', 'mlflow' or 'trackio'"),
    ],
)
def test_limits_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        Training(**values)


def test_the_keys_of_our_own_loop_exist_and_the_watches_are_off_or_generous():
    assert set(Training.model_fields) >= OWN_KEYS
    training = Training()
    assert (training.loss_spike_threshold, training.stall_minutes) == (None, 30.0)
    assert Limits.of(training) == Limits()
