"""Frozen bases in 4 or 8 bit, by bitsandbytes: what they need, how they load, how they end."""

import os
import types
from importlib.util import find_spec
from typing import Any

from pipelines.errors import TrainingError
from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.settings.model import Quantization

# What splits weights over ranks: of 4-bit ones FSDP2 cannot gather the scales, and in 8 bit
# bitsandbytes puts the whole weight back where ZeRO-3 took it away.
SHARDING = ("zero3", "fsdp2")
MISSING = (
    "model.quantization_config needs bitsandbytes, which is not installed; `pip install -e "
    ".[bitsandbytes]` in the checkout, or leave quantization_config out and train LoRA in bfloat16"
)


def quantization_problems(recipe: Recipe, hardware: Hardware, *, here: bool) -> list[str]:
    """Say why a recipe's quantized base cannot be trained; `here` checks this machine too."""
    if recipe.model.quantization_config is None:
        return []
    if hardware.strategy in SHARDING:
        other = "gpu" if hardware.device == "cuda" else "cpu"
        problem = (
            f"model.quantization_config: hardware {recipe.hardware!r} shards weights "
            f"({hardware.strategy}), which quantized ones do not allow; set hardware: {other}, or "
            "leave quantization_config out and train LoRA in bfloat16"
        )
        return [problem]
    return [MISSING] if here and find_spec("bitsandbytes") is None else []


def quantized_loading(quantization: Quantization | None, dtype: str) -> dict[str, Any]:
    """Return the options of from_pretrained that load a base quantized, onto this rank's device.

    Raises TrainingError without bitsandbytes.
    """
    if quantization is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise TrainingError(MISSING)
    import torch
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if quantization.load_in_4bit:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": quantization.bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": getattr(torch, dtype),
        }
    rank = os.environ.get("LOCAL_RANK", "0")
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": device}}


def is_quantized(model: Any) -> bool:
    """Return whether a model was loaded quantized."""
    return bool(getattr(model, "is_quantized", False))


def prepare_quantized(model: Any) -> None:
    """Freeze a quantized base and keep its norms, embeddings and head in float32 (QLoRA).

    On CPU its quantized layers stay in training mode, and compute alike in training and evaluation.
    """
    from peft import prepare_model_for_kbit_training

    # Trainer turns checkpointing on, by the recipe.
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if model.device.type == "cpu":
        _stay_in_training(model)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                # Or these views of the mapped file would keep all of it in memory.
                parameter.data = parameter.data.clone()


def _quantized_layers(model: Any) -> list[str]:
    """Return the names of the layers that bitsandbytes computes."""
    return [
        name
        for name, layer in model.named_modules()
        if type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")
    ]


def _stay_in_training(model: Any) -> None:
    """Pin the quantized layers, which hold neither dropout nor a running mean, to training mode.

    In evaluation mode, on a CPU, bitsandbytes repacks 4-bit weights for instructions that some have
    (AVX512-BF16), which rounds their scales and from which no gradient comes back; and in 8 bit it
    rounds activations, as it does not while it trains.
    """
    for name in _quantized_layers(model):
        layer = model.get_submodule(name)
        layer.train()
        layer.train = types.MethodType(_unchanged, layer)


def _unchanged(layer: Any, mode: bool = True) -> Any:
    """Take the place of nn.Module.train, and so of eval."""
    return layer


def dequantize(model: Any, dtype: str) -> Any:
    """Return a quantized base in full weights on the CPU, the values that it was trained with.

    Layer by layer, for a GPU with room for a base in 4 bit has none for all of it in 16.
    """
    import torch
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name in _quantized_layers(model):
        layer = model.get_submodule(name)
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        with torch.device("meta"):
            whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        whole.weight = torch.nn.Parameter(weight.to("cpu", getattr(torch, dtype)))
        whole.bias = layer.bias
        model.set_submodule(name, whole)
    model.hf_quantizer.remove_quantization_config(model)
    return model.to("cpu")
