"""Publication: accepted models only, always whole, the last one kept."""

import json
import shutil

import pytest

from pipelines.errors import StarloomError
from pipelines.evals import publish as module
from pipelines.evals.card import write_card
from pipelines.evals.evaluate import evaluate_run
from pipelines.evals.publish import publish
from pipelines.runs import Run
from tests.assets.finished_runs import make_finished_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run, store = make_finished_run(tmp_path_factory.mktemp("publish"), steps=10)
    evaluate_run(run, store)
    write_card(run, store)
    return run


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the run below a data root of its own."""
    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path))
    shutil.copytree(finished.path, tmp_path / "runs" / finished.name)
    return Run(tmp_path / "runs" / finished.name)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def expected(run):
    return {**tree(run.model), "README.md": (run.path / "card.md").read_bytes()}


def change_model(run, text):
    (run.model / "generation_config.json").write_text(json.dumps({"changed": text}))


def test_an_accepted_model_is_copied_with_its_card(run, tmp_path):
    path = publish(run)

    assert path == tmp_path / "models/quickstart"
    assert tree(path) == expected(run)
    assert "model.safetensors" in tree(path)


def test_the_model_before_is_kept_and_older_ones_go(run, tmp_path):
    models, seen = tmp_path / "models", []
    for text in ("first", "second", "third"):
        change_model(run, text)
        seen.append(expected(run))
        publish(run)

    assert tree(models / "quickstart") == seen[2]
    assert tree(models / "quickstart.previous") == seen[1]
    assert len([p for p in models.iterdir() if p.is_dir() and not p.is_symlink()]) == 2


def test_publishing_again_changes_nothing(run, tmp_path):
    change_model(run, "first")
    publish(run)
    change_model(run, "second")
    publish(run)
    before = {p.name: p.lstat().st_ino for p in (tmp_path / "models").iterdir()}

    publish(run)

    assert {p.name: p.lstat().st_ino for p in (tmp_path / "models").iterdir()} == before


@pytest.mark.parametrize("step", ["copy", "first link", "second link"])
def test_whatever_fails_a_whole_model_stays_published(run, tmp_path, monkeypatch, step):
    change_model(run, "first")
    first = expected(run)
    publish(run)
    change_model(run, "second")

    def fail(*_, **__):
        raise KeyboardInterrupt

    real = module._point

    def fail_second(link, target):
        if link.name == "quickstart":
            raise KeyboardInterrupt
        real(link, target)

    name, function = {
        "copy": ("_copy", fail),
        "first link": ("_point", fail),
        "second link": ("_point", fail_second),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, function)
        with pytest.raises(KeyboardInterrupt):
            publish(run)

    models = tmp_path / "models"
    assert tree(models / "quickstart") == first
    publish(run)
    assert tree(models / "quickstart") == expected(run)
    assert tree(models / "quickstart.previous") == first
    assert len([p for p in models.iterdir() if p.is_dir() and not p.is_symlink()]) == 2


def refused(run):
    with pytest.raises(StarloomError) as error:
        publish(run)
    return str(error.value)


def test_a_rejected_model_is_refused_with_its_numbers(run, tmp_path):
    scorecard = run.read("scorecard.json")
    run.write("scorecard.json", scorecard | {"accepted": False, "reason": "rejected: no better"})

    assert refused(run) == f"run {run.name} is not published: rejected: no better"
    assert not (tmp_path / "models/quickstart").exists()


def test_a_run_without_a_scorecard_is_refused(run):
    (run.path / "scorecard.json").unlink()

    assert refused(run) == (
        f"run {run.name} is not evaluated yet: `starloom run quickstart` evaluates it"
    )


def test_a_run_trained_again_since_its_evaluation_is_refused(run):
    run.write("training.json", run.read("training.json") | {"train_loss": 0.5})

    assert "was trained again after its evaluation" in refused(run)


def test_a_run_without_a_card_is_refused(run):
    (run.path / "card.md").unlink()

    assert "has no card.md yet" in refused(run)
