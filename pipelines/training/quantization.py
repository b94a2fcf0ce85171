"""Frozen bases in 4 or 8 bit, by bitsandbytes: what they need, how they load, how they end."""

import os
from importlib.util import find_spec
from typing import Any

from pipelines.errors import TrainingError
from pipelines.hardware_settings import Hardware
from pipelines.model_settings import Quantization
from pipelines.recipe import Recipe

WAY_OUT = "set hardware: gpu, or leave quantization_config out and train LoRA in bfloat16"
NOT_ON_CPU = f"model.quantization_config: such weights are trained on NVIDIA GPUs only; {WAY_OUT}"
MISSING = (
    "model.quantization_config needs bitsandbytes, which is not installed; `pip install -e "
    ".[bitsandbytes]` in the checkout, or leave quantization_config out and train LoRA in bfloat16"
)


def quantization_problems(recipe: Recipe, hardware: Hardware, *, here: bool) -> list[str]:
    """Say why a recipe's quantized base cannot be trained; `here` checks this machine too."""
    if recipe.model.quantization_config is None:
        return []
    if hardware.device == "cpu":
        return [NOT_ON_CPU]
    if hardware.strategy != "ddp":
        problem = f"model.quantization_config: hardware {recipe.hardware!r} shards weights"
        return [f"{problem} ({hardware.strategy}), which quantized ones do not allow; {WAY_OUT}"]
    return [MISSING] if here and find_spec("bitsandbytes") is None else []


def quantized_loading(quantization: Quantization | None, dtype: str) -> dict[str, Any]:
    """Return the options of from_pretrained that load a base quantized, onto this rank's GPU.

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
    """Freeze a quantized base and keep its norms, embeddings and head in float32 (QLoRA)."""
    from peft import prepare_model_for_kbit_training

    # Trainer turns checkpointing on, by the recipe.
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def dequantize(model: Any, dtype: str) -> Any:
    """Return a quantized base in full weights, whose values are those it was trained with."""
    import torch

    return model.dequantize(dtype=getattr(torch, dtype))
