"""Configurations of other scripts become recipes; what is not taken as it is, is told."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import RecipeError
from pipelines.importing.config import import_config
from pipelines.importing.names import IGNORED, RENAMED
from pipelines.recipe import Recipe, load_recipe
from pipelines.settings.training import Training

STARCHAT = Path(__file__).parent.parent / "assets" / "starchat"


def recipe_of(text):
    return Recipe.model_validate(yaml.safe_load(text))


def imported(tmp_path, deepspeed=None, /, **values):
    """Return (recipe, report) of a configuration of a few keys."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "bigcode/starcoder", **values}))
    if deepspeed is not None:
        (tmp_path / "ds.json").write_text(json.dumps(deepspeed))
    text, lines = import_config(path, tmp_path / "ds.json" if deepspeed is not None else None)
    return recipe_of(text), lines


def test_starchats_own_files_become_its_recipe():
    text, lines = import_config(
        STARCHAT / "config.yaml", STARCHAT / "deepspeed_z3_config_bf16.json"
    )
    recipe = recipe_of(text)
    source, template, training = recipe.sources[0], recipe.template, recipe.training

    assert (recipe.name, recipe.hardware) == ("starchat", "zero3")
    assert recipe.model.model_name_or_path == "bigcode/starcoderbase"
    assert (recipe.model.dtype, recipe.adapter) == ("bfloat16", None)
    assert (source.type, source.dataset) == ("oasst", "OpenAssistant/oasst1")
    assert (template.name, template.variant) == ("starchat", "no_system")
    assert recipe.tokenization.block_size == 1024
    wanted = {
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "num_train_epochs": 3,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
        "logging_steps": 8,
        "save_steps": 500,
        "seed": 42,
    }
    assert {name: getattr(training, name) for name in wanted} == wanted
    assert training.model_fields_set == set(wanted)
    assert [line for line in lines if not line.startswith("ignored")] == [
        "renamed dataset_name: HuggingFaceH4/oasst1_en is the source of type oasst",
        (
            "note dataset_name: HuggingFaceH4/oasst1_en was removed from the Hub; rebuilt from "
            "OpenAssistant/oasst1"
        ),
        "renamed dialogue_template: template {name: starchat, variant: no_system}",
        "note loss: only the assistant's turns are trained; the original trained every token",
        "renamed bf16: model.dtype: bfloat16",
        "renamed evaluation_strategy: eval_strategy since transformers 4.46",
        "conflict save_total_limit: None keeps all checkpoints; the last 2 are kept",
        "renamed warmup_ratio: training.warmup_steps",
        (
            "conflict deepspeed.scheduler: WarmupLR overrode lr_scheduler_type cosine in the "
            "original: it had a warm-up, then a constant learning rate. The recipe follows cosine; "
            "to repeat it set training.lr_scheduler_type: constant_with_warmup"
        ),
        (
            "conflict deepspeed.train_batch_size: 32 rows a step are right for 1 process(es) only; "
            "it follows from the hardware"
        ),
        "note hardware: zero3: check its number of processes",
    ]


def test_what_is_written_loads_as_a_recipe_file(tmp_path):
    text, _ = import_config(STARCHAT / "config.yaml")
    (tmp_path / "starchat.yaml").write_text(text)

    assert load_recipe(str(tmp_path / "starchat.yaml")) == recipe_of(text)
    assert text.startswith("# Imported from config.yaml")


def test_the_adapter_loses_the_layers_its_model_does_not_have(tmp_path):
    targets = ["c_proj", "c_attn", "q_attn"]
    recipe, lines = imported(
        tmp_path, load_in_8bit=True, lora_r=16, lora_alpha=32, lora_dropout=0.05,
        lora_target_modules=targets,
    )  # fmt: skip

    assert recipe.adapter.model_dump() == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ("c_proj", "c_attn"),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
    }
    assert recipe.model.quantization_config.load_in_8bit
    assert recipe.hardware == "gpu"
    assert (
        "dropped target_modules: q_attn dropped: the model has no such layer "
        "(it has: c_attn, c_proj, c_fc)"
    ) in lines


@pytest.mark.parametrize(
    ("targets", "kept"),
    [
        ("c_proj,q_proj", ("c_proj", "q_proj")),
        (["gate_proj"], ("all-linear",)),
        (None, ("all-linear",)),
    ],
)
def test_targets_are_those_of_the_architecture(tmp_path, targets, kept):
    recipe, _ = imported(
        tmp_path, model_name_or_path="bigcode/starcoder2-3b", lora_r=8, target_modules=targets
    )
    assert recipe.adapter.target_modules == kept


