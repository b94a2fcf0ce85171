"""`starloom new`: a recipe and a deployment that are valid, readable and like the shipped ones."""

import shutil

import pytest

from flows.deployments import PROJECT_FILE, read_project
from pipelines.errors import RecipeError
from pipelines.recipe import load_recipe
from pipelines.scaffold import RENDERING, add_deployment, check_name, recipe_text, write_recipe

PATHS = ["rows.jsonl", "a folder: with, odd 'names' # and {braces}", "日本語.jsonl"]


def dataset(path):
    return {"type": "dataset", "id": "mine", "path": path, "license": "MIT"}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("body", RENDERING)
@pytest.mark.parametrize("path", PATHS)
def test_every_kind_of_data_gets_a_valid_recipe_that_reads_it(tmp_path, body, gpu, path):
    text = recipe_text("mine", dataset(path), body, gpu=gpu)

    recipe = write_recipe("mine", text, tmp_path)

    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe
    assert recipe.sources[0].model_dump(include={"type", "id", "path", "license"}) == dataset(path)
    assert recipe.hardware == ("gpu" if gpu else "cpu")
    assert recipe.template.name == {"messages": "starchat", "prompt": "question-answer"}.get(
        body, "plain"
    )
    assert (recipe.fim.fim_rate > 0) == (body == "code")
    assert len(text.split("\n")) <= 61
    assert load_recipe(str(tmp_path / "mine.yaml"), smoke=True).training.max_steps == 20


def test_a_recipe_that_exists_or_has_an_impossible_name_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("kept: true\n")

    with pytest.raises(RecipeError, match="recipe 'mine' exists"):
        check_name("mine", tmp_path)
    with pytest.raises(RecipeError, match="recipe name 'My Code': expected small letters"):
        check_name("My Code", tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == "kept: true\n"


def test_a_recipe_that_is_not_valid_is_not_left_behind(tmp_path):
    text = recipe_text("mine", {**dataset("x"), "colums": 1}, "prompt", gpu=False)

    with pytest.raises(RecipeError, match="sources.0.colums: unknown key, did you mean 'columns'"):
        write_recipe("mine", text, tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("marked", [True, False])
def test_the_deployment_joins_the_others_and_changes_none_of_them(tmp_path, marked):
    project = tmp_path / "prefect.yaml"
    shutil.copy(PROJECT_FILE, project)
    if not marked:
        project.write_text(project.read_text().replace("  # The steps of finetune", "  # Steps"))
    before = read_project(project)
    text = recipe_text("mine", dataset(PATHS[1]), "prompt", gpu=False)
    recipe = write_recipe("mine", text, tmp_path)

    add_deployment(project, recipe)

    after = read_project(project)
    [added] = [each for each in after.deployments if each.full_name == "finetune/mine"]
    assert [each for each in after.deployments if each != added] == before.deployments
    like = next(each for each in before.deployments if each.full_name == "finetune/quickstart")
    changed = {"name": "mine", "parameters": {"recipe": "mine"}, "tags": ["finetune"]}
    assert added == like.model_copy(update={**changed, "description": recipe.description})
