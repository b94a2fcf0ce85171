"""Before training: sizes of models, memory, steps, learning rates, and what fits instead."""

import shlex
from dataclasses import replace

import pytest

from pipelines.errors import PreflightError
from pipelines.overrides import parse_override
from pipelines.preflight import checks, fitting
from pipelines.preflight.fitting import Asked, alternatives, memory_problems
from pipelines.preflight.machine import Machine
from pipelines.recipe import load_hardware, load_recipe
from pipelines.settings.hardware import Hardware
from pipelines.settings.training import Adapter
from pipelines.training.activations import Numbers, block_bytes, chunk_size
from pipelines.training.base_model import find_shape
from pipelines.training.duration import count_steps, estimate_length, flops_per_token
from pipelines.training.estimate import GIB, estimate_memory
from pipelines.training.schedule import (
    draw_schedule,
    learning_rates,
    schedule_problems,
    warmup_steps,
)
from pipelines.training.shapes import KNOWN, known_shape, read_shape

LAPTOP = Machine(0, None, None, 24 * GIB)
ONE_80 = Machine(1, "NVIDIA A100", 80e9, 500 * GIB)
ONE_24, ONE_6 = replace(ONE_80, gpu_memory=24e9), replace(ONE_80, gpu_memory=6e9)
EIGHT_24 = Machine(8, "NVIDIA GeForce RTX 3090", 24 * GIB, 2000 * GIB)
SIZES = {
    "vocab_size": 640, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "intermediate_size": 200, "max_position_embeddings": 128,
}  # fmt: skip


