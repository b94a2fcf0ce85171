"""Every shipped recipe runs at small scale on its own kind of data: here, and through a server."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from flows.services import ROOT
from tests.assets.live_server import BIN, LiveServer
from tests.assets.made_sources import make_source

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

RECIPES = ("oasst", "code-alpaca", "gpteacher", "stack-exchange", "scikit-learn", "qwen-coder")
REAL = {
    "oasst": "oasst_en100_trees/en_100_tree.jsonl",
    "code-alpaca": "alpaca_seed_tasks/seed_tasks.jsonl",
    "gpteacher": "gpteacher_codegen/codegen-instruct.json",
    "stack-exchange": "se_cardano_2021",
    "scikit-learn": None,
    "qwen-coder": None,
}


def run_smoke(recipe, root, *overrides):
    """Run `starloom run RECIPE --smoke` with overrides; return its run folder."""
    done = subprocess.run(
        [BIN / "starloom", "run", recipe, "--smoke", *(f"--set={each}" for each in overrides)],
        cwd=ROOT,
        env={**os.environ, "STARLOOM_DATA": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = [p.parent for p in (root / "runs").glob("*/scorecard.json")]
    return run


def check_run(run):
    """Check that a run's model learned, and that each trained record tells where it is from."""
    score = json.loads((run / "scorecard.json").read_text())
    assert score["accepted"] is True, score
    assert (run / "model" / "model.safetensors").stat().st_size > 100_000
    lineage = json.loads((run / "lineage.json").read_text())
    [(name, source)] = lineage["sources"].items()
    assert source["records"] > 50
    assert sum(source["licenses"].values()) == source["records"]
    assert f"| {name}" in (run / "card.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_made_data_with_the_path_as_an_override(recipe, tmp_path):
    path = make_source(recipe, tmp_path / "raw")
    overrides = [f"sources.0.path={path}"]
    if recipe in ("scikit-learn", "qwen-coder"):
        overrides.append("sources.0.license=PSF-2.0")

    check_run(run_smoke(recipe, tmp_path / "data", *overrides))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_on_real_data(recipe, tmp_path):
    real = os.environ.get("STARLOOM_REAL_DATA")
    if not real:
        pytest.skip("STARLOOM_REAL_DATA is not set")
    overrides = [f"sources.0.path={Path(real) / REAL[recipe]}"] if REAL[recipe] else []
    if recipe == "oasst":
        overrides.append(f"tokenizer.name_or_path={Path(real) / 'starcoder_tokenizer/starcoder'}")

    check_run(run_smoke(recipe, tmp_path / "data", *overrides))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    live = LiveServer(tmp_path_factory.mktemp("recipes"))
    live.command("starloom", "up")
    yield live
    live.command("starloom", "down")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_through_server_and_workers_as_users_start_it(recipe, server, tmp_path):
    path = make_source(recipe, tmp_path / "raw")

    shown = server.command(
        "prefect", "deployment", "run", f"finetune/{recipe}",
        "-p", "smoke=true", "-p", f"data={path}", "--watch",
    )  # fmt: skip

    assert "finished successfully in 'Completed'" in shown
    [run] = [run for run in server.runs() if run.name.startswith(f"{recipe}-")]
    check_run(run)
