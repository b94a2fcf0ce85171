"""Recipes: every shipped one loads, every mistake is explained, all at once."""

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipelines.errors import RecipeError
from pipelines.hardware_files import hardware_names
from pipelines.overrides import parse_override
from pipelines.recipe import (
    Recipe,
    load_hardware,
    load_recipe,
    recipe_names,
)


def test_these_recipes_are_shipped():
    assert recipe_names() == [
        "code-alpaca",
        "gpteacher",
        "oasst",
        "quickstart",
        "qwen-coder",
        "scikit-learn",
        "stack-exchange",
    ]
    assert hardware_names() == [
        "cpu", "ddp", "fsdp2", "gpu", "zero2", "zero2-offload", "zero3", "zero3-offload"
    ]  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("smoke", [False, True])
def test_every_recipe_loads_and_names_itself(name, smoke):
    recipe = load_recipe(name, smoke=smoke)

    assert recipe.name == name
    assert load_hardware(recipe.hardware).device == (
        "cpu" if smoke or name == "quickstart" else "cuda"
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_a_screen_and_says_how_to_run_it(name):
    text = resources.files("pipelines.recipes").joinpath(f"{name}.yaml").read_text()

    assert len(text.splitlines()) <= 60
    assert f"prefect deployment run finetune/{name}" in text


LORA_OF_FINETUNE_PY = {
    "model.model_name_or_path": "bigcode/starcoder",
    "model.quantization_config.load_in_8bit": True,
    "template.name": "question-answer",
    "template.train_on_prompt": True,
    "tokenization.block_size": 2048,
    "adapter.r": 16,
    "adapter.lora_alpha": 32,
    "adapter.lora_dropout": 0.05,
    "adapter.target_modules": ["c_proj", "c_attn"],
    "training.learning_rate": 1e-4,
    "training.lr_scheduler_type": "cosine",
    "training.warmup_steps": 100,
    "training.weight_decay": 0.05,
    "training.max_steps": 1000,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 16,
}
SEEDS = {
    "oasst": {
        "model.model_name_or_path": "bigcode/starcoderbase",
        "adapter": None,
        "hardware": "zero3",
        "tokenization.block_size": 1024,
        "training.learning_rate": 2e-5,
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 0.03,
        "training.num_train_epochs": 3,
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 8,
        "training.seed": 42,
    },
    "code-alpaca": LORA_OF_FINETUNE_PY,
    "stack-exchange": LORA_OF_FINETUNE_PY,
    "gpteacher": {
        "model.model_name_or_path": "bigcode/starcoder",
        "adapter": None,
        "hardware": "fsdp2",
        "template.name": "alpaca",
        "tokenization.block_size": 1024,
        "training.learning_rate": 2e-5,
        "training.num_train_epochs": 3,
    },
    "scikit-learn": {
        "model.model_name_or_path": "bigcode/starcoderbase-1b",
        "model.quantization_config.load_in_4bit": True,
        "template.train_on_prompt": True,
        "fim.fim_rate": 0.5,
        "adapter.r": 8,
        "adapter.lora_alpha": 32,
        "adapter.lora_dropout": 0.0,
        "adapter.target_modules": ["c_attn", "c_proj", "c_fc"],
        "adapter.bias": "none",
    },
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for name, keys in SEEDS.items() for key, value in keys.items()],
)
def test_the_recipes_of_the_seeds_have_their_settings(name, key, value):
    found = load_recipe(name).model_dump(mode="json")
    for part in key.split("."):
        found = found[part]

    assert found == value


def test_a_resolved_recipe_round_trips_through_yaml():
    recipe = load_recipe("oasst")

    assert (
        Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
        == recipe
    )


def test_recipes_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("quickstart").training.max_steps = 3


def test_an_unknown_recipe_is_answered_with_the_closest_and_the_list():
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstrt")

    assert str(error.value) == (
        "unknown recipe 'quickstrt', did you mean 'quickstart'? (there are: code-alpaca, "
        "gpteacher, oasst, quickstart, qwen-coder, scikit-learn, stack-exchange; or give the path "
        "of a .yaml file)"
    )


