"""DeepSpeed's configuration, generated from the recipe, and DeepSpeed without a compiler.

The configuration holds no optimizer and no scheduler, so that those of the recipe are used: a
`scheduler` in it would silently override learning_rate, warmup and schedule. A user's JSON (the
key `deepspeed` of a hardware file) is merged into it: bucket sizes, overlap, offload and the like
are taken; what the recipe decides is refused where it differs, "auto" means the recipe's value.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from pipelines.errors import RecipeError, did_you_mean
from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware

STAGES = {"zero2": 2, "zero3": 3}
ADAMW = ("Adam", "AdamW")
# They change batches, data or weights behind the recipe's back.
REFUSED = (
    "amp", "autotuning", "compression_training", "curriculum_learning", "data_efficiency",
    "elasticity", "fp16",
)  # fmt: skip
# Top-level keys of DeepSpeed 0.19, which passes over any other without a word.
KEYS = {
    *REFUSED, "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_types", "dataloader_drop_last",
    "disable_allgather", "dump_state", "flops_profiler", "gradient_accumulation_steps",
    "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor", "hybrid_engine",
    "load_universal_checkpoint", "memory_breakdown", "monitor_config", "nebula", "optimizer",
    "pipeline", "prescale_gradients", "scheduler", "seq_parallel_communication_data_type",
    "sparse_attention", "sparse_gradients", "steps_per_print", "tensor_parallel", "tensorboard",
    "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_node_local_storage", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
OFFLOADS = {"offload_optimizer": ("optimizer", "all"), "offload_param": ("all",)}


def deepspeed_config(recipe: Recipe, hardware: Hardware) -> dict[str, Any] | None:
    """Return DeepSpeed's JSON for a recipe on a hardware, or None where it is not used.

    Raises RecipeError where the hardware's own JSON contradicts the recipe.
    """
    if hardware.strategy not in STAGES:
        return None
    problems = deepspeed_problems(recipe, hardware)
    if problems:
        raise RecipeError("; ".join(problems))
    given = {k: v for k, v in (hardware.deepspeed or {}).items() if k not in ("optimizer", "fp16")}
    return _merge(_generate(recipe, hardware), given)


def _generate(recipe: Recipe, hardware: Hardware) -> dict[str, Any]:
    training = recipe.training
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    zero: dict[str, Any] = {
        "stage": STAGES[hardware.strategy],
        "overlap_comm": hardware.device == "cuda",
        "contiguous_gradients": True,
    }
    if hardware.strategy == "zero3":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    for key, values in OFFLOADS.items():
        if hardware.offload in values:
            zero[key] = {"device": "cpu", "pin_memory": hardware.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * hardware.world_size,
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def deepspeed_problems(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Say in one problem where the hardware's DeepSpeed JSON contradicts the recipe."""
    given = hardware.deepspeed
    if given is None or hardware.strategy not in STAGES:
        return []
    misspelt = [
        f"hardware {recipe.hardware}: its DeepSpeed JSON has {key!r}, which DeepSpeed would pass "
        f"over{hint}"
        for key in given
        if key not in KEYS and (hint := did_you_mean(key, KEYS, cutoff=0.8))
    ]
    conflicts = [*_decided(recipe, hardware, given), *_optimizer(recipe, given), *_others(given)]
    if not conflicts:
        return misspelt
    return [
        *misspelt,
        f"hardware {recipe.hardware}: its DeepSpeed JSON contradicts the recipe: "
        + ", ".join(conflicts)
        + '. Take these fields out of the JSON (or set them to "auto"), or change the recipe',
    ]


def offload_devices(hardware: Hardware) -> set[str]:
    """Return where state or weights are kept besides the GPU: cpu, nvme."""
    zero = _section(hardware.deepspeed or {}, "zero_optimization")
    devices = {str(_section(zero, key).get("device", "none")) for key in OFFLOADS}
    return (devices | ({"cpu"} if hardware.offload != "none" else set())) - {"none"}


def _decided(recipe: Recipe, hardware: Hardware, given: dict[str, Any]) -> Iterator[str]:
    """Yield the fields whose value the recipe decides and that have another one."""
    ours = _generate(recipe, hardware)
    reasons = {
        "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
        "gradient_accumulation_steps": "training.gradient_accumulation_steps",
        "train_batch_size": "batch size x accumulation x processes",
        "gradient_clipping": "training.max_grad_norm",
        "bf16.enabled": f"model.dtype {recipe.model.dtype}",
        "zero_optimization.stage": f"strategy {hardware.strategy}",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": "model/ is written from it",
        "zero_allow_untested_optimizer": "the optimizer is torch's AdamW",
        "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW",
    }
    if hardware.offload != "none":
        reasons |= {
            f"zero_optimization.{key}.device": f"offload {hardware.offload}" for key in OFFLOADS
        }
    for field, reason in reasons.items():
        theirs, wanted = _value(given, field), _value(ours, field)
        if theirs in (None, "auto") or wanted is None or theirs == wanted:
            continue
        yield f"{field} {_shown(theirs)} (the recipe: {_shown(wanted)}, {reason})"


def _optimizer(recipe: Recipe, given: dict[str, Any]) -> Iterator[str]:
    """Yield what optimizer and scheduler say otherwise: the recipe's are used."""
    training = recipe.training
    if "scheduler" in given:
        kind = _section(given, "scheduler").get("type")
        yield (
            f"scheduler {_shown(kind)} (the recipe: lr_scheduler_type "
            f"{_shown(training.lr_scheduler_type)}, which DeepSpeed's would override)"
        )
    optimizer = _section(given, "optimizer")
    kind = optimizer.get("type", "auto")
    if kind not in (*ADAMW, "auto"):
        yield f'optimizer.type {_shown(kind)} (the recipe: "AdamW")'
    wanted = {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": 1e-8,
        "adam_w_mode": True,
        "torch_adam": True,
    }
    for name, theirs in _section(optimizer, "params").items():
        if theirs != "auto" and theirs != wanted.get(name) and name != "torch_adam":
            ours = _shown(wanted[name]) if name in wanted else "not set"
            yield f"optimizer.params.{name} {_shown(theirs)} (the recipe: {ours})"


def _others(given: dict[str, Any]) -> Iterator[str]:
    for name in REFUSED:
        enabled = _section(given, name).get("enabled", name in given and name != "fp16")
        if enabled not in (False, "auto"):
            reason = "model.dtype decides" if name in ("fp16", "amp") else "not supported"
            yield f"{name}.enabled {_shown(enabled)} (the recipe: false, {reason})"


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return both, theirs before ours, but ours for "auto"; Trainer fills in other autos."""
    merged = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value)
        elif not (value == "auto" and key in ours):
            merged[key] = value
    return merged


def _value(config: dict[str, Any], field: str) -> Any:
    """Return the value of a dotted field, None where it is not there."""
    *sections, last = field.split(".")
    for section in sections:
        config = _section(config, section)
    return config.get(last)


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    return json.dumps(value)


def disable_compiled_ops() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (CPU); gloo does their work.

    Call it before the process group is made. Without it, DeepSpeed compiles for half a minute
    where there is a compiler and crashes where there is none.
    """
    import deepspeed.ops

    # Set before it is read: reading it probes every op with compiler subprocesses.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
