"""Killed at random steps, training goes on as if nothing had happened, in every layout."""

import os
import random
import signal

import pytest

from pipelines.errors import TrainingError
from pipelines.jsonlines import read_lines
from pipelines.store import Store
from pipelines.training.checkpoints import complete_checkpoints, newest_checkpoint, step_of
from pipelines.training.collate import PackedDataset
from pipelines.training.launch import launch
from pipelines.training.loss import evaluate_loss
from pipelines.training.models import build_model, load_trained
from tests.assets.tiny_models import NEW_TOKENS, write_base_model
from tests.assets.training_runs import make_recipe, make_run, write_tokenizer
from tests.system.test_training import LARGER, LORA, last_step, outcome, processes_of, ranks_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

ONE, TWO = {"processes_per_node": 1}, {"processes_per_node": 2}
LAYOUTS = {
    "single": {"strategy": "ddp", **ONE},
    "ddp": {"strategy": "ddp", **TWO},
    "zero2": {"strategy": "zero2", **TWO},
    "zero3": {"strategy": "zero3", **TWO},
    "ddp-lora": {"strategy": "ddp", **TWO},
    "zero3-lora": {"strategy": "zero3", **TWO},
    # DeepSpeed gathers the head for PEFT, which trains some of its rows, and for the loss.
    "zero3-lora-untied": {"strategy": "zero3", **TWO, "new_tokens": NEW_TOKENS},
}
ROWS, EPOCHS, ROWS_PER_STEP = 40, 2, 4
STEPS = ROWS * EPOCHS // ROWS_PER_STEP


def recipe_of(root, layout="ddp", **changes):
    """Two epochs of ten steps with dropout; every step's loss and gradient norm is written."""
    values = {
        "model__config": LARGER,
        "model__dropout": 0.1,
        "training__max_steps": -1,
        "training__num_train_epochs": EPOCHS,
        "training__per_device_train_batch_size": 4 if layout == "single" else 2,
        "training__logging_steps": 1,
        "training__eval_steps": 10,
        "training__save_steps": 3,
    }
    if "lora" in layout:
        base = root / "base"
        untied = layout.endswith("untied")
        if not base.exists() and untied:
            write_base_model(base, "llama")
        elif not base.exists():
            write_tokenizer(base)
            build_model(make_recipe(**values), base).save_pretrained(base)
        del values["model__config"], values["model__dropout"]
        values["model"] = {
            "model_name_or_path": str(base), "dtype": "float32", "dropout": 0.1
        }  # fmt: skip
        values["adapter"] = LORA | {"lora_dropout": 0.1}
        if untied:
            values["adapter"]["target_modules"] = "all-linear"
            values["model"]["dropout"] = 0.0  # Llama has none
    return make_recipe(**values | changes)


class KillAt:
    """A should_stop that never asks to stop, but kills one rank with SIGKILL at each step given.

    Each attempt gets as far as a checkpoint of its own, or the launcher would give up.
    """

    def __init__(self, run, steps, rng):
        self.run, self.left, self.rng = run, sorted(steps), rng
        self.killed, self.reached = [], -1

    def __call__(self):
        if self.left and last_step(self.run) >= self.left[0]:
            newest = newest_checkpoint(self.run.checkpoints)
            if newest is not None and step_of(newest) > self.reached:
                self.rng.choice(sorted(ranks_of(self.run), key=lambda p: p.pid)).kill()
                self.killed.append(self.left.pop(0))
                self.reached = last_step(self.run)
        return False