def test_an_adapter_that_is_off_and_quantization_that_is_off_are_ignored(tmp_path):
    recipe, lines = imported(
        tmp_path, use_peft=False, lora_r=8, load_in_4bit=False, use_nested_quant=True
    )
    assert (recipe.adapter, recipe.model.quantization_config) == (None, None)
    assert "ignored lora_r: the adapter is off" in lines
    assert "ignored use_nested_quant: the base is not quantized" in lines


def test_what_transformers_takes_by_default_is_written_out(tmp_path):
    recipe, lines = imported(tmp_path, dataset_name="me/rows")

    assert recipe.training.learning_rate == 5e-5
    assert recipe.training.lr_scheduler_type == "linear"
    assert recipe.training.per_device_train_batch_size == 8
    assert "default lr_scheduler_type: linear, as transformers takes it where it is not given" in (
        lines
    )
    assert recipe.sources[0].dataset == "me/rows"
    assert "note sources.0: name the license of the rows: sources.0.license" in lines


def test_names_of_finetune_py_are_understood(tmp_path):
    recipe, _ = imported(
        tmp_path, model_path="bigcode/starcoder", dataset_name="ArmelR/stack-exchange-instruction",
        input_column_name="question", output_column_name="response", seq_length=2048,
        batch_size=1, num_warmup_steps=100, no_gradient_checkpointing=False, log_freq=100,
        eval_freq=100, save_freq=1000, max_steps=10_000,
    )  # fmt: skip

    training = recipe.training
    assert recipe.tokenization.block_size == 2048
    assert (training.per_device_train_batch_size, training.warmup_steps) == (1, 100)
    assert training.gradient_checkpointing
    assert (training.logging_steps, training.eval_steps, training.save_steps) == (100, 100, 1000)
    assert recipe.sources[0].columns.completion == "response"


@pytest.mark.parametrize(
    ("values", "template", "line"),
    [
        (
            {"dataset_name": "HuggingFaceH4/CodeAlpaca_20K"},
            ("question-answer", True),
            "note template: question-answer with train_on_prompt, as finetune.py",
        ),
        (
            {"dataset_name": "me/rows", "output_column_name": "answer"},
            ("question-answer", True),
            "note template: question-answer with train_on_prompt, as finetune.py",
        ),
        (
            {"data_path": "rows.json"},
            ("alpaca", False),
            "note template: alpaca, as the script that names its data data_path",
        ),
        (
            {"train_file": "rows.json"},
            ("plain", False),
            "note template: none is named, so plain is taken; see template.name",
        ),
    ],
)
def test_rows_are_rendered_as_the_script_did_that_names_them_so(tmp_path, values, template, line):
    recipe, lines = imported(tmp_path, **values)

    assert (recipe.template.name, recipe.template.train_on_prompt) == template
    assert line in lines


def test_a_deepspeed_file_that_is_named_but_not_given_is_asked_for(tmp_path):
    recipe, lines = imported(tmp_path, deepspeed="conf/ds_z3.json")

    assert recipe.hardware == "gpu"
    assert (
        "note deepspeed: conf/ds_z3.json is not read, so hardware does not follow it; give it too: "
        "--deepspeed conf/ds_z3.json"
    ) in lines
    assert any(
        line.startswith("ignored deepspeed: ") for line in imported(tmp_path, {}, deepspeed="x")[1]
    )


def test_targets_are_named_once_and_rows_of_text_by_their_column(tmp_path):
    targets = "c_proj,c_attn,q_attn,c_fc,c_proj"
    recipe, lines = imported(
        tmp_path, dataset_name="me/code", data_column="content", lora_target_modules=targets,
        lr=5e-4, eos_token_id=49152, fsdp_transformer_layer_cls_to_wrap="GPTBigCodeBlock",
    )  # fmt: skip

    assert recipe.adapter.target_modules == ("c_proj", "c_attn", "c_fc")
    assert recipe.sources[0].columns.text == "content"
    assert recipe.training.learning_rate == 5e-4
    assert not [line for line in lines if line.startswith("unknown")]


