"""Preflight: everything that is missing is said in one line, before any long work."""

import shutil
from collections import namedtuple

import pytest

from pipelines import preflight
from pipelines.errors import PreflightError
from pipelines.recipe import load_recipe, recipe_names

Disk = namedtuple("Disk", "total used free")


def test_the_quickstart_is_ready_on_a_machine_without_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)

    preflight.check(load_recipe("quickstart"), tmp_path / "not" / "there" / "yet", train_here=True)


def test_a_disk_below_the_estimate_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 9 * 10**8, 10**8))

    with pytest.raises(PreflightError) as error:
        preflight.check(load_recipe("quickstart"), tmp_path)

    assert "0.1 GB free, about 0.7 GB needed; free some space or set STARLOOM_DATA" in str(
        error.value
    )


def test_a_recipe_that_lacks_source_model_and_gpu_names_all_three_in_one_line(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)

    nowhere = load_recipe("oasst", overrides={"sources.0.path": "nowhere"})
    with pytest.raises(PreflightError) as error:
        preflight.check(nowhere, tmp_path, train_here=True)

    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("recipe oasst: ")
    assert "sources.0: path 'nowhere'" in text
    assert "model 'bigcode/starcoderbase' is not in the local cache" in text
    assert "hardware 'zero3' needs 8 GPU(s), 0 here" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_start_where_its_sources_can_be_fetched(name, tmp_path):
    preflight.check(load_recipe(name, smoke=True), tmp_path)


def test_a_model_folder_with_pickle_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    recipe = load_recipe("scikit-learn", overrides={"model.model_name_or_path": str(tmp_path)})

    with pytest.raises(PreflightError, match=r"no \*.safetensors \(pickle weights are refused\)"):
        preflight.check(recipe, tmp_path)


def test_the_parameter_count_equals_the_model_that_is_built():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    recipe = load_recipe("quickstart")
    config = recipe.model.config
    model = GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=4096,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.n_positions,
            bos_token_id=0,
            eos_token_id=0,
        )
    )

    counted = preflight.count_parameters(recipe)

    assert abs(counted / model.num_parameters() - 1) < 0.01