def train(root, recipe, kill=(), rng=None, **hardware):
    run, store = make_run(root, recipe, **hardware)
    killer = KillAt(run, kill, rng)
    launch(run, store, should_stop=killer, poll_seconds=0.01)
    assert len(killer.killed) == len(kill)
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kills_in_both_epochs_change_no_loss_no_norm_and_no_weight(layout, tmp_path):
    rng = random.Random(f"kills of {layout}")
    kills = [rng.randrange(4, 9), rng.randrange(11, 17)]  # in the first epoch, in the second

    whole = train(tmp_path / "whole", recipe_of(tmp_path, layout), **LAYOUTS[layout])
    killed = train(tmp_path / "killed", recipe_of(tmp_path, layout), kills, rng, **LAYOUTS[layout])

    steps = [line for line in read_lines(whole.path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert len({line["loss"] for line in steps}) == len({line["grad_norm"] for line in steps}) == 20
    assert outcome(killed) == outcome(whole), f"killed at {kills}"
    assert processes_of(killed) == []
    assert all(line["mfu"] is None and line["data_wait_share"] < 1 for line in steps)


def test_ddp_goes_on_with_another_number_of_processes_and_the_same_losses(tmp_path):
    whole = train(tmp_path / "whole", recipe_of(tmp_path, model__dropout=0), **LAYOUTS["ddp"])
    source = stop_at(tmp_path / "two", recipe_of(tmp_path, model__dropout=0), 12, **LAYOUTS["ddp"])
    four = recipe_of(
        tmp_path, "single", model__dropout=0, training__resume_from_checkpoint=str(source.path)
    )

    resumed = train(tmp_path / "one", four, **LAYOUTS["single"])

    def losses(run):
        lines = read_lines(run.path / "metrics.jsonl")
        return [x.get("loss", x.get("eval_loss")) for x in lines]

    assert losses(resumed) == pytest.approx(losses(whole), abs=2e-5)
    assert resumed.read("training.json")["world_size"] == 1
    tokens = [r.read("training.json")["tokens_seen"] for r in (resumed, whole)]
    assert tokens[0] == tokens[1]


def stop_at(root, recipe, step, **hardware):
    """Return an interrupted run with a checkpoint."""
    run, store = make_run(root, recipe, **hardware)
    with pytest.raises(TrainingError, match="start it again to resume"):
        launch(run, store, should_stop=lambda: last_step(run) >= step, poll_seconds=0.01)
    return run


def test_zero_on_another_number_of_processes_is_refused_with_the_way_out(tmp_path):
    run = stop_at(tmp_path, recipe_of(tmp_path), 4, **LAYOUTS["zero2"])
    checkpoint = newest_checkpoint(run.checkpoints)
    info = run.info()
    info["key_parts"]["hardware"]["processes_per_node"] = 1
    run.write("run.json", info)
    _, store = make_run(tmp_path / "other", recipe_of(tmp_path))

    with pytest.raises(TrainingError) as error:
        launch(run, store)

    text = str(error.value)
    assert f"{checkpoint} was made by zero2 on 2 process(es), now it is zero2 on 1" in text
    assert "Resume on 2 process(es) with zero2" in text
    assert f"model.model_name_or_path={checkpoint}" in text
    assert complete_checkpoints(run.checkpoints)[-1] == checkpoint


def test_the_best_checkpoint_stays_and_gives_the_model_its_weights(tmp_path):
    # A learning rate that rises far too high: validation is best at the start.
    recipe = recipe_of(
        tmp_path,
        model__dropout=0,
        training__learning_rate=0.5,
        training__lr_scheduler_type="constant_with_warmup",
        training__warmup_steps=18,
        training__eval_steps=2,
        training__save_steps=2,
        training__load_best_model_at_end=True,
    )
    runs = [
        train(tmp_path / "whole", recipe, **LAYOUTS["zero3"]),
        train(tmp_path / "killed", recipe, [13], random.Random(1), **LAYOUTS["zero3"]),
    ]

    assert outcome(runs[1]) == outcome(runs[0])
    result = runs[0].read("training.json")
    losses = {entry["step"]: entry["loss"] for entry in result["eval"] if entry["step"]}
    best = min(losses, key=losses.get)
    assert best < 17, "the test needs a run that gets worse"
    assert result["model_step"] == best
    kept = [step_of(c) for c in complete_checkpoints(runs[0].checkpoints)]
    assert kept == [best, 18, 20]
    assert evaluated(runs[0], tmp_path) == pytest.approx(losses[best], abs=1e-5)


def evaluated(run, root):
    """The validation loss of the model on disk."""
    pack = Store(root / "whole" / "store").path(run.refs()["pack"])
    return evaluate_loss(load_trained(run.model), PackedDataset(pack, "validation"), 4, "cpu").loss


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"training__max_train_tokens": 700}, "max_train_tokens"),
        ({"training__max_hours": 1e-6}, "max_hours"),
        (
            {
                "training__early_stopping_patience": 1,
                "training__early_stopping_threshold": 50.0,
                "training__eval_steps": 4,
            },
            "early_stopping",
        ),
    ],
)
def test_a_limit_ends_training_with_a_finished_model(limit, reason, tmp_path):
    run = train(tmp_path, recipe_of(tmp_path, "single", **limit), **LAYOUTS["single"])

    result = run.read("training.json")
    assert run.trained
    assert (result["status"], result["stopped_by"]) == ("finished", reason)
    assert 0 < result["global_step"] < STEPS
    assert result["model_step"] == result["global_step"]
    assert result["eval"][-1]["step"] == result["global_step"]
    assert last_step(run) == result["global_step"]
    assert step_of(newest_checkpoint(run.checkpoints)) == result["global_step"]

    # Killed after that checkpoint, it goes on to its end and trains no step more.
    before = outcome(run)
    (run.path / "training.json").unlink()
    run.model.rename(tmp_path / "gone")
    _, store = make_run(tmp_path / "other", recipe_of(tmp_path))
    launch(run, store)
    assert outcome(run) == before


