"""Publication here and on the Hub: accepted models only, always whole, never the token."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from pipelines import cli
from pipelines.errors import PreflightError, StarloomError
from pipelines.evals import publish as module
from pipelines.evals.card import write_card
from pipelines.evals.evaluate import evaluate_run
from pipelines.evals.publish import publish
from pipelines.evals.push import check_repository, plan_push, plan_text, push, read_token
from pipelines.runs import Run
from tests.assets.finished_runs import make_finished_run

TOKEN = "hf_canaryCanaryCanary"


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


class Hub:
    """What a Hub would have seen; `present` are the files that the repository has."""

    def __init__(self):
        self.token, self.repository, self.private, self.commits = None, None, None, []
        self.present, self.refuses = [".gitattributes"], None

    def __call__(self, token):
        self.token = token
        return self

    def create_repo(self, repository, *, repo_type, private, exist_ok):
        if self.refuses:
            raise self.refuses
        assert (repo_type, exist_ok) == ("model", True)
        self.repository, self.private = repository, private

    def list_repo_files(self, repository, *, repo_type):
        return self.present

    def create_commit(self, repository, *, operations, commit_message, repo_type):
        self.commits.append((repository, operations, commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")

    def files(self):
        """Return {name: bytes} of the one commit, None for a file that is removed."""
        ((_, operations, _),) = self.commits
        return {
            each.path_in_repo: None
            if type(each).__name__ == "CommitOperationDelete"
            else read(each.path_or_fileobj)
            for each in operations
        }


def read(source):
    return source if isinstance(source, bytes) else Path(source).read_bytes()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


def test_exactly_the_model_and_its_card_are_pushed_private_and_in_one_commit(run, hub):
    run.checkpoints.mkdir()
    (run.checkpoints / "model.safetensors").write_text("a checkpoint")
    plan = plan_push(run, "me/model")
    address = push(run, plan, TOKEN)

    assert hub.files() == expected(run)
    assert {name: len(data) for name, data in expected(run).items()} == plan.files
    assert (hub.repository, hub.private, hub.token) == ("me/model", True, TOKEN)
    assert hub.commits[0][2] == f"Model of run {run.name}"
    assert address == "https://hub/me/model/commit/1"
    assert run.read("pushed.json")["commit"] == address
    everything = "".join(
        path.read_text(errors="replace") for path in run.path.rglob("*") if path.is_file()
    )
    assert TOKEN not in everything + repr(plan) + plan_text(plan)


def test_the_command_asks_before_it_pushes(run, hub, monkeypatch):
    def starloom(*words, **options):
        return CliRunner().invoke(cli.starloom, ["push", run.name, "me/model", *words], **options)

    monkeypatch.setenv("HF_TOKEN", TOKEN)

    said_no = starloom(input="n\n")
    silent = starloom(input="")
    assert hub.commits == []
    assert said_no.output.endswith("nothing was pushed\n")
    assert silent.exit_code != 0
    agreed = starloom("--public", input="y\n")
    unasked = starloom("--yes")

    assert len(hub.commits) == 2
    assert "Push these 6 files to me/model? [y/N]: y" in agreed.output
    assert unasked.output.endswith("pushed  https://hub/me/model/commit/1\n")
    assert TOKEN not in "".join(each.output for each in (said_no, silent, agreed, unasked))


def test_the_plan_shows_files_sizes_license_gate_and_card(run):
    text = plan_text(plan_push(run, "me/model", private=False))

    for shown in (
        "me/model", "everybody", "bsd-3-clause", "accepted: held-out loss", "model.safetensors",
        "README.md", "## Training data",
    ):  # fmt: skip
        assert shown in text


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(run, hub):
    hub.present = ["model-00001-of-00002.safetensors", "notes.md", "model.safetensors"]

    push(run, plan_push(run, "me/model"), TOKEN)

    removed = [name for name, data in hub.files().items() if data is None]
    assert removed == ["model-00001-of-00002.safetensors"]


def test_what_was_not_accepted_or_changed_since_is_not_pushed(run, hub):
    plan = plan_push(run, "me/model")
    (run.model / "generation_config.json").write_text("{}")
    with pytest.raises(StarloomError, match="no longer what was approved for me/model"):
        push(run, plan, TOKEN)

    card = run.read("scorecard.json")
    run.write("scorecard.json", card | {"accepted": False, "reason": "rejected: no better"})
    for attempt in (lambda: plan_push(run, "me/model"), lambda: push(run, plan, TOKEN)):
        with pytest.raises(StarloomError, match="rejected: no better"):
            attempt()
    (run.model / "linked.json").symlink_to("/etc/hostname")
    run.write("scorecard.json", card)
    with pytest.raises(StarloomError, match="a link in a model folder is not pushed"):
        plan_push(run, "me/model")
    assert hub.commits == []


def test_a_preferred_model_is_pushed_where_its_own_gate_accepts_it_too(run, hub):
    shutil.copytree(run.model, run.path / "preferred")
    result = {"key": "k", "accepted": False, "reason": "rejected: worse", "pairs": 70}
    result |= {"held_out": {"pairs": 7}, "settings": {"beta": 0.1, "learning_rate": 5e-6}}
    run.write("preferred.json", result)
    with pytest.raises(StarloomError, match="preference stage: rejected: worse"):
        plan_push(run.preferred(), "me/model")
    run.write("preferred.json", result | {"accepted": True, "reason": "accepted: better"})

    plan = plan_push(run.preferred(), "me/model")
    push(run.preferred(), plan, TOKEN)

    assert plan.verdict.endswith("; preference stage accepted: better")
    card = hub.files()["README.md"].decode()
    assert "## Preference stage" in card
    assert "| learning_rate  | 5e-06 |" in card
    assert run.read("pushed.json")["model"] == "preferred"


def connect_error():
    """What the Hub's client raises without a network, whichever library it talks through."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__mro__[1].__module__].ConnectError


def test_what_the_hub_refuses_is_one_line_without_the_token(run, hub):
    hub.refuses = connect_error()(f"403 for {TOKEN}\nmore")

    with pytest.raises(StarloomError) as error:
        push(run, plan_push(run, "me/model"), TOKEN)

    assert str(error.value).startswith(
        f"the Hub did not take {run.name} as me/model (ConnectError: 403 for ***); the Hub has "
        "to be reached, HF_HUB_OFFLINE unset, and the token needs write access to 'me'"
    )
    assert error.value.__cause__ is None
    assert run.read("pushed.json") is None


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "/a", "a/-b", "a--b/c", "https://x/y"])
def test_what_is_no_repository_is_refused(name):
    with pytest.raises(StarloomError, match="expected OWNER/NAME"):
        check_repository(name)


def test_the_token_comes_from_the_environment():
    assert read_token({"HF_TOKEN": f" {TOKEN}\n"}) == TOKEN
    with pytest.raises(PreflightError, match="set HF_TOKEN"):
        read_token({"HF_TOKEN": " "})


def test_a_base_in_a_local_folder_is_not_named_to_the_world(run):
    from pipelines.evals.card import front_matter
    from tests.assets.training_runs import make_recipe

    lineage = json.loads((run.path / "lineage.json").read_text())
    local, hub = (
        front_matter(make_recipe(model={"model_name_or_path": name}), lineage)
        for name in ("/home/me/base", "owner/base")
    )
    assert ("base_model" in local, "base_model: owner/base" in hub) == (False, True)
