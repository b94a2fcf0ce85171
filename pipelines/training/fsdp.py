"""FSDP2 (torch's fully_shard, through Trainer): weights, gradients and optimizer state in shards.

Each block of the model is a unit of its own, gathered when it computes. Checkpoints are sharded
too (torch.distributed.checkpoint), so no rank ever holds the whole model while training.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from pipelines.errors import TrainingError
from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware

# The blocks of the architectures that models from `config` have; for the dry run only.
BLOCKS = {
    "gpt_bigcode": "GPTBigCodeBlock",
    "starcoder2": "Starcoder2DecoderLayer",
    "llama": "LlamaDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
}


def fsdp_config(recipe: Recipe, hardware: Hardware, blocks: list[str]) -> dict[str, Any] | None:
    """Return TrainingArguments.fsdp_config, or None for another strategy.

    `blocks` are the class names that `block_classes` finds in the model.
    """
    if hardware.strategy != "fsdp2":
        return None
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": blocks,
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_offload": hardware.offload == "all",
        # Trainer's own would gather each block once more for nothing.
        "activation_checkpointing": recipe.training.gradient_checkpointing,
    }


def block_classes(
    model: Any, asked: str = "strategy fsdp2", instead: str = "use strategy zero3"
) -> list[str]:
    """Return the class names of a model's blocks; TrainingError where it does not tell them.

    The error says what `asked` for them, and what to do `instead`.
    """
    found = {type(module).__name__ for module in model.modules()}
    blocks = sorted(found & set(getattr(model, "_no_split_modules", None) or ()))
    if not blocks:
        raise TrainingError(
            f"{asked}: {model.config.model_type} does not name its blocks (_no_split_modules); "
            f"{instead}"
        )
    return blocks


def reduce_in_float32(arguments: Any) -> None:
    """Let bf16 runs compute in bf16 but add gradients up in float32 (accelerate: bf16 too)."""
    if arguments.fsdp_plugin_args is None or not arguments.bf16:
        return
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
    )


@contextlib.contextmanager
def sharding_on_cpu(arguments: Any) -> Iterator[None]:
    """Let the accelerate of a Trainer that is made in this block shard on CPU as it does on GPUs.

    accelerate 1.15 reads FSDP's settings for accelerators only; on CPU it trains with DDP instead
    and does not say so.
    """
    from accelerate.state import DistributedType, PartialState

    state = PartialState._shared_state  # noqa: SLF001 - AccelerateState copies it once
    kind = state.get("distributed_type")
    if arguments.fsdp_plugin_args is None or kind != DistributedType.MULTI_CPU:
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        state["distributed_type"] = kind


def check_sharded(trainer: Any) -> None:
    """Raise TrainingError where a Trainer that was asked for FSDP2 does not use it."""
    if trainer.args.fsdp_plugin_args is not None and not trainer.accelerator.is_fsdp2:
        raise TrainingError(
            "strategy fsdp2: the installed accelerate does not shard on this device "
            f"({trainer.accelerator.distributed_type}); use strategy zero3"
        )


def gather_weights(model: Any) -> dict[str, Any]:
    """Return a sharded model's whole state dict on the CPU of rank 0; nothing on other ranks.

    All ranks have to call it. One weight at a time is whole on each of them.
    """
    from torch import distributed
    from torch.distributed.tensor import DTensor

    weights = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            # Offloaded shards are on the CPU, which NCCL cannot gather from.
            shard: Any = tensor.to(tensor.device_mesh.device_type)
            whole = shard.full_tensor()
        else:
            whole = tensor
        if distributed.get_rank() == 0:
            weights[name] = whole.cpu()
    return weights
