"""Checkpoints count only when they are complete, and the last good one always stays."""

import errno
import json
import os
import re

import pytest

from pipelines.errors import DiskFull, TrainingError
from pipelines.jsonlines import read_lines
from pipelines.manifest import digest_of
from pipelines.runs import Run
from pipelines.settings.hardware import Hardware
from pipelines.settings.training import Training
from pipelines.training import checkpoints
from pipelines.training.adopt import adopt_checkpoint
from pipelines.training.checkpoints import (
    Layout,
    best_checkpoint,
    check_layout,
    checkpoint_folder,
    commit,
    complete_checkpoints,
    newest_checkpoint,
    problem,
    read_progress,
    remove_incomplete,
    rotate,
)
from pipelines.training.environment import hardware_of
from tests.assets.training_runs import make_recipe, make_run


def write(root, step, *, complete=True):
    folder = checkpoint_folder(root, step)
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * step)
    (folder / f"global_step{step}" / "rank_1.pt").write_bytes(b"o" * 10)
    if complete:
        commit(folder, {"tokens": step * 100})
    return folder


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_the_newest_complete_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    for step in (5, 100, 20):
        write(tmp_path, step)
    write(tmp_path, 105, complete=False)
    (tmp_path / "checkpoint-x").mkdir()

    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert read_progress(tmp_path / "checkpoint-100") == {"tokens": 10_000}
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_a_complete_checkpoint_lists_every_file_with_its_size(tmp_path):
    folder = write(tmp_path, 7)

    assert json.loads((folder / "complete.json").read_text()) == {
        "step": 7,
        "files": {
            "global_step7/rank_1.pt": 10,
            "model.safetensors": 7,
            "progress.json": (folder / "progress.json").stat().st_size,
        },
    }
    assert problem(folder) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "global_step7" / "rank_1.pt").unlink(), "rank_1.pt is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "has 0 bytes, expected 7"),
        (lambda f: (f / "complete.json").write_text("{"), "no complete.json"),
        (lambda f: (f / "complete.json").write_text("[]"), "no complete.json"),
        (lambda f: (f / "complete.json").unlink(), "no complete.json"),
        (lambda f: (f / "complete.json").write_text('{"step": 3, "files": {}}'), "of step 3"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_removed_by_name(tmp_path, damage, reason, caplog):
    write(tmp_path, 5)
    folder = write(tmp_path, 7)
    damage(folder)

    assert reason in (problem(folder) or "")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert remove_incomplete(tmp_path) == ["checkpoint-7"]
    assert "checkpoint-7 is incomplete" in caplog.text
    assert names(tmp_path) == ["checkpoint-5"]


def test_rotation_keeps_the_newest_complete_ones_and_leaves_incomplete_ones_alone(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    write(tmp_path, 25, complete=False)

    rotate(tmp_path, 2)

    assert [c.name for c in complete_checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-20"]
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-20", "checkpoint-25"]


def test_a_kill_between_any_two_steps_of_a_commit_leaves_the_last_good_one(tmp_path, monkeypatch):
    write(tmp_path, 5)
    calls = {"fsync": os.fsync, "replace": None}
    kills = 0
    for survived in range(30):
        folder = write(tmp_path, 10, complete=False)
        left = survived

        def fsync(fd):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            calls["fsync"](fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                commit(folder, {})
                finished = True
            except KeyboardInterrupt:
                finished = False
        kills += not finished
        counts = newest_checkpoint(tmp_path)
        assert counts in (tmp_path / "checkpoint-5", folder)
        if finished:
            assert counts == folder
            break
        assert problem(folder) is None or remove_incomplete(tmp_path) == ["checkpoint-10"]
        if folder.exists():
            checkpoints._remove(folder)
    assert finished
    assert kills > 5


def test_a_kill_while_removing_leaves_nothing_that_seems_to_count(tmp_path, monkeypatch):
    folder = write(tmp_path, 5)
    write(tmp_path, 10)
    monkeypatch.setattr("shutil.rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))

    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)

    assert folder.exists()
    assert problem(folder) == "no complete.json"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")]
)
def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch, error):
    from pipelines.training.checkpoints import raise_disk_full

    free = 2**30 if isinstance(error, OSError) else 4096
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": free})())
    with pytest.raises(DiskFull, match="last complete checkpoint is kept"):
        raise_disk_full(tmp_path / "checkpoint-5", error)

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 2**40})())
    raise_disk_full(tmp_path / "checkpoint-5", RuntimeError("connection closed by peer"))


