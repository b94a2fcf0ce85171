"""What keeps training.torch_compile from working, or from paying, said before anything runs."""

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.training.base_model import find_config

COMPILERS = ("gcc", "clang")  # what Triton looks for


def compile_problems(
    recipe: Recipe,
    hardware: Hardware,
    *,
    here: bool,
    which: Callable[[str], str | None] = shutil.which,
) -> list[str]:
    """Say why a recipe's blocks cannot be compiled, or not to any gain; `here` checks the machine.

    All reasons in one text, each with what to do about it.
    """
    if not recipe.training.torch_compile:
        return []
    if hardware.device == "cpu":
        reasons = [
            f"hardware {recipe.hardware!r} has no NVIDIA GPU to compile for (set hardware: gpu)"
        ]
    else:
        reasons = [*_recipe_reasons(recipe, hardware), *(_machine_reasons(which) if here else ())]
    return [f"training.torch_compile: {'; '.join(reasons)}; or set it to false"] if reasons else []


def _recipe_reasons(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Return what in a recipe or its hardware breaks the graphs of the blocks."""
    model, adapter, strategy = recipe.model, recipe.adapter, hardware.strategy
    reasons = []
    if strategy not in ("ddp", "zero2"):
        reasons.append(
            f"strategy {strategy} gathers weights within the blocks that are compiled (choose "
            "hardware with strategy ddp or zero2)"
        )
    if model.quantization_config is not None:
        reasons.append("a quantized base is not compiled (leave model.quantization_config out)")
    if adapter is not None and adapter.use_dora:
        reasons.append("DoRA breaks each block into many graphs (set adapter.use_dora: false)")
    if model.attn_implementation not in ("auto", "varlen"):
        reasons.append(
            f"attention {model.attn_implementation!r} has a mask of another shape in every batch "
            "(set model.attn_implementation: auto)"
        )
    elif _attention_dropout(recipe):
        reasons.append(
            "varlen attention is needed, which has no dropout, and the model has "
            f"{_attention_dropout(recipe)} (set model.dropout: 0.0)"
        )
    if model.dtype != "bfloat16":
        reasons.append("the attention kernel computes in bfloat16 (set model.dtype: bfloat16)")
    return reasons


def _machine_reasons(which: Callable[[str], str | None]) -> list[str]:
    """Return what Triton, which makes the kernels, lacks on this machine."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    reasons = []
    if not any(which(name) for name in COMPILERS):
        reasons.append(f"a C compiler is needed, and PATH has no {' or '.join(COMPILERS)}")
    if not header.is_file():
        reasons.append(f"Python's headers are needed, and {header} is missing (python3-dev)")
    return reasons


def _attention_dropout(recipe: Recipe) -> float:
    """Return the rate that a recipe's attention will have; 0.0 where the base is not known yet."""
    model = recipe.model
    if model.dropout is not None:
        return model.dropout
    if model.config is not None:
        return 0.1 if model.config.model_type == "gpt_bigcode" else 0.0
    config = find_config(str(model.model_name_or_path), model.revision) or {}
    default = 0.1 if config.get("model_type") == "gpt_bigcode" else 0.0
    return float(config.get("attn_pdrop", config.get("attention_dropout", default)))
