"""The preference stage as a flow: its result, its artifact, and the same again from the disk."""

import pytest
import yaml

from flows.prefer import prefer
from pipelines.recipe import load_recipe
from pipelines.runs import Run
from tasks import prefer as tasks
from tests.assets.flow_runs import read_artifacts

pytestmark = pytest.mark.flow

HELD_OUT = {"pairs": 5, "accuracy_before": 0.4, "accuracy_after": 0.8, "reward_accuracy": 1.0}


def test_the_flow_shows_the_held_out_accuracy_before_and_after(client, data_root, monkeypatch):
    run = Run(data_root / "runs" / "toy-1")
    run.path.mkdir(parents=True)
    run.write("run.json", {"key": "k", "recipe": "quickstart"})
    recipe = load_recipe("quickstart").model_dump(mode="json")
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seen = []

    def stage(run, store, settings):
        seen.append(settings)
        return {
            "pairs": 70,
            "dropped": {"too_long": 1},
            "held_out": HELD_OUT,
            "settings": settings.model_dump(mode="json"),
            "reason": "accepted: better",
        }

    monkeypatch.setattr(tasks, "prefer", stage)
    monkeypatch.setattr(tasks, "preferred_result", lambda run, settings: None)

    state = prefer("toy", {"beta": 0.3}, return_state=True)

    assert (state.name, state.message) == ("Completed", "70 pairs, accepted: better")
    assert [settings.beta for settings in seen] == [0.3]
    artifact = read_artifacts(client, state)["preference"]
    assert artifact["description"] == "accepted: better"
    shown = " ".join(artifact["data"].split())
    for row in ("| accuracy before | 0.400", "| accuracy after | 0.800", "| beta | 0.3 |"):
        assert row in shown