@pytest.mark.parametrize(
    ("deepspeed", "strategy", "line"),
    [
        (
            {"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam", "params": {"lr": 1}}},
            "zero3",
            (
                "conflict deepspeed.optimizer.params.lr: 1 contradicts training.learning_rate: "
                "5e-05; the recipe follows 5e-05"
            ),
        ),
        (
            {"gradient_accumulation_steps": 4, "zero_optimization": {"stage": 3}},
            "zero3",
            (
                "conflict deepspeed.gradient_accumulation_steps: 4 contradicts "
                "training.gradient_accumulation_steps: 1; the recipe follows 1"
            ),
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR"}, "zero_optimization": {"stage": 3}},
            "zero3",
            "ignored deepspeed.scheduler: WarmupDecayLR is what lr_scheduler_type linear does",
        ),
        (
            {"fp16": {"enabled": True}},
            "ddp",
            "conflict deepspeed.fp16: float16 is not supported; model.dtype decides",
        ),
        (
            {"train_batch_size": 12},
            "ddp",
            (
                "conflict deepspeed.train_batch_size: 12 is no multiple of the 8 rows that each "
                "process has in a step; it follows from the hardware"
            ),
        ),
    ],
)
def test_where_deepspeeds_file_says_another_thing_it_is_told(tmp_path, deepspeed, strategy, line):
    recipe, lines = imported(tmp_path, deepspeed)

    assert line in lines
    assert recipe.hardware == {"zero3": "zero3", "ddp": "gpu"}[strategy]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"fp16": True}, "conflict fp16: float16 is not supported; bfloat16 is used"),
        (
            {"lr_scheduler_type": "polynomial"},
            (
                "conflict lr_scheduler_type: 'polynomial' is none of cosine, linear, constant, "
                "constant_with_warmup; cosine taken"
            ),
        ),
        (
            {"warmup_steps": 5, "warmup_ratio": 0.1},
            "conflict warmup_ratio: 0.1 is overruled by warmup_steps, as before",
        ),
        (
            {"learning_rat": 1},
            (
                "unknown learning_rat: no key of a known script, did you mean 'learning_rate'?; "
                "left out"
            ),
        ),
        (
            {"dialogue_template": "mine"},
            (
                "conflict dialogue_template: 'mine' is none of default, no_system, alpaca; default "
                "taken"
            ),
        ),
        (
            {"batch_size": 2, "per_device_train_batch_size": 4},
            "conflict batch_size: 2 is not taken: per_device_train_batch_size says the same thing",
        ),
        (
            {"block_size": 64, "max_seq_length": 128},
            "conflict max_seq_length: 128 is not taken: block_size says the same thing",
        ),
        ({"dataset_name": None}, "missing dataset_name: no data is named; set sources.0.path"),
    ],
)
def test_contradictions_and_unknown_keys_are_told(tmp_path, values, line):
    assert line in imported(tmp_path, **values)[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be parsed"),
        ("- 1", "expected keys and values, got list"),
        ("{model_name_or_path: a/b, seed: 1, seed: 2}", "found the key 'seed' twice"),
        ("block_size: 1024", "model_name_or_path: required, but not set"),
        ("{model_name_or_path: a/b, learning_rate: fast}", "training.learning_rate: .*'fast'"),
        ("{model_name_or_path: bigcode/starcoder, lora_r: 4, target_modules: [[a]]}", "target_mod"),
        ("{model_name_or_path: a/b, save_total_limit: many}", "training.save_total_limit: "),
    ],
)
def test_what_makes_no_recipe_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        import_config(tmp_path / "config.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        import_config(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"none\.json: cannot be read"):
        import_config(STARCHAT / "config.yaml", tmp_path / "none.json")


SCALARS = (
    st.sampled_from([1, 2, 64, 0.5, True, "cosine", "zero3"])
    | st.none()
    | st.booleans()
    | st.integers(-5, 3000)
    | st.floats(0, 1)
    | st.text(max_size=8)
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
KEYS = st.sampled_from(sorted({*RENAMED, *IGNORED, *Training.model_fields})) | st.text(
    "abc_", min_size=1
)
ZERO = st.fixed_dictionaries({}, optional={"stage": VALUES, "offload_param": VALUES})
JSON = st.dictionaries(
    st.sampled_from(["scheduler", "optimizer", "train_batch_size", "gradient_clipping", "bf16"]),
    VALUES,
)


@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(values=st.dictionaries(KEYS, VALUES, max_size=6), zero=ZERO, deepspeed=JSON)
def test_any_configuration_gives_a_recipe_or_one_clear_error(tmp_path, values, zero, deepspeed):
    values = {key: value for key, value in values.items() if key != "model_name_or_path"}
    try:
        recipe, lines = imported(tmp_path, {**deepspeed, "zero_optimization": zero}, **values)
    except RecipeError:
        return
    told = " ".join(lines)
    taken = {*recipe.model_fields_set, *recipe.training.model_fields_set}
    taken |= {
        "block_size",
        "revision",
        "target_modules",
        *(recipe.adapter or recipe).model_fields_set,
    }
    taken |= {*recipe.fim.model_fields_set, "model_name_or_path", "name_or_path", "seq_length"}
    assert all(key in told or key in taken for key in values)
