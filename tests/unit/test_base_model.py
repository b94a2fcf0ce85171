"""The base model of a recipe as seen from outside."""

import pytest

from pipelines.base_model import model_problems
from pipelines.recipe import load_recipe


@pytest.mark.parametrize(
    ("name", "gated"),
    [
        ("bigcode/starcoder", True),
        ("meta-llama/Llama-3.2-1B", True),
        ("bigcode/starcoder2-3b", False),
        ("bigcode/starcoderbase-1b-chat", False),
    ],
)
def test_only_a_gated_model_is_said_to_be_gated(name, gated, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe("quickstart", overrides={"model": {"model_name_or_path": name}})

    (problem,) = model_problems(recipe)

    assert ("is gated: accept its license" in problem) is gated
