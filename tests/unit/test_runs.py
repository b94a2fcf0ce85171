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


def finish(run):
    run.model.mkdir()
    (run.model / "model.safetensors").write_bytes(b"weights")
    run.write("training.json", {"status": "finished", "model_files": {"model.safetensors": 7}})


def test_force_sets_a_finished_run_aside_and_loses_nothing(tmp_path):
    run = open_quickstart(tmp_path)
    finish(run)

    again = open_quickstart(tmp_path, force=True)

    (aside,) = tmp_path.glob("*.replaced-*")
    assert again.path == run.path
    assert not again.model.exists()
    assert (aside / "model" / "model.safetensors").read_bytes() == b"weights"


def test_force_resumes_an_unfinished_run_instead_of_throwing_it_away(tmp_path):
    run = open_quickstart(tmp_path)
    (run.path / "checkpoints").mkdir()

    assert (open_quickstart(tmp_path, force=True).path / "checkpoints").is_dir()
    assert list(tmp_path.glob("*.replaced-*")) == []


def test_force_does_not_touch_a_run_whose_lock_is_held(tmp_path):
    run = open_quickstart(tmp_path)
    finish(run)
    with (run.path / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StarloomError, match="is being trained: wait for it or cancel it"):
            open_quickstart(tmp_path, force=True)

    assert run.trained


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_run_without_its_whole_weights_is_not_trained(tmp_path, damage):
    run = open_quickstart(tmp_path)
    finish(run)
    assert run.trained
    weights = run.model / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(b"wei")

    assert not run.trained


def test_other_weights_in_the_same_folder_are_another_run(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    runs = []
    for weights in (b"one", b"two"):
        (base / "model.safetensors").write_bytes(weights)
        changes = {"model.model_name_or_path": str(base)}
        recipe = load_recipe("scikit-learn", overrides=changes)
        runs.append(open_run(recipe, REFS, tmp_path / "runs"))

    assert runs[0].path != runs[1].path


def test_runs_are_found_by_name_beginning_path_or_as_the_latest(tmp_path):
    run = open_quickstart(tmp_path)

    for name in (run.name, run.name[:14], str(run.path), "latest"):
        assert find_run(tmp_path, name) == run
    with pytest.raises(StarloomError, match=f"no run 'quick-start'.* did you mean '{run.name}'"):
        find_run(tmp_path, "quick-start")
    open_quickstart(tmp_path, training__max_steps=9)
    with pytest.raises(StarloomError, match="'quickstart' names 2 runs"):
        find_run(tmp_path, "quickstart")
