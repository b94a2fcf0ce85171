"""Quantized bases: refused where they cannot work, trained and merged where they can."""

import json

import pytest
import torch

from pipelines.errors import PreflightError, RecipeError, TrainingError
from pipelines.preflight import checks
from pipelines.recipe import load_recipe
from pipelines.settings.hardware import Hardware
from pipelines.training import quantization
from pipelines.training.adapters import has_adapter
from pipelines.training.attention import check_packing
from pipelines.training.models import build_model, count_parameters, load_trained, save_trained
from pipelines.training.quantization import is_quantized, quantization_problems
from tests.assets.tiny_models import SHAPES, write_base_model, write_chat_tokenizer
from tests.assets.training_runs import make_recipe

GPU = Hardware(device="cuda", strategy="ddp")
FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
FP4 = {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def recipe(base="bigcode/starcoderbase-1b", config=FOUR, adapter=ADAPTER):
    model = {"model_name_or_path": str(base), "dtype": "float32", "quantization_config": config}
    return make_recipe(model=model, adapter=adapter)


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        (
            Hardware(device="cpu", strategy="fsdp2", processes_per_node=2),
            (
                "model.quantization_config: hardware 'cpu' shards weights (fsdp2), which quantized "
                "ones do not allow; set hardware: cpu, or leave quantization_config out and train "
                "LoRA in bfloat16"
            ),
        ),
        (
            Hardware(device="cuda", strategy="zero3"),
            (
                "model.quantization_config: hardware 'cpu' shards weights (zero3), which quantized "
                "ones do not allow; set hardware: gpu, or leave quantization_config out and train "
                "LoRA in bfloat16"
            ),
        ),
        (
            GPU,
            (
                "model.quantization_config needs bitsandbytes, which is not installed; `pip "
                "install -e .[bitsandbytes]` in the checkout, or leave quantization_config out and "
                "train LoRA in bfloat16"
            ),
        ),
    ],
    ids=["fsdp2", "zero3", "not installed"],
)
def test_what_stands_in_the_way_is_said_with_the_way_out(without_bitsandbytes, hardware, message):
    assert quantization_problems(recipe(), hardware, here=True) == [message]
    assert quantization_problems(make_recipe(), hardware, here=True) == []


def test_another_machine_may_have_what_this_one_lacks(without_bitsandbytes):
    assert quantization_problems(recipe(), GPU, here=False) == []


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_strategies_that_keep_frozen_weights_whole_train_a_quantized_base(strategy, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    for device in ("cpu", "cuda"):
        hardware = Hardware(device=device, strategy=strategy, processes_per_node=2)
        assert quantization_problems(recipe(), hardware, here=True) == []


def test_preflight_says_what_a_quantized_base_lacks_on_cpu(without_bitsandbytes, tmp_path):
    base = write_base_model(tmp_path, "gpt_bigcode")
    changes = {"model.model_name_or_path": str(base), "model.revision": None, "hardware": "cpu"}
    changes |= {"tokenization.block_size": 64}
    wanted = load_recipe("scikit-learn", overrides=changes)
    with pytest.raises(PreflightError, match=r"`pip install -e .\[bitsandbytes\]`"):
        checks.check(wanted, tmp_path, train_here=True)


@pytest.mark.parametrize("name", ["scikit-learn", "code-alpaca", "stack-exchange"])
def test_smoke_runs_of_quantized_recipes_need_no_bitsandbytes(without_bitsandbytes, name):
    smoke = load_recipe(name, smoke=True)
    assert smoke.model.quantization_config is None
    assert quantization_problems(smoke, Hardware(device="cpu"), here=True) == []


def test_a_base_does_not_load_quantized_without_bitsandbytes(without_bitsandbytes, tmp_path):
    base = write_base_model(tmp_path, "gpt_bigcode")
    with pytest.raises(TrainingError, match=r"`pip install -e .\[bitsandbytes\]`"):
        build_model(recipe(base), base)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter": None}, "quantized weights cannot be trained; add a section `adapter`"),
        (
            {"model.quantization_config": {"load_in_4bit": True, "load_in_8bit": True}},
            "set either load_in_4bit or load_in_8bit to true",
        ),
        ({"model.quantization_config": {}}, "set either load_in_4bit or load_in_8bit to true"),
        ({"model.quantization_config": {"bits": 4}}, "unknown key"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(overrides, message):
    whole = {"model.quantization_config": FOUR} | overrides
    with pytest.raises(RecipeError, match=message):
        load_recipe("code-alpaca", overrides=whole)


def test_random_weights_are_not_quantized():
    with pytest.raises(RecipeError, match="is for a base model, not for random weights"):
        make_recipe(model__quantization_config=FOUR, adapter=ADAPTER)


def size_of_full_weights(base, tokenizer):
    model = {"model_name_or_path": str(base), "dtype": "float32"}
    return count_parameters(build_model(make_recipe(model=model, adapter=ADAPTER), tokenizer))[0]


def test_a_quantized_model_moves_as_evaluation_moves_it(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    base = write_base_model(tmp_path, "gpt_bigcode")
    model = build_model(recipe(base), base)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model.train()(ids).logits
        moved = model.to("cpu", torch.bfloat16).train()(ids).logits
    assert torch.allclose(before, moved.float(), atol=0.05)


def frozen_state(model):
    """Everything of a model that is not trained: weights, scales and the rest, bit for bit."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: value.clone() for name, value in model.state_dict().items() if name not in trained
    }


@pytest.mark.parametrize("config", [FOUR, EIGHT, FP4], ids=["nf4", "8 bit", "fp4"])
def test_evaluation_on_cpu_is_that_of_training_and_changes_no_weight(config, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    base = write_base_model(tmp_path, "gpt_bigcode")
    model = build_model(recipe(base, config), base)
    before = frozen_state(model)
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    with torch.no_grad():
        training = model.train()(ids).logits
    first = gradients()
    with torch.no_grad():
        evaluated = model.eval()(ids).logits
    again = gradients()

    assert torch.equal(training, evaluated)
    assert {n for n, g in first.items() if g.any()} == {n for n in first if "lora_B" in n}
    assert all(torch.equal(first[name], again[name]) for name in first)
    after = frozen_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", sorted(SHAPES))
@pytest.mark.parametrize("config", [FOUR, EIGHT], ids=["4 bit", "8 bit"])
def test_the_saved_model_is_the_one_that_was_trained(architecture, config, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    base = write_base_model(tmp_path / "base", architecture)
    tokenizer, new_ids = write_chat_tokenizer(tmp_path / "chat", base)
    model = build_model(recipe(base, config), tokenizer)
    assert is_quantized(model.base_model.model)
    assert has_adapter(model)
    assert count_parameters(model)[0] == size_of_full_weights(base, tokenizer)
    check_packing(model, "cpu")

    ids = torch.tensor([[5, 6, 7, *new_ids, 8, 9]])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.sub_(0.5 * parameter.grad)
        expected = model.eval()(input_ids=ids).logits

    save_trained(model, tmp_path / "model", tokenizer, "float32")

    with torch.no_grad():
        merged = load_trained(tmp_path / "model")(ids).logits
    assert torch.allclose(merged, expected, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
