"""Hardware files, and what is generated from them: DeepSpeed's JSON, FSDP's configuration."""

import pytest

from pipelines.errors import RecipeError
from pipelines.hardware_files import hardware_names, read_hardware
from pipelines.recipe import load_hardware, load_recipe
from pipelines.runs import open_run, run_key_parts
from pipelines.settings.hardware import LAUNCH_KEYS, Hardware
from pipelines.training.deepspeed_config import deepspeed_config, deepspeed_problems
from pipelines.training.environment import hardware_of
from pipelines.training.fsdp import BLOCKS, fsdp_config
from pipelines.training.hardware_checks import launch_problems, offload_problems
from tests.assets.training_runs import CLUSTER_VARIABLES, make_recipe, make_run, write_hardware


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made"))


# Hardware files


@pytest.mark.parametrize("name", hardware_names())
def test_every_shipped_hardware_loads_and_fits_its_name(name):
    hardware = load_hardware(name)

    strategy, _, offload = name.partition("-")
    assert hardware.num_nodes == 1
    assert (offload == "offload") == (hardware.offload != "none")
    if name not in ("cpu", "gpu"):
        assert (hardware.device, hardware.strategy) == ("cuda", strategy)


def test_a_hardware_file_of_ones_own_is_given_by_its_path(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 5}}')
    path = write_hardware(
        tmp_path, "device: cpu\nstrategy: zero2\nnum_nodes: 2\ndeepspeed: ds.json\n"
    )

    recipe = load_recipe("quickstart", overrides={"hardware": path})
    hardware = load_hardware(recipe.hardware)

    assert recipe.hardware == path
    assert (hardware.num_nodes, hardware.world_size) == (2, 2)
    assert hardware.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}


def test_all_problems_of_recipe_and_hardware_file_are_said_at_once(tmp_path):
    path = write_hardware(
        tmp_path,
        "device: gpu\nstratgy: zero2\noffload: all\nstrategy: ddp\nrdzv_endpoint: node0\n"
        "launcher: deepspeed\ndeepspeed: none.json\n",
    )
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart", overrides={"hardware": path, "training.max_step": 3})

    text = str(error.value)
    for part in (
        "training.max_step: unknown key, did you mean 'max_steps'?",
        f"hardware {path}: deepspeed: {tmp_path}/none.json: no such file",
        "device: Input should be 'cpu' or 'cuda', got 'gpu'",
        "stratgy: unknown key, did you mean 'strategy'?",
        "rdzv_endpoint: 'node0' is no HOST:PORT, e.g. node0.example.org:29500",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"strategy": "ddp", "offload": "all"}, "offload: ddp can do none, got 'all'"),
        ({"strategy": "zero2", "offload": "all"}, "zero2 can do none or optimizer, got 'all'"),
        ({"strategy": "fsdp2", "offload": "optimizer"}, "fsdp2 can do none or all"),
        ({"strategy": "fsdp2"}, "fsdp2 shards over 2 processes at least"),
        ({"strategy": "ddp", "deepspeed": {}}, "deepspeed: only for strategy zero2 and zero3"),
        ({"launcher": "deepspeed"}, "hostfile: required for launcher deepspeed"),
        ({"hostfile": "x"}, "hostfile: only for launcher deepspeed, got launcher 'torchrun'"),
        ({"slurm": {"time": "1"}}, "slurm: only for launcher slurm"),
        ({"launcher": "slurm", "slurm": {"nodes": 3}}, "slurm.nodes: a long option of sbatch"),
        ({"launcher": "slurm", "slurm": {"time": "1\nrm"}}, "slurm.time: one line is expected"),
    ],
)
def test_a_hardware_that_contradicts_itself_is_refused(values, problem):
    with pytest.raises(ValueError, match="hardware|") as error:
        Hardware.model_validate({"device": "cpu", **values})
    assert problem in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", "device: [", None])
def test_an_unreadable_hardware_file_is_one_error_with_its_name(tmp_path, content):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=f"hardware {path}: ") as error:
        read_hardware(str(path))
    assert "\n" not in str(error.value)


def test_how_ranks_are_started_is_no_part_of_a_runs_key_but_kept_with_it(tmp_path, made):
    run, _ = made
    plain = write_hardware(tmp_path, "device: cpu\nstrategy: ddp\nnum_nodes: 2\n")
    recipe = make_recipe(hardware=plain)
    before = run_key_parts(recipe, run.refs())
    opened = open_run(recipe, run.refs(), tmp_path / "runs")
    write_hardware(
        tmp_path,
        "device: cpu\nstrategy: ddp\nnum_nodes: 2\nlauncher: slurm\nslurm: {time: 5}\n"
        "rdzv_endpoint: a:1\nprice_per_hour: 3\n",
    )

    assert run_key_parts(recipe, run.refs()) == before
    assert not LAUNCH_KEYS & set(before["hardware"])
    assert hardware_of(opened).launcher == "torchrun"
    again = open_run(recipe, run.refs(), tmp_path / "runs")
    assert (again.path, hardware_of(again).slurm) == (opened.path, {"time": 5})


