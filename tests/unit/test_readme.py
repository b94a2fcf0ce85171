"""README and docs cannot lie: their tree, commands, links and tables are held against the code."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from pipelines import cli
from pipelines.plan import STAGES
from pipelines.recipe import recipe_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fences(text, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for tag, block in found if tag == language]


def commands():
    for page in PAGES:
        for block in fences(page.read_text(), "sh"):
            for line in block.splitlines():
                words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
                if words:
                    yield page.name, words


def test_every_path_of_the_file_tree_exists():
    (tree,) = [block for block in fences(README, "") if block.startswith("flows/")]
    paths, folder = [], Path()
    for line in tree.splitlines():
        name = line.split()[0]
        paths.append(folder / name if line.startswith("  ") else Path(name))
        if not line.startswith("  "):
            folder = Path(name)

    assert [str(path) for path in paths if not (ROOT / path).exists()] == []
    assert len(paths) > 15


def test_the_dag_of_the_readme_is_the_plan():
    dag = next(block for block in fences(README, "") if block.startswith("collect"))

    assert dag.splitlines()[0].split(" -> ") == [stage.name for stage in STAGES]


def test_the_recipe_table_lists_every_recipe():
    assert (
        sorted(re.findall(r"^\| `([a-z-]+)` \| .*(?:GPTBig|bigcode|Qwen)", README, re.MULTILINE))
        == recipe_names()
    )


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: str(value)[:60])
def test_every_command_in_the_docs_is_one_that_exists(page, words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "starloom":
        check_starloom(words[1:])
    elif words[:3] == ["prefect", "deployment", "run"]:
        deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
        assert words[3] in {f"{d['flow_name']}/{d['name']}" for d in deployments}
    else:
        assert words[0] in {
            "git",
            "cd",
            "source",
            "prefect",
            "export",
            "STARLOOM_PORT=4300",
            ".ci/run",
            "python",
            "ray",
        }, page


def check_starloom(words):
    command = cli.starloom
    context = click.Context(command)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    with command.make_context(command.name, list(words)):
        pass


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_and_picture_exists(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []
