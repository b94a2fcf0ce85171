"""Metrics for W&B, TensorBoard, MLflow and trackio: what they need, and what they may see."""

import os

import pytest

from pipelines.errors import PreflightError
from pipelines.runs import open_run, run_key_parts
from pipelines.store import Store
from pipelines.training import reporters
from pipelines.training.environment import child_environment, hardware_of
from pipelines.training.reporters import check_reporters, prepare_reporters, reporter_problems
from tests.assets.training_runs import build_stages, make_recipe

SECRETS = {
    "WANDB_API_KEY": "w", "MLFLOW_TRACKING_TOKEN": "m", "TRACKIO_SPACE_ID": "t", "HF_TOKEN": "h",
    "DATABRICKS_TOKEN": "d", "HTTPS_PROXY": "p", "AWS_SECRET_ACCESS_KEY": "a",
}  # fmt: skip


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    return build_stages(Store(tmp_path_factory.mktemp("stages")))


def recipe_to(*names):
    return make_recipe(training__report_to=list(names))


def test_a_reporter_that_is_not_installed_is_named_with_its_pip_line(monkeypatch, refs, tmp_path):
    monkeypatch.setattr(reporters, "_installed", lambda package: package == "mlflow")

    problem = (
        "training.report_to: {0} is not installed: `pip install {0}`, or take it out "
        "(metrics.jsonl is always written)"
    )
    found = reporter_problems(recipe_to("wandb", "mlflow", "tensorboard"))
    assert found == [problem.format(name) for name in ("wandb", "tensorboard")]
    run = open_run(recipe_to("wandb"), refs, tmp_path)
    with pytest.raises(PreflightError, match="pip install wandb"):
        check_reporters(run)


def test_a_folder_of_a_reporters_name_is_no_installation(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    assert not reporters._installed("wandb")
    assert reporters._installed("json")


def test_wandb_without_a_login_is_refused_and_offline_needs_none(monkeypatch, tmp_path):
    monkeypatch.setattr(reporters, "_installed", lambda package: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    (problem,) = reporter_problems(recipe_to("wandb"))
    assert "WANDB_API_KEY, `wandb login`, or WANDB_MODE=offline" in problem
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert reporter_problems(recipe_to("wandb")) == []
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert reporter_problems(recipe_to("wandb")) == []


@pytest.mark.parametrize(
    ("names", "passed"),
    [
        ((), set()),
        (("tensorboard",), set()),
        (("wandb",), {"WANDB_API_KEY", "HTTPS_PROXY"}),
        (("mlflow",), {"MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "HTTPS_PROXY"}),
        (("trackio",), {"TRACKIO_SPACE_ID", "HF_TOKEN", "HTTPS_PROXY"}),
    ],
)
def test_secrets_reach_the_ranks_only_for_the_reporter_that_is_asked_for(
    names, passed, refs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "t")
    recipe = recipe_to(*names)
    hardware = hardware_of(open_run(recipe, refs, tmp_path))

    environment = child_environment(recipe, hardware, SECRETS)

    assert {name for name in SECRETS if name in environment} == passed


def test_where_metrics_go_is_no_part_of_a_runs_key(refs):
    plain = run_key_parts(make_recipe(), refs)

    assert run_key_parts(recipe_to("wandb", "mlflow"), refs) == plain
    assert run_key_parts(make_recipe(training__stall_minutes=5), refs) == plain
    assert run_key_parts(make_recipe(training__max_hours=5), refs) != plain


def test_all_attempts_of_a_run_draw_one_curve_and_the_users_variables_win(
    refs, tmp_path, monkeypatch
):
    run = open_run(recipe_to("wandb", "tensorboard"), refs, tmp_path)
    monkeypatch.setattr(os, "environ", {"WANDB_PROJECT": "mine"})

    prepare_reporters(run)
    first = dict(os.environ)
    prepare_reporters(run)

    assert os.environ == first
    assert first["WANDB_PROJECT"] == "mine"
    assert first["WANDB_RUN_ID"].startswith(f"{run.name}-20")
    assert first["WANDB_RESUME"] == "allow"
    assert first["TENSORBOARD_LOGGING_DIR"] == str(run.path / "tensorboard")
    assert not any(name.startswith("MLFLOW") for name in first)
