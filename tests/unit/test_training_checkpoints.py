"""Checkpoints count only when they are complete, and the last good one always stays."""

import errno
import json
import os

import pytest

from pipelines.errors import DiskFull
from pipelines.training import checkpoints
from pipelines.training.checkpoints import (
    checkpoint_folder,
    commit,
    complete_checkpoints,
    newest_checkpoint,
    problem,
    read_progress,
    remove_incomplete,
    rotate,
)


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
