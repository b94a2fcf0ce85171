"""DeepSpeed's configuration, generated from the recipe, and DeepSpeed without a compiler.

The configuration holds no optimizer and no scheduler, so that those of the recipe are used: a
`scheduler` in it would silently override learning_rate, warmup and schedule.
"""

import sys
from typing import Any

from pipelines.hardware_settings import Hardware
from pipelines.recipe import Recipe

STAGES = {"zero2": 2, "zero3": 3}


def deepspeed_config(recipe: Recipe, hardware: Hardware) -> dict[str, Any] | None:
    """Return DeepSpeed's JSON for a recipe on a hardware, or None where plain DDP is asked for."""
    if hardware.strategy not in STAGES:
        return None
    training = recipe.training
    world_size = hardware.num_nodes * hardware.processes_per_node
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    zero: dict[str, Any] = {
        "stage": STAGES[hardware.strategy],
        "overlap_comm": hardware.device == "cuda",
        "contiguous_gradients": True,
    }
    if hardware.strategy == "zero3":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def disable_compiled_ops() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (CPU); gloo does their work.

    Call it before the process group is made. Without it, DeepSpeed compiles for half a minute
    where there is a compiler and crashes where there is none.
    """
    import deepspeed.ops

    # Set before it is read: reading it probes every op with compiler subprocesses.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