def test_another_deepspeed_json_is_another_run(tmp_path, made):
    run, _ = made
    keys = []
    for size in (5, 6):
        path = write_hardware(
            tmp_path,
            f"device: cpu\ndeepspeed: {{zero_optimization: {{reduce_bucket_size: {size}}}}}\n",
        )
        keys.append(run_key_parts(make_recipe(hardware=path), run.refs()))
    assert keys[0]["hardware"] != keys[1]["hardware"]


# DeepSpeed's JSON


STARCHAT = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def zero3(given, **changes):
    values = {"device": "cuda", "strategy": "zero3", "processes_per_node": 8, "deepspeed": given}
    return Hardware.model_validate(values | changes)


def test_a_users_json_is_merged_and_auto_means_the_recipes_value():
    recipe = load_recipe("oasst")

    config = deepspeed_config(recipe, zero3(STARCHAT))

    plain = deepspeed_config(recipe, zero3(None))
    assert config == plain | {
        "steps_per_print": 2000,
        "zero_optimization": plain["zero_optimization"]
        | {
            "reduce_bucket_size": "auto",
            "sub_group_size": 1e9,
            "offload_optimizer": {"device": "cpu"},
        },
    }


def test_what_contradicts_the_recipe_is_refused_in_one_error_with_both_values():
    recipe = load_recipe("oasst")
    given = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 0.1, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupDecayLR"},
        "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": False},
        "elasticity": {"enabled": True},
        "comms_logger": {"enabled": True},
    }
    with pytest.raises(RecipeError) as error:
        deepspeed_config(recipe, zero3(given))

    text = str(error.value)
    for part in (
        "hardware zero3: its DeepSpeed JSON contradicts the recipe: ",
        "train_batch_size 64 (the recipe: 256, ",
        "train_micro_batch_size_per_gpu 2 (the recipe: 4, training.per_device_train_batch_size)",
        "gradient_accumulation_steps 4 (the recipe: 8, training.gradient_accumulation_steps)",
        "gradient_clipping 0.5 (the recipe: 1.0, training.max_grad_norm)",
        "bf16.enabled false (the recipe: true, model.dtype bfloat16)",
        "fp16.enabled true (the recipe: false, model.dtype decides)",
        'optimizer.type "Lion" (the recipe: "AdamW")',
        "optimizer.params.lr 0.1 (the recipe: 2e-05)",
        "optimizer.params.betas [0.9, 0.95] (the recipe: [0.9, 0.999])",
        'scheduler "WarmupDecayLR" (the recipe: lr_scheduler_type "cosine"',
        "zero_optimization.stage 2 (the recipe: 3, strategy zero3)",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save false (the recipe: true",
        "elasticity.enabled true (the recipe: false, not supported)",
        'Take these fields out of the JSON (or set them to "auto"), or change the recipe',
    ):
        assert part in text
    assert "comms_logger" not in text
    assert text.count("\n") == 0
    assert launch_problems(recipe, zero3(given), here=False) == [text]


def test_a_misspelt_key_of_deepspeed_is_refused_and_one_it_may_know_is_taken():
    given = {"schedular": {"type": "WarmupLR"}, "a_key_of_next_year": 1}
    (problem,) = deepspeed_problems(load_recipe("oasst"), zero3(given))

    assert problem == (
        "hardware zero3: its DeepSpeed JSON has 'schedular', which DeepSpeed would pass over, "
        "did you mean 'scheduler'?"
    )


@pytest.mark.parametrize("scheduler", [{"type": "WarmupLR"}, {"type": "WarmupLR", "params": {}}])
def test_a_scheduler_is_refused_even_where_all_of_it_is_auto(scheduler):
    (problem,) = deepspeed_problems(load_recipe("oasst"), zero3({"scheduler": scheduler}))
    assert "which DeepSpeed's would override" in problem


def test_offload_is_generated_and_a_json_may_not_turn_it_off():
    recipe = load_recipe("oasst")
    zero = deepspeed_config(recipe, zero3(None, offload="all"))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    given = {"zero_optimization": {"offload_param": {"device": "none"}}}
    (problem,) = deepspeed_problems(recipe, zero3(given, offload="all"))
    assert 'offload_param.device "none" (the recipe: "cpu", offload all)' in problem


def test_offload_to_nvme_needs_a_compiler_and_offload_to_the_cpu_none():
    nvme = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/disk"}}}
    (problem,) = offload_problems(zero3(nvme), which=lambda name: None)
    assert "a C++ compiler and ninja cannot be found on PATH" in problem
    assert offload_problems(zero3(nvme), which=lambda name: name) == []
    assert offload_problems(zero3(None, offload="all"), which=lambda name: None) == []


# FSDP2


@pytest.mark.parametrize("model_type", BLOCKS)
def test_the_blocks_of_the_dry_run_are_those_of_the_models(model_type):
    from transformers import AutoModelForCausalLM

    from pipelines.training.fsdp import block_classes
    from tests.assets.tiny_models import tiny_config

    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    assert block_classes(model) == [BLOCKS[model_type]]


def test_fsdp_has_its_own_activation_checkpointing():
    hardware = load_hardware("fsdp2")
    for asked in (True, False):
        recipe = make_recipe(training__gradient_checkpointing=asked)
        config = fsdp_config(recipe, hardware, ["Block"])
        assert config["activation_checkpointing"] is asked
        assert config["transformer_layer_cls_to_wrap"] == ["Block"]
    assert fsdp_config(recipe, load_hardware("ddp"), ["Block"]) is None