def with_loss(root, step, eval_step, loss):
    folder = write(root, step, complete=False)
    commit(folder, {"eval_step": eval_step, "eval_loss": loss})
    return folder


def test_the_best_checkpoint_is_the_one_evaluated_at_its_own_step_with_the_lowest_loss(tmp_path):
    assert best_checkpoint(tmp_path) is None
    write(tmp_path, 2)  # never evaluated
    with_loss(tmp_path, 4, 4, 3.0)
    with_loss(tmp_path, 6, 4, 1.0)  # evaluated before it was trained on
    with_loss(tmp_path, 8, 8, 2.0)
    with_loss(tmp_path, 10, 10, 2.0)

    assert best_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_rotation_never_removes_the_best_one(tmp_path):
    for step, loss in ((2, 5.0), (4, 1.0), (6, 2.0), (8, 3.0), (10, 4.0)):
        with_loss(tmp_path, step, step, loss)
        rotate(tmp_path, 2, keep_best=True)

    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]


def placed(root, strategy, world_size, rows):
    folder = write(root, 5, complete=False)
    (folder / "config.json").write_text("{}")
    commit(folder, {}, Layout(strategy, world_size, rows))
    return folder


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (("zero2", 2, 8), ("zero2", 2, 8)),
        (("ddp", 2, 8), ("ddp", 4, 8)),
        (("ddp", 8, 64), ("ddp", 1, 64)),
    ],
)
def test_the_same_layout_or_ddp_with_as_many_rows_a_step_goes_on(before, now, tmp_path):
    check_layout(placed(tmp_path, *before), Layout(*now))


@pytest.mark.parametrize(
    ("before", "now", "texts"),
    [
        (
            ("zero3", 4, 8),
            ("zero3", 2, 8),
            ["made by zero3 on 4 process(es), now it is zero3 on 2", "Resume on 4 process(es)"],
        ),
        (("zero2", 2, 8), ("ddp", 2, 8), ["now it is ddp on 2", "with zero2"]),
        (
            ("ddp", 2, 8),
            ("ddp", 4, 16),
            ["with 8 rows a step, now it is 4 process(es) with 16", "schedule", "to 8"],
        ),
    ],
)
def test_another_layout_is_refused_with_the_way_out(before, now, texts, tmp_path):
    folder = placed(tmp_path / "runs" / "one" / "checkpoints", *before)
    stages = {"tokenizer": {"folder": "tokenizer/0123"}}
    (folder.parents[1] / "run.json").write_text(json.dumps({"stages": stages}))
    weights = (
        f"begin anew from its weights: model.model_name_or_path={folder} and "
        f"tokenizer.name_or_path={folder.parents[3] / 'store' / 'tokenizer' / '0123'}"
    )

    with pytest.raises(TrainingError) as error:
        check_layout(folder, Layout(*now))

    assert all(text in str(error.value) for text in [str(folder), *texts, weights])
    (folder / "config.json").unlink()  # an adapter alone is no model
    with pytest.raises(TrainingError, match="resume_from_checkpoint=false"):
        check_layout(folder, Layout(*now))


def test_a_layout_counts_all_rows_of_a_step():
    training = Training(per_device_train_batch_size=3, gradient_accumulation_steps=4)
    hardware = Hardware(device="cuda", num_nodes=2, processes_per_node=8, strategy="zero3")

    assert Layout.of(training, hardware) == Layout("zero3", 16, 192)


