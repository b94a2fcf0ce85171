"""Run folders: the same cause finds the same run, force never loses one."""

import fcntl

import pytest

from pipelines.errors import StarloomError
from pipelines.recipe import load_recipe
from pipelines.runs import LOCK, find_run, open_run
from pipelines.store import StageRef

REFS = {
    name: StageRef(name, "k", f"digest of {name}", f"{name}/k", 1, 1, 0.0, False)
    for name in ("pack", "tokenizer")
}


def open_quickstart(root, force=False, refs=REFS, **overrides):
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return open_run(load_recipe("quickstart", overrides=changes), refs, root, force=force)


def test_what_decides_training_names_the_run_and_nothing_else_does(tmp_path):
    run = open_quickstart(tmp_path)
    other_data = {**REFS, "pack": StageRef("pack", "k", "other", "pack/k", 1, 1, 0.0, False)}

    assert open_quickstart(tmp_path).path == run.path
    assert open_quickstart(tmp_path, evaluation__min_improvement=2).path == run.path
    assert open_quickstart(tmp_path, training__max_steps=9).path != run.path
    assert open_quickstart(tmp_path, refs=other_data).path != run.path


def test_force_sets_the_run_aside_and_loses_nothing(tmp_path):
    run = open_quickstart(tmp_path)
    (run.path / "model").mkdir()

    again = open_quickstart(tmp_path, force=True)

    (aside,) = tmp_path.glob("*.replaced-*")
    assert again.path == run.path
    assert not again.model.exists()
    assert (aside / "model").is_dir()


def test_force_does_not_touch_a_run_that_is_being_trained(tmp_path):
    run = open_quickstart(tmp_path)
    with (run.path / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StarloomError, match="is being trained: wait for it or cancel it"):
            open_quickstart(tmp_path, force=True)

    assert open_quickstart(tmp_path, force=True).path == run.path


def test_runs_are_found_by_name_beginning_path_or_as_the_latest(tmp_path):
    run = open_quickstart(tmp_path)

    for name in (run.name, run.name[:14], str(run.path), "latest"):
        assert find_run(tmp_path, name) == run
    with pytest.raises(StarloomError, match=f"no run 'quick-start'.* did you mean '{run.name}'"):
        find_run(tmp_path, "quick-start")
    open_quickstart(tmp_path, training__max_steps=9)
    with pytest.raises(StarloomError, match="'quickstart' names 2 runs"):
        find_run(tmp_path, "quickstart")
