"""Adapters: LoRA, rsLoRA, DoRA over a frozen base, and what becomes of them after training."""

import functools
import logging
from pathlib import Path
from typing import Any

from pipelines.errors import TrainingError
from pipelines.settings.training import Adapter
from pipelines.training.embeddings import trained_rows
from pipelines.training.quantization import dequantize, is_quantized, prepare_quantized
from pipelines.training.targets import describe_targets, leaf_names, resolve_targets

logger = logging.getLogger(__name__)

ADAPTER, WEIGHTS = "adapter", "adapter_model.safetensors"


def add_adapter(
    model: Any, adapter: Adapter, new_ids: list[int], revision: str | None = None
) -> Any:
    """Return the model wrapped in an adapter that also trains the rows of new ids.

    The base's `revision` goes into the adapter's files. Logs which layers each target pattern
    matches; RecipeError where one matches none.
    """
    from peft import LoraConfig, get_peft_model

    found = resolve_targets(model, adapter.target_modules)
    for line in describe_targets(found):
        logger.info("adapter.target_modules: %s", line)
    if is_quantized(model):
        prepare_quantized(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=leaf_names(name for names in found.values() for name in names)
        if "all-linear" in found
        else list(found),
        revision=revision,
        trainable_token_indices=trained_rows(model, new_ids) or None,
        **adapter.model_dump(exclude={"target_modules"}),
    )
    model = get_peft_model(model, config)
    # "auto" would write both whole embeddings into every checkpoint after a resize.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def has_adapter(model: Any) -> bool:
    """Return whether a model is wrapped in an adapter."""
    return hasattr(model, "merge_and_unload")


def save_and_merge(model: Any, folder: Path, dtype: str) -> Any:
    """Write a model's adapter to `folder/adapter` and return the whole, merged model.

    A quantized base is dequantized first: merging into 4-bit weights would round the adapter away,
    and merging into the original ones would give another model than the one that was trained.
    """
    from peft import PeftModel

    model.save_pretrained(folder / ADAPTER)
    (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's card with nothing filled in
    check_adapter(model, folder / ADAPTER / WEIGHTS)
    if is_quantized(model.base_model.model):
        base = dequantize(model.unload(), dtype)
        model = PeftModel.from_pretrained(base, folder / ADAPTER, torch_device="cpu")
    return model.merge_and_unload()


def check_adapter(model: Any, path: Path) -> None:
    """Raise TrainingError unless a saved adapter has every trained tensor, and learned something.

    LoRA starts with all lora_B at zero, so one that still has them so is the base model.
    """
    from safetensors import safe_open

    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with safe_open(path, framework="pt") as file:
        saved = list(file.keys())
        learned = [name for name in saved if "lora_B" in name and bool(file.get_tensor(name).any())]
    if len(saved) < len(trained):
        raise TrainingError(
            f"{path}: the adapter was saved with {len(saved)} of its {len(trained)} tensors; the "
            "checkpoint of the last step has them"
        )
    if not learned:
        raise TrainingError(
            f"{path}: the adapter has learned nothing: every lora_B of its {len(saved)} tensors is "
            "zero; raise training.learning_rate, or training.max_steps above the warmup"
        )
    logger.info("adapter: %d tensors saved", len(saved))
