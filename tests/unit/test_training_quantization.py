"""Quantized bases: refused where they cannot work, trained and merged where they can."""

import json

import pytest
import torch

from pipelines import preflight
from pipelines.errors import PreflightError, RecipeError, TrainingError
from pipelines.hardware_settings import Hardware
from pipelines.recipe import load_recipe
from pipelines.training import quantization
from pipelines.training.adapters import has_adapter
from pipelines.training.attention import check_packing
from pipelines.training.models import build_model, count_parameters, load_trained, save_trained
from pipelines.training.quantization import is_quantized, quantization_problems
from tests.assets.tiny_models import write_base_model, write_chat_tokenizer
from tests.assets.training_runs import make_recipe

GPU = Hardware(device="cuda", strategy="ddp")
FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
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
            Hardware(device="cpu", strategy="zero2"),
            (
                "model.quantization_config: such weights are trained on NVIDIA GPUs only; set "
                "hardware: gpu, or leave quantization_config out and train LoRA in bfloat16"
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
    ids=["cpu", "zero3", "not installed"],
)
def test_what_stands_in_the_way_is_said_with_the_way_out(without_bitsandbytes, hardware, message):
    assert quantization_problems(recipe(), hardware, here=True) == [message]
    assert quantization_problems(make_recipe(), hardware, here=True) == []


def test_another_machine_may_have_what_this_one_lacks(without_bitsandbytes):
    assert quantization_problems(recipe(), GPU, here=False) == []


def test_preflight_refuses_a_quantized_base_on_cpu(tmp_path):
    with pytest.raises(PreflightError, match="trained on NVIDIA GPUs only; set hardware: gpu"):
        preflight.check(recipe(tmp_path), tmp_path)


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


@pytest.mark.parametrize("architecture", ["gpt_bigcode", "llama"])
@pytest.mark.parametrize(("config", "tolerance"), [(FOUR, 1e-5), (EIGHT, 2e-2)])
def test_the_saved_model_is_the_one_that_was_trained(architecture, config, tolerance, tmp_path):
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
        expected = model(input_ids=ids).logits  # in train mode: bitsandbytes repacks in eval mode

    save_trained(model, tmp_path / "model", tokenizer, "float32")

    with torch.no_grad():  # 8 bit quantizes activations too, which the saved model does not
        assert torch.allclose(
            load_trained(tmp_path / "model")(ids).logits, expected, atol=tolerance
        )
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
