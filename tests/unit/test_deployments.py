"""prefect.yaml and prefect.toml: nothing misspelled, all importable, one deployment a recipe."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import get_current_settings
from pydantic import TypeAdapter

from flows.deployments import PROJECT_FILE, ZOMBIE_SECONDS, digest_flows, read_project
from flows.finetune import finetune
from flows.services import POOLS, ROOT
from pipelines.errors import ServiceError
from pipelines.recipe import recipe_names

DEPLOYMENTS = read_project().deployments


def load_flow(deployment):
    file, name = deployment.entrypoint.split(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return getattr(module, name)


def test_exactly_the_deployments_of_the_design_are_deployed():
    assert sorted(deployment.full_name for deployment in DEPLOYMENTS) == sorted(
        [
            *(f"finetune/{name}" for name in recipe_names()),
            "prepare/default", "train/default", "evaluate/default",
            "prefer/default", "push/default",
            "refresh/scikit-learn", "refresh/stack-exchange", "maintain/nightly",
        ]
    )  # fmt: skip
    assert {
        deployment.parameters["recipe"]: deployment.name
        for deployment in DEPLOYMENTS
        if deployment.flow_name == "finetune"
    } == {name: name for name in recipe_names()}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each.full_name)
def test_every_entrypoint_imports_and_every_parameter_validates(deployment):
    flow = load_flow(deployment)

    assert isinstance(flow, Flow)
    assert flow.name == deployment.flow_name
    parameters = inspect.signature(flow.fn).parameters
    assert set(deployment.parameters) <= set(parameters)
    for name, value in deployment.parameters.items():
        TypeAdapter(parameters[name].annotation).validate_python(value, strict=True)


def test_every_schedule_parses_with_its_time_zone_and_slug():
    schedules = {each.full_name: each.schedules for each in DEPLOYMENTS if each.schedules}

    assert {name: [each.slug for each in found] for name, found in schedules.items()} == {
        "refresh/scikit-learn": ["monthly"],
        "refresh/stack-exchange": ["weekly"],
        "maintain/nightly": ["nightly"],
    }
    for found in schedules.values():
        for schedule in found:
            assert CronSchedule(cron=schedule.cron, timezone=schedule.timezone).timezone == "UTC"
    limits = {each.full_name: each.concurrency_limit for each in DEPLOYMENTS}
    assert all(limits[name].collision_strategy == "CANCEL_NEW" for name in schedules)


def test_training_runs_on_the_gpu_pool_and_everything_but_evaluation_elsewhere():
    pools = {
        each.full_name: (each.work_pool.name, each.work_pool.work_queue_name)
        for each in DEPLOYMENTS
    }

    assert pools.pop("train/default") == pools.pop("prefer/default") == ("gpu", "train")
    assert pools.pop("evaluate/default") == ("gpu", "eval")
    assert set(pools.values()) == {("cpu", "data")}
    assert POOLS == {"cpu": ("data",), "gpu": ("train", "eval")}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"conncurrency_limit": 1}, "conncurrency_limit: Extra inputs are not permitted"),
        ({"tags": []}, "tags: List should have at least 1 item"),
        ({"entrypoint": "finetune.py:finetune"}, "entrypoint: String should match pattern"),
        ({"schedules": [{"cron": "0 4 * * *", "slug": "x"}]}, "timezone: Field required"),
    ],
)
def test_a_wrong_key_or_value_in_prefect_yaml_is_an_error_that_names_it(tmp_path, change, problem):
    data = yaml.safe_load(PROJECT_FILE.read_text())
    data["deployments"][0].update(change)
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump(data))

    with pytest.raises(ServiceError) as error:
        read_project(path)

    assert f"deployments.0.{problem.split(':')[0]}" in str(error.value) or "timezone" in problem
    assert problem.split(": ")[1] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_queue_of_the_other_pool_is_an_error(tmp_path):
    data = yaml.safe_load(PROJECT_FILE.read_text())
    data["deployments"][0]["work_pool"] = {
        "name": "cpu", "work_queue_name": "train", "job_variables": {"stream_output": False},
    }  # fmt: skip
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump(data))

    with pytest.raises(ServiceError, match="pool 'cpu' has no queue 'train', only"):
        read_project(path)


def test_the_digest_of_the_deployments_covers_the_file_and_the_flows():
    assert digest_flows() == digest_flows()
    assert len(digest_flows()) == 64


def test_the_form_of_finetune_has_exactly_seven_documented_parameters():
    properties = finetune.parameters.properties

    assert list(properties) == ["recipe", "data", "overrides", "smoke", "force", "publish", "push"]
    assert all(len(each["description"]) > 20 for each in properties.values())
    assert [each.get("default") for each in properties.values()] == [
        "quickstart", None, None, False, False, False, None,
    ]  # fmt: skip


def test_the_settings_of_prefect_toml_are_known_to_prefect():
    current = get_current_settings()

    assert Path.cwd() == ROOT
    assert current.results.persist_by_default is False
    assert current.flows.heartbeat_frequency * 5 == ZOMBIE_SECONDS
    assert current.server.ephemeral.enabled is False
    assert current.server.concurrency.lease_storage.endswith(".filesystem")
    assert current.server.services.db_vacuum.enabled == {"events", "flow_runs"}
    assert "pipelines" in current.logging.extra_loggers