def test_all_problems_are_reported_at_once_with_what_may_be_meant():
    with pytest.raises(RecipeError) as error:
        load_recipe(
            "quickstart",
            overrides={
                "training.learnin_rate": 1,
                "sources.0.licence": "MIT",
                "sources.4.path": "x",
                "training.max_steps": "many",
                "hardware": "cpi",
                "name.x": 1,
            },
        )

    assert str(error.value).split("; ") == [
        "recipe quickstart: sources.4.path: '4' is not one of the 1 entries, counted from 0",
        "name.x: 'x' is below 'quickstart', which holds no keys",
        "sources.0.licence: unknown key, did you mean 'license'?",
        (
            "training.max_steps: Input should be a valid integer, unable to parse string as an "
            "integer, got 'many'"
        ),
        "training.learnin_rate: unknown key, did you mean 'learning_rate'?",
        (
            "hardware: no such hardware, did you mean 'cpu'? (there are: "
            f"{', '.join(hardware_names())}, or give the path of a .yaml file), got 'cpi'"
        ),
    ]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("endpoint", "https://ada:s3cret@host/v1", "got 'https://***@host/v1'"),
        ("endpoint", "https://host/v1?key=s3cret&a=s3cret", "got 'https://host/v1?key=***&a=***'"),
        ("api_key_env", "sk-s3cret", "give the variable's name, not what it holds"),
        ("code", {"type": "repository", "repository": "https://s3cret@github.com/a/b"}, "***@git"),
    ],
)
def test_a_secret_in_a_wrong_place_is_refused_and_not_shown(key, value, shown):
    source = {"type": "code-qa", "id": "qa", key: value}

    with pytest.raises(RecipeError) as caught:
        load_recipe("scikit-learn", overrides={"sources": [source]})

    assert shown in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_sections_that_do_not_fit_together_are_refused():
    with pytest.raises(RecipeError, match="block_size 4096 is above model.config.n_positions 512"):
        load_recipe("quickstart", overrides={"tokenization.block_size": 4096})
    with pytest.raises(RecipeError, match="n_embd 256 is not a multiple of n_head 3"):
        load_recipe("quickstart", overrides={"model.config.n_head": 3})
    with pytest.raises(RecipeError, match="split.validation and split.test must both be above 0"):
        load_recipe("quickstart", overrides={"split.test": 0})
    with pytest.raises(RecipeError, match="max_steps must be at least 1, or -1"):
        load_recipe("quickstart", overrides={"training.max_steps": 0})
    with pytest.raises(RecipeError, match="learning_rate: .* finite number"):
        load_recipe("quickstart", overrides={"training.learning_rate": float("inf")})
    with pytest.raises(RecipeError, match="leave nothing to train on"):
        load_recipe("quickstart", overrides={"split.test": 0.95})
    with pytest.raises(RecipeError, match="give either name_or_path or train_vocab_size, not both"):
        load_recipe("quickstart", overrides={"tokenizer.name_or_path": "x"})
    with pytest.raises(RecipeError, match="give either model_name_or_path or config"):
        load_recipe("quickstart", overrides={"model.model_name_or_path": "x"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learning_rate=2e-5", ("training.learning_rate", 2e-5)),
        ("sources.0.path=/a=b", ("sources.0.path", "/a=b")),
        ("fim.fim_rate=0", ("fim.fim_rate", 0)),
        ("adapter=null", ("adapter", None)),
        ("curation.languages=[en, de]", ("curation.languages", ["en", "de"])),
        ("training.gradient_checkpointing=false", ("training.gradient_checkpointing", False)),
    ],
)
def test_an_override_splits_on_the_first_equals_sign_and_reads_yaml(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["training.max_steps", "=3", "a=[1"])
def test_a_malformed_override_shows_the_form(text):
    with pytest.raises(RecipeError, match=re.escape(f"--set {text!r}")):
        parse_override(text)


def test_local_data_replaces_the_source_and_its_name():
    (source,) = load_recipe("quickstart", data="/tmp/My Project").sources

    assert (source.type, source.id, source.path, source.distribution) == (
        "repository",
        "my-project",
        "/tmp/My Project",
        None,
    )
    assert source.allow_unlicensed