def interrupted(root, recipe, step=5, **hardware):
    """Return a run with one checkpoint and the metrics up to a step beyond it."""
    run, _ = make_run(root, recipe, **hardware)
    folder = checkpoint_folder(run.checkpoints, step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    progress = {"tokens": 70, "stopped_by": "max_hours", "evaluations_without_gain": 2}
    commit(folder, progress, Layout.of(recipe.training, hardware_of(run)))
    lines = [{"step": 0, "eval_loss": 5.0}, {"step": 5, "loss": 4.0}, {"step": 6, "loss": 3.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.path / "metrics.jsonl").write_text(text)
    return run


ON_ONE = {"strategy": "ddp", "processes_per_node": 1}
ON_TWO = {"strategy": "ddp", "processes_per_node": 2}
FOUR_ROWS = {"training__per_device_train_batch_size": 4}


def test_a_checkpoint_of_another_run_is_adopted_whole_and_its_limits_judged_again(tmp_path):
    old = interrupted(tmp_path, make_recipe(), **ON_TWO)
    for named in (old.name, str(old.path), str(old.checkpoints / "checkpoint-5")):
        changes = {"training__resume_from_checkpoint": named, "training__max_hours": 3}
        run, _ = make_run(tmp_path, make_recipe(**FOUR_ROWS, **changes), **ON_ONE)

        adopt_checkpoint(run)

        adopted = newest_checkpoint(run.checkpoints)
        assert adopted == run.checkpoints / "checkpoint-5"
        assert (adopted / "model.safetensors").read_bytes() == b"weights"
        assert read_progress(adopted) == {
            "tokens": 70, "stopped_by": None, "evaluations_without_gain": 0,
        }  # fmt: skip
        assert [line["step"] for line in read_lines(run.path / "metrics.jsonl")] == [0, 5]
        assert read_progress(old.checkpoints / "checkpoint-5")["stopped_by"] == "max_hours"

    (run.path / "metrics.jsonl").unlink()
    adopt_checkpoint(run)  # a run with a checkpoint of its own keeps it
    assert not (run.path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training__learning_rate": 1e-5, "training__seed": 7},
            "another training.learning_rate",
        ),
        ({"model__dropout": 0.1}, "is of a run with another model;"),
        ({"training__per_device_train_batch_size": 2}, "4 rows a step, now it is 1"),
    ],
)
def test_a_checkpoint_of_another_training_is_not_adopted(changes, message, tmp_path):
    old = interrupted(tmp_path, make_recipe(), **ON_TWO)
    changes = FOUR_ROWS | {"training__resume_from_checkpoint": old.name} | changes
    run, _ = make_run(tmp_path, make_recipe(**changes), **ON_ONE)

    with pytest.raises(TrainingError, match=re.escape(message)):
        adopt_checkpoint(run)

    assert newest_checkpoint(run.checkpoints) is None


def test_a_name_without_a_complete_checkpoint_is_refused_with_the_reason(tmp_path):
    old = interrupted(tmp_path, make_recipe(), **ON_TWO)
    (old.checkpoints / "checkpoint-5" / "complete.json").unlink()
    for named, message in (
        (old.name, "is no complete checkpoint"),
        (str(old.checkpoints / "checkpoint-5"), "checkpoint-5: no complete.json"),
        ("nothing", "'nothing' is no complete checkpoint"),
    ):
        recipe = make_recipe(**FOUR_ROWS, training__resume_from_checkpoint=named)
        run, _ = make_run(tmp_path, recipe, **ON_ONE)
        with pytest.raises(TrainingError, match=message):
            adopt_checkpoint(run)


def test_an_unfinished_run_on_other_hardware_is_not_silently_forgotten(tmp_path):
    old = interrupted(tmp_path, make_recipe(), **ON_TWO)

    unequal, _ = make_run(tmp_path / "a", make_recipe(training__logging_steps=3), **ON_ONE)
    adopt_checkpoint(unequal)  # no run beside it
    run = beside(old, make_recipe(**FOUR_ROWS), **ON_ONE)
    with pytest.raises(TrainingError) as error:
        adopt_checkpoint(run)
    assert str(error.value) == (
        f"run {old.name} of the same training on other hardware stopped at step 5. To go on from "
        f"it, set training.resume_from_checkpoint={old.name}; to begin anew, set it to false"
    )
    with pytest.raises(TrainingError, match="now it is zero2 on 1: the optimizer's shards"):
        adopt_checkpoint(beside(old, make_recipe(), strategy="zero2", processes_per_node=1))
    anew = make_recipe(**FOUR_ROWS, training__resume_from_checkpoint=False)
    adopt_checkpoint(beside(old, anew, **ON_ONE))
    adopt_checkpoint(beside(old, make_recipe(training__seed=1), **ON_ONE))  # another training


def beside(run, recipe, **hardware):
    """Return a run of another key in the same folder of runs."""
    made, _ = make_run(run.path.parents[1] / "elsewhere", recipe, **hardware)
    target = run.path.with_name(f"beside-{digest_of(made.info())[:12]}")
    return Run(made.path.rename(target))
