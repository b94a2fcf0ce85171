"""The models and optimizers of the arms, made of random weights on the device itself."""

import contextlib
from typing import Any

import torch

from benchmarks.gpu.arms import SHAPES, Arm
from pipelines.training import varlen

TARGETS = ["c_attn", "c_proj", "c_fc"]
LEARNING_RATE, WEIGHT_DECAY = 2e-5, 0.1
CPU_BACKEND = "aot_eager"  # of torch.compile in a dry run: it needs no compiler


def build_model(arm: Arm, device: torch.device) -> Any:
    """Return the model of an arm, in train mode, with its adapter and compiled where it says so."""
    from transformers import AutoModelForCausalLM

    config = SHAPES[arm.shape].config(arm.dropout)
    name = arm.attention
    if arm.attention == "varlen":
        config.attn_pdrop = 0.0
        name = varlen.register()
    whole = arm.precision == "autocast" and not arm.lora
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if whole else torch.bfloat16, attn_implementation=name
        )
    if arm.lora:
        model = add_adapter(model, arm)
    if arm.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arm.compiled:
        compile_blocks(model, device)
    return model.train()


def add_adapter(model: Any, arm: Arm) -> Any:
    """Add LoRA r16 to every matrix of the blocks; the seeds drop 5 % of its input."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=TARGETS, bias="none",
        lora_dropout=0.05 if arm.dropout else 0.0,
    )  # fmt: skip
    return get_peft_model(model, config, autocast_adapter_dtype=arm.precision == "autocast")


def compile_blocks(model: Any, device: torch.device) -> None:
    """Compile each block for itself: all share one compilation, in seconds instead of minutes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backend = "inductor" if device.type == "cuda" else CPU_BACKEND
    for block in base.transformer.h:
        block.compile(backend=backend, dynamic=False)


def computing(arm: Arm, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of a forward pass: autocast to bfloat16, or none."""
    if arm.precision == "autocast":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


class Optimizer:
    """AdamW with gradient clipping at 1.0, over the trained parameters.

    Where they are in bfloat16 it holds float32 copies, updates those and copies them back: with
    bfloat16 alone a small update is rounded away.
    """

    def __init__(self, model: Any, *, fused: bool) -> None:
        """Take the trained parameters of a model."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._low = [p for p in self._trained if p.dtype != torch.float32]
        self._masters = [p.detach().float() for p in self._low]
        updated = [p for p in self._trained if p.dtype == torch.float32] + self._masters
        self._adam = torch.optim.AdamW(
            updated, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused or None
        )

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update, and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        for master, parameter in zip(self._masters, self._low, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self._adam.step()
        if self._low:
            torch._foreach_copy_(self._low, self._masters)
        for parameter in (*self._trained, *self._masters):
            parameter.grad = None
