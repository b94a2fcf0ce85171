"""The base model of a recipe as seen from outside."""

import json
import re

import huggingface_hub
import pytest

from pipelines.preflight.checks import position_problems
from pipelines.recipe import load_recipe
from pipelines.training.base_model import model_problems


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


def cached(hub, name, files):
    """Write files into the Hub's cache as a download of them does."""
    folder = hub / f"models--{name.replace('/', '--')}"
    for path, text in {
        "refs/main": "abc",
        **{f"snapshots/abc/{k}": v for k, v in files.items()},
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"model.safetensors": "x"}, None),
        ({}, "model.safetensors of model 'bigcode/starcoder' is not in the local cache"),
        ({"model.safetensors.index.json": ["a", "b"], "a": "x", "b": "x"}, None),
        (
            {"model.safetensors.index.json": ["a", "b"], "a": "x"},
            "b of model 'bigcode/starcoder' is not in",
        ),
    ],
)
def test_a_cached_config_does_not_stand_for_its_weights(files, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = {
        name: json.dumps({"weight_map": {f"w{n}": n for n in value}})
        if isinstance(value, list)
        else value
        for name, value in files.items()
    }
    cached(tmp_path, "bigcode/starcoder", {"config.json": "{}", **texts})
    recipe = load_recipe("code-alpaca")

    found = model_problems(recipe)

    assert len(found) == (missing is not None)
    assert missing is None or missing in found[0]
    assert missing is None or "https://huggingface.co/bigcode/starcoder" in found[0]
    assert model_problems(recipe, weights=False) != []  # no tokenizer.json


def test_a_folder_that_lacks_some_of_its_shards_names_them(tmp_path):
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_text("x")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    recipe = load_recipe("quickstart", overrides={"model": {"model_name_or_path": str(tmp_path)}})

    (problem,) = model_problems(recipe)
    assert "no b.safetensors, which model.safetensors.index.json names; copy or" in problem


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        ({}, None),
        ({"tokenizer.name_or_path": "more"}, None),
        ({"tokenizer.name_or_path": "other"}, "tokenizer.name_or_path '.*other': most of its ids"),
        ({"tokenizer.train_vocab_size": 600}, "train_vocab_size: the ids of a tokenizer trained"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused_before_any_work(tokenizer, problem, tmp_path):
    words = {word: i for i, word in enumerate("abcdefgh")}
    reverse = {word: 7 - i for word, i in words.items()}
    for name, vocab, added in (
        ("base", words, []),
        ("more", words, ["<x>"]),
        ("other", reverse, []),
    ):
        (tmp_path / name).mkdir()
        tokens = [{"content": token, "id": 8 + i} for i, token in enumerate(added)]
        text = json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens})
        (tmp_path / name / "tokenizer.json").write_text(text)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("x")
    changes = {
        key: str(tmp_path / value) if isinstance(value, str) else value
        for key, value in tokenizer.items()
    }
    base = {"model.model_name_or_path": str(tmp_path / "base")}
    recipe = load_recipe("qwen-coder", overrides={**base, **changes})

    found = model_problems(recipe)

    assert len(found) == (problem is not None)
    assert problem is None or re.search(problem, found[0])


def test_a_block_above_the_positions_of_an_architecture_without_known_sizes_is_refused(tmp_path):
    config = {"model_type": "gpt_neox", "max_position_embeddings": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = {"model.model_name_or_path": str(tmp_path), "tokenization.block_size": 400}
    recipe = load_recipe("qwen-coder", overrides=base)

    (problem,) = position_problems(recipe, None)

    assert problem.startswith("tokenization.block_size 400 is above the 320 positions of model")