def test_a_rank_that_hangs_is_ended_with_the_reason_and_the_place(tmp_path):
    changes = {"training__stall_minutes": 0.15, "training__max_steps": 400}
    run, store = make_run(tmp_path, recipe_of(tmp_path, **changes), **LAYOUTS["ddp"])
    frozen = []

    def freeze():
        if not frozen and last_step(run) >= 5:
            rank = min(ranks_of(run), key=lambda p: p.pid)
            rank.send_signal(signal.SIGSTOP)
            frozen.append(rank)
        return False

    with pytest.raises(TrainingError, match=r"made no progress for 0\.15 minutes") as error:
        launch(run, store, should_stop=freeze, poll_seconds=0.01)

    assert "training.stall_minutes" in str(error.value)
    assert "while in step" in str(error.value)
    assert "Thread 0x" in (run.path / "train.log").read_text()
    assert processes_of(run) == []
    assert newest_checkpoint(run.checkpoints) is not None


FAKE_TENSORBOARD = """
import json, os

class SummaryWriter:
    def __init__(self, log_dir):
        os.makedirs(log_dir, exist_ok=True)
        self.path = os.path.join(log_dir, "scalars.jsonl")
    def add_text(self, *arguments):
        pass
    def add_scalar(self, name, value, step):
        with open(self.path, "a") as file:
            file.write(json.dumps({"name": name, "value": value, "step": step}) + "\\n")
    def flush(self):
        pass
    close = flush
"""


def test_a_reporter_gets_every_line_of_the_metrics_exactly_once(tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "tensorboardX.py").write_text(FAKE_TENSORBOARD)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("PYTHONPATH", f"{modules}:{os.environ.get('PYTHONPATH', '')}")
    recipe = recipe_of(
        tmp_path, training__report_to="tensorboard", training__logging_steps=3,
        training__max_steps=8, training__eval_steps=4,
    )  # fmt: skip

    run = train(tmp_path, recipe, **LAYOUTS["ddp"])

    scalars = read_lines(run.path / "tensorboard" / "scalars.jsonl")
    metrics = read_lines(run.path / "metrics.jsonl")
    for name, key in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/tokens", "tokens"),
    ):
        reported = [(x["step"], x["value"]) for x in scalars if x["name"] == name]
        assert reported == [(line["step"], line[key]) for line in metrics if key in line]
    assert {x["step"] for x in scalars} == {0, 3, 4, 6, 8}
    assert not any(x["name"] in ("train/mfu", "train/step") for x in scalars)