def test_a_section_given_as_a_whole_replaces_the_section():
    model = load_recipe("quickstart", overrides={"model": {"model_name_or_path": "a/b"}}).model

    assert (model.model_name_or_path, model.config) == ("a/b", None)


def test_smoke_shrinks_local_data_as_well():
    assert load_recipe("quickstart", smoke=True, data="/tmp/x").sources[0].max_records == 300


def test_a_local_model_folder_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("scikit-learn", overrides={"model.model_name_or_path": "base"})

    assert recipe.model.model_name_or_path == str(tmp_path / "base")


def test_smoke_keeps_a_given_tokenizer_and_caps_the_records():
    recipe = load_recipe("oasst", smoke=True, overrides={"tokenizer.train_vocab_size": 600})

    assert recipe.model.model_name_or_path is None
    assert recipe.tokenizer.train_vocab_size == 600
    assert recipe.sources[0].max_records == 300
    assert recipe.template.name == "starchat"


def test_a_recipe_file_that_is_no_mapping_is_a_clear_error(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match="expected keys and values, got list"):
        load_recipe(str(path))
    path.write_text("a: [\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("training: {seed: 1}\nname: mine\ntraining: {max_steps: 5}\n")
    with pytest.raises(RecipeError, match=r"found the key 'training' twice.* line 3, column 1"):
        load_recipe(str(path))
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match="cannot be read as UTF-8 text"):
        load_recipe(str(path))
    path.write_text("sources: 5\n")
    with pytest.raises(RecipeError, match="sources: "):
        load_recipe(str(path), smoke=True)
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_smoke_yields_to_a_model_or_tokenizer_that_is_named(tmp_path):
    folder = str(tmp_path)

    ours = load_recipe("oasst", smoke=True, overrides={"tokenizer.name_or_path": folder})
    model = load_recipe("oasst", smoke=True, overrides={"model.model_name_or_path": folder})

    assert (ours.tokenizer.name_or_path, ours.tokenizer.train_vocab_size) == (folder, None)
    assert ours.model.config is not None
    assert (model.model.model_name_or_path, model.model.config) == (folder, None)
    assert model.tokenizer.train_vocab_size is None
    with pytest.raises(RecipeError, match="give either name_or_path or train_vocab_size, not both"):
        load_recipe("quickstart", overrides={"tokenizer.name_or_path": folder})


def test_the_overrides_of_one_smoke_recipe_do_not_reach_the_next(tmp_path):
    before = load_recipe("quickstart", smoke=True)

    load_recipe(
        "oasst",
        smoke=True,
        overrides={"model.model_name_or_path": str(tmp_path), "training.max_steps": 3},
    )

    assert load_recipe("quickstart", smoke=True) == before


def write_own_template_recipe(folder, base):
    values = yaml.safe_load(Path("pipelines/recipes/code-alpaca.yaml").read_text())
    values["model"] = {"model_name_or_path": str(base), "revision": "abc"}
    values["template"] = {"name": "model"}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_smoke_keeps_the_own_template_of_a_model_whose_tokenizer_is_here(tmp_path, where):
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (base / where).write_text('{"chat_template": "x"}')

    recipe = load_recipe(write_own_template_recipe(tmp_path, base), smoke=True)

    assert recipe.template.name == "model"
    assert (recipe.tokenizer.name_or_path, recipe.tokenizer.train_vocab_size) == (str(base), None)
    assert recipe.model.config is not None


def test_smoke_keeps_the_own_template_of_a_model_in_the_hubs_cache(tmp_path, monkeypatch):
    folder = tmp_path / "models--owner--chat" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    recipe = load_recipe(write_own_template_recipe(tmp_path, "owner/chat"), smoke=True)

    assert (recipe.template.name, recipe.tokenizer.name_or_path) == ("model", str(folder))


def test_smoke_says_which_template_stands_in_for_one_that_is_not_here(tmp_path, caplog):
    path = write_own_template_recipe(tmp_path, "owner/not-here")

    recipe = load_recipe(path, smoke=True)

    assert (recipe.template.name, recipe.tokenizer.train_vocab_size) == ("chatml", 2048)
    assert "template chatml in the place of the model's own" in caplog.text
    assert "`hf download owner/not-here tokenizer.json" in caplog.text
    assert load_recipe(path).template.name == "model"
