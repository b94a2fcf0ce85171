"""TrainingArguments of a recipe on a hardware."""

from pathlib import Path

from transformers import TrainingArguments

from pipelines.hardware_settings import Hardware
from pipelines.recipe import Recipe
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training_settings import OWN_KEYS

# Longer than the heartbeat waits, whose error says what hung; torch's own default without it.
COLLECTIVE_SECONDS = 1800


def training_arguments(
    recipe: Recipe, hardware: Hardware, folder: Path, *, fresh: bool
) -> TrainingArguments:
    """Return TrainingArguments for a recipe; every metric is logged, the meter thins them out."""
    training = recipe.training
    same = training.model_dump(exclude=set(OWN_KEYS))
    stall = 60 * (training.stall_minutes or 0)
    on_cpu = hardware.device == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        **same,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=fresh,
        save_strategy="steps",
        optim="adamw_torch",
        bf16=recipe.model.dtype == "bfloat16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else "nccl",
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        data_seed=training.seed,
        deepspeed=deepspeed_config(recipe, hardware),
        remove_unused_columns=False,
        report_to=list(training.report_to) or "none",
        run_name=folder.parent.name,
        ddp_timeout=int(COLLECTIVE_SECONDS + stall),
        disable_tqdm=True,
    )