def config_of(model_type, **changes):
    from transformers import AutoConfig

    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "intermediate_size":
             "n_inner", "num_hidden_layers": "n_layer", "max_position_embeddings":
             "n_positions"}  # fmt: skip
    sizes = SIZES | changes
    if model_type == "gpt_bigcode":
        sizes = {names.get(k, k): v for k, v in sizes.items() if k != "num_key_value_heads"}
    return AutoConfig.for_model(model_type, bos_token_id=0, eos_token_id=0, pad_token_id=1, **sizes)


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "starcoder2", "llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model_on_the_meta_device(model_type, tied):
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(model_type, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    assert read_shape(config.to_dict()).parameters == model.num_parameters()


def test_well_known_models_have_the_parameters_of_their_cards():
    stated = {
        "bigcode/starcoderbase-1b": 1.137, "bigcode/starcoderbase": 15.52,
        "bigcode/starcoder2-3b": 3.03, "bigcode/starcoder2-7b": 7.17,
        "bigcode/starcoder2-15b": 15.96, "Qwen/Qwen2.5-Coder-0.5B": 0.494,
        "Qwen/Qwen2.5-Coder-1.5B": 1.54, "Qwen/Qwen2.5-Coder-3B": 3.09,
        "Qwen/Qwen2.5-Coder-7B": 7.62, "Qwen/Qwen2.5-Coder-14B": 14.77,
        "Qwen/Qwen2.5-Coder-32B": 32.76,
    }  # fmt: skip

    counted = {name: KNOWN[name].parameters / 1e9 for name in stated}

    assert counted == pytest.approx(stated, rel=4e-3)
    assert known_shape("Qwen/Qwen2.5-Coder-7B-Instruct") == KNOWN["Qwen/Qwen2.5-Coder-7B"]
    assert known_shape("somebody/else") is None


def test_adapters_have_the_parameters_that_peft_gives_them():
    one = Adapter(r=8, target_modules=("c_attn", "c_proj", "c_fc"))
    large = Adapter(r=16, target_modules=("c_attn", "c_proj"))

    assert known_shape("bigcode/starcoderbase-1b").adapter_parameters(one) == 5_554_176
    assert known_shape("bigcode/starcoderbase").adapter_parameters(large) == 35_553_280


def saved_bytes(config, adapter, *, layers, tokens=64):
    """Return the bytes that torch saves for the backward pass of a model of so many layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if adapter:
        values = adapter.model_dump() | {"target_modules": list(adapter.target_modules)}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **values))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, kept = {}, []

    def pack(tensor):
        kept.append(tensor)  # or its address would be given to another
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 640, (2, tokens))
    positions = torch.arange(tokens).remainder(tokens // 2)[None].expand(2, tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("gpt_bigcode", None), ("starcoder2", ("q_proj", "v_proj")), ("llama", None), ("qwen2", None)],
)
def test_a_block_saves_the_bytes_that_are_counted(model_type, targets):
    config = config_of(model_type)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    adapter = Adapter(r=4, target_modules=targets) if targets else None

    sizes = [saved_bytes(config, adapter, layers=layers) for layers in (1, 3)]
    counted = block_bytes(
        read_shape(config.to_dict()), Numbers(4, 4, autocast=False, on_cuda=False), 64, "sdpa",
        adapter,
    )  # fmt: skip

    assert counted == pytest.approx((sizes[1] - sizes[0]) / 2 / 128, rel=0.01)


def test_chunks_of_the_head_are_those_of_training():
    from pipelines.training import head_loss

    sizes = (1, 1000, 4096, 16_384, 70_000, 10**6)

    assert [chunk_size(n) for n in sizes] == [head_loss.chunk_size(n) for n in sizes]


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        # Anchors: 1B full mixed is 17 GiB without activations; 15.5B in bfloat16 29, in 4 bit 8.
        ({"model.model_name_or_path": "bigcode/starcoderbase-1b", "hardware": "gpu"}, 17, 32),
        ({"adapter": fitting.LORA, "hardware": "gpu"}, 29, 40),
        ({"adapter": fitting.LORA, "hardware": "gpu",
          "model.quantization_config": {"load_in_4bit": True}}, 8, 19),
        ({"hardware": "zero3"}, 29, 60),
        # All at once on one GPU: 231 GiB, and what a step takes.
        ({"hardware": "gpu"}, 231, 300),
    ],
)  # fmt: skip
def test_memory_of_known_cases_is_what_they_are_known_to_take(changes, low, high):
    recipe = load_recipe("oasst", overrides=changes)

    memory = estimate_memory(recipe, find_shape(recipe), load_hardware(recipe.hardware))

    assert low < memory.total / GIB < high


def test_a_quantized_base_passes_through_main_memory_whole_and_in_8_bit_keeps_inputs():
    def memory(bits, hardware, **changes):
        overrides = {"model.quantization_config": {f"load_in_{bits}bit": True}, **changes}
        recipe = load_recipe("scikit-learn", overrides=overrides)
        return estimate_memory(recipe, find_shape(recipe), hardware)

    cpu, gpu = (Hardware(device=device, strategy="ddp") for device in ("cpu", "cuda"))
    small = {
        "training.per_device_train_batch_size": 1,
        "training.per_device_eval_batch_size": 1,
        "tokenization.block_size": 512,
    }
    whole = 2 * 1.137e9  # in bfloat16
    found = memory(4, cpu, **small)
    assert found.moment == "loading the base"
    assert found.buffers == pytest.approx(whole, rel=0.01)
    assert memory(4, gpu).host > whole > memory(4, gpu).weights
    # 24 layers keep two norms in float32, what attention returns, and what the MLP's last matrix is
    # given in float32, of each of 32,768 tokens; and one whole input more.
    extra = memory(8, gpu).activations - memory(4, gpu).activations
    assert extra == pytest.approx(24 * (16_384 + 4_096 + 32_768) * 32_768, rel=0.1)


def test_checkpointing_takes_less_memory_and_longer_rows_more():
    def total(**changes):
        overrides = {f"training.{k}" if k != "block_size" else "tokenization.block_size": v
                     for k, v in changes.items()}  # fmt: skip
        recipe = load_recipe("scikit-learn", overrides=overrides)
        return estimate_memory(recipe, find_shape(recipe), load_hardware("gpu")).total

    assert total(gradient_checkpointing=True) < total(gradient_checkpointing=False) / 2
    assert total(block_size=8192) > total(block_size=2048) > total(block_size=512)
    assert total(per_device_train_batch_size=1) < total(per_device_train_batch_size=16)


@pytest.mark.parametrize("name", ["oasst", "gpteacher", "code-alpaca", "stack-exchange"])
def test_the_large_recipes_fit_the_gpus_of_80_gb_they_are_written_for(name):
    recipe = load_recipe(name)
    machine = Machine(8, "NVIDIA A100", 80e9, 2000 * GIB)

    hardware = load_hardware(recipe.hardware)

    assert memory_problems(recipe, find_shape(recipe), hardware, machine) == []


@pytest.mark.parametrize(
    ("recipe", "changes", "machine"),
    [
        ("oasst", {}, LAPTOP),
        ("oasst", {}, ONE_80),
        ("oasst", {}, EIGHT_24),
        ("gpteacher", {"hardware": "gpu"}, ONE_80),
        ("oasst", {"hardware": "gpu", "adapter": fitting.LORA}, ONE_24),
        ("scikit-learn", {"training.gradient_checkpointing": False}, ONE_6),
    ],
)  # fmt: skip
def test_a_run_that_cannot_fit_gets_two_commands_that_do(recipe, changes, machine):
    found = [each for each in alternatives(Asked(recipe, None, changes), machine)
             if each.where == "here"]  # fmt: skip

    assert len(found) == 2
    assert found[0].asked.command != found[1].asked.command
    for each in found:
        words = shlex.split(each.asked.command)
        assert words[:2] == ["starloom", "run"]
        overrides = dict(
            parse_override(words[i + 1]) for i, word in enumerate(words) if word == "--set"
        )
        pasted = load_recipe(words[2], overrides=overrides, smoke="--smoke" in words)
        hardware = load_hardware(pasted.hardware)
        assert memory_problems(pasted, find_shape(pasted), hardware, machine) == []
        assert hardware.device == "cpu" or hardware.processes_per_node <= machine.gpus
        assert pasted == each.asked.load()


def test_a_host_without_gpu_says_what_oasst_needs_and_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checks, "look_around", lambda: LAPTOP)

    with pytest.raises(PreflightError) as error:
        checks.check(load_recipe("oasst"), tmp_path, train_here=True)

    text = str(error.value)
    assert "needs 8 GPU(s), 0 here (each with" in text
    assert "full fine-tuning of 15.5 B parameters" in text
    assert "Fits here: `starloom run oasst --smoke`" in text
    assert "`starloom run quickstart`" in text
    assert "Fits on one GPU of 80 GB: `starloom run oasst --set 'adapter=" in text
    assert "accept its license on https://huggingface.co/bigcode/starcoderbase" in text
    assert "`hf auth login`" in text
    assert "\n" not in text


def test_a_cpu_run_too_large_for_main_memory_is_refused_with_the_parts(tmp_path, monkeypatch):
    small = replace(LAPTOP, memory=1.5 * GIB)
    monkeypatch.setattr(checks, "look_around", lambda: small)
    monkeypatch.setattr(checks, "sample_problems", lambda recipe: (None, []))
    large = {"model.config.n_embd": 1024, "model.config.n_head": 16, "model.config.n_layer": 12}

    with pytest.raises(
        PreflightError, match=r"memory: full fine-tuning of 132 M parameters .* per process"
    ):
        checks.check(load_recipe("quickstart", overrides=large), tmp_path, train_here=True)


def test_a_gpu_that_others_have_filled_is_warned_of_and_does_not_stop_the_run(
    tmp_path, monkeypatch, caplog
):
    recipe = load_recipe("quickstart", overrides={"hardware": "gpu"})
    needed = estimate_memory(recipe, find_shape(recipe), load_hardware("gpu")).total

    def warnings(free):
        caplog.clear()
        monkeypatch.setattr(checks, "look_around", lambda: replace(ONE_80, gpu_free=free))
        checks.check(recipe, tmp_path, train_here=True)
        return [record.message for record in caplog.records if "free now" in record.message]

    assert warnings(needed + GIB) == warnings(None) == []
    (warning,) = warnings(GIB)
    assert warning.startswith("memory: a GPU has 1 GiB free now, the run needs about ")
    assert "CUDA_VISIBLE_DEVICES" in warning


def test_steps_are_those_that_the_trainer_computes():
    from transformers import TrainingArguments

    recipe = load_recipe("oasst", overrides={"hardware": "gpu"})
    hardware = load_hardware("gpu")  # 4 rows x 8 batches a step

    assert [count_steps(recipe, hardware, rows) for rows in (1, 32, 33, 1000)] == [3, 3, 6, 96]
    arguments = TrainingArguments(output_dir="unused", warmup_steps=0.03, report_to="none")
    assert warmup_steps(recipe, 96) == arguments.get_warmup_steps(96) == 3
    assert estimate_length(recipe, hardware, None, None) is None
    built = estimate_length(recipe, hardware, 1000, None)
    assert (built.steps, built.rough) == (96, False)
    assert estimate_length(recipe, hardware, None, 1_000_000).rough


def test_the_drawn_schedule_is_the_one_of_the_trainer():
    recipe = load_recipe("quickstart")

    rates = learning_rates(recipe, 240, [0, 24, 48, 239])
    lines = draw_schedule(recipe, 240)

    assert rates == pytest.approx([0, 7.5e-4, 1.5e-3, 1.004e-7], rel=1e-2)
    assert lines[0].startswith(" 1.5e-03 |")
    assert "█" in lines[0]
    assert max(map(len, lines)) <= 90
    assert lines[-1].strip() == (
        "first 0.0e+00, warmup 48 steps, peak 1.5e-03 at step 49, last 1.0e-07, cosine"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"warmup_steps": 300}, "300 of 240 steps are warmup, so that learning_rate 0.0015 is"),
        ({"warmup_steps": 150}, "150 of 240 steps are warmup, more than half"),
        ({"lr_scheduler_type": "constant"}, "48 steps, but lr_scheduler_type constant has no"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_named(changes, problem):
    recipe = load_recipe("quickstart", overrides={f"training.{k}": v for k, v in changes.items()})

    found = schedule_problems(recipe, 240)

    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_single_step_of_warmup_is_drawn_and_said_to_teach_nothing():
    recipe = load_recipe("qwen-coder")

    lines, problems = draw_schedule(recipe, 1), schedule_problems(recipe, 1)

    assert not any("█" in line for line in lines)
    assert lines[-1].strip().startswith("first 0.0e+00, warmup 1 steps, peak 0.0e+00 at step 1")
    (problem,) = problems
    assert problem.startswith("training.warmup_steps: 1 of 1 steps are warmup, which begins at 0")
    assert problem.endswith("set it to 0, or raise max_steps or num_train_epochs")


def test_operations_of_a_token_are_those_of_the_anchors():
    full = load_recipe("oasst", overrides={"training.gradient_checkpointing": False})
    lora = load_recipe("code-alpaca", overrides={"training.gradient_checkpointing": False})

    one = flops_per_token(full, known_shape("bigcode/starcoderbase-1b"))
    large = flops_per_token(lora, known_shape("bigcode/starcoderbase"))

    assert one / 1e9 == pytest.approx(6.9, rel=0.03)
    assert large / 1e9 == pytest.approx(62.9, rel=0.03)
