"""TrainingArguments of a recipe on a hardware."""

from pathlib import Path

from transformers import TrainingArguments

from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.settings.training import OWN_KEYS
from pipelines.training.deepspeed_config import deepspeed_config, offload_devices
from pipelines.training.fsdp import fsdp_config, reduce_in_float32

# Longer than the heartbeat waits, whose error says what hung; torch's own default without it.
COLLECTIVE_SECONDS = 1800


def training_arguments(
    recipe: Recipe, hardware: Hardware, folder: Path, *, fresh: bool, blocks: list[str]
) -> TrainingArguments:
    """Return TrainingArguments for a recipe; every metric is logged, the meter thins them out.

    `blocks` are the classes of the model's blocks (`fsdp.block_classes`), for fsdp2 only.
    """
    training = recipe.training
    same = training.model_dump(exclude=set(OWN_KEYS))
    stall = 60 * (training.stall_minutes or 0)
    on_cpu = hardware.device == "cpu"
    sharding = fsdp_config(recipe, hardware, blocks)
    if sharding is not None:
        same["gradient_checkpointing"] = False  # fsdp_config has it
    arguments = TrainingArguments(
        output_dir=str(folder),
        **same,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=fresh,
        save_strategy="steps",
        # One kernel a step on CUDA; what is offloaded is updated several times as fast on the CPU.
        optim="adamw_torch" if on_cpu and not offload_devices(hardware) else "adamw_torch_fused",
        bf16=recipe.model.dtype == "bfloat16",
        use_cpu=on_cpu,
        ddp_backend=_backend(hardware),
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        data_seed=training.seed,
        deepspeed=deepspeed_config(recipe, hardware),
        fsdp=sharding is not None,
        fsdp_config=sharding,
        remove_unused_columns=False,
        report_to=list(training.report_to) or "none",
        run_name=folder.parent.name,
        ddp_timeout=int(COLLECTIVE_SECONDS + stall),
        disable_tqdm=True,
    )
    reduce_in_float32(arguments)
    if hardware.is_alone:
        keep_to_one_gpu(arguments)
    return arguments


def keep_to_one_gpu(arguments: TrainingArguments) -> None:
    """Make a process that is alone use its first GPU only.

    Trainer takes all that it sees, for nn.DataParallel. Hiding them in the environment would be too
    late: some library has asked the driver by then.
    """
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # noqa: SLF001


def _backend(hardware: Hardware) -> str | None:
    """Return the backend of the process group; FSDP2 clips offloaded gradients on the CPU."""
    if hardware.is_alone:
        return None
    if hardware.device == "cpu":
        return "gloo"
    offloads = hardware.strategy == "fsdp2" and hardware.offload == "all"
    return "cuda:nccl,cpu:gloo" if offloads else "nccl"
