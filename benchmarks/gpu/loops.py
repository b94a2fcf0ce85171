"""The three ways to train that the arms compare: a bare loop, the seeds' script, and starloom's."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.arms import Arm
from benchmarks.gpu.documents import PAD, Documents, pad_documents
from benchmarks.gpu.models import (
    CPU_BACKEND,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Optimizer,
    computing,
)
from benchmarks.gpu.windows import Windows
from pipelines.training.collate import Collator, FlatShape
from pipelines.training.head_loss import HeadLoss

MANY = 10**6
# What torchrun gives its only rank.
ONE_RANK = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip


def train_bare(arm: Arm, model: Any, documents: Documents, windows: Windows) -> None:
    """Run forward, backward and AdamW on packed rows, and nothing else."""
    device = next(model.parameters()).device
    head = None if arm.head == "dense" else HeadLoss(model, arm.head)
    optimizer = Optimizer(model, fused=arm.fused)
    batches = packed_batches(arm, documents, device)
    while True:
        for batch in itertools.islice(batches, arm.accumulation):
            real = batch["input_ids"] != PAD
            trained = (batch["labels"] != -100).sum() * arm.accumulation
            windows.add(real.sum(), real.numel(), ((batch["position_ids"] + 1) * real).sum())
            with computing(arm, device):
                if head is None:
                    loss = model(**batch, use_cache=False, num_items_in_batch=trained).loss
                else:
                    loss = head(model, batch) / trained
            loss.backward()
        optimizer.step()
        if windows.step():
            check_loss(loss * arm.accumulation)
            return


def check_loss(loss: torch.Tensor) -> None:
    """Raise ValueError where the last loss is not a number: then the speed means nothing."""
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss)}")


def packed_batches(
    arm: Arm, documents: Documents, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield micro-batches without end; all of one shape where they are flat or compiled."""
    rows = documents.rows()
    groups = [rows[i : i + arm.rows] for i in range(0, len(rows) - arm.rows + 1, arm.rows)]
    fixed = None
    if arm.attention == "varlen":
        # Each row may need a document of pad tokens to be full.
        most = max(sum(len(row.lengths) + 1 for row in group) for group in groups)
        fixed = FlatShape(arm.rows * documents.block, most, documents.block)
    collate = Collator(PAD, fixed=fixed)
    for group in itertools.cycle(groups):
        yield to_device(collate(group), device)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a batch from pinned memory, without waiting for it."""
    if device.type != "cuda":
        return batch
    return {
        name: value.pin_memory().to(device, non_blocking=True)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in batch.items()
    }


def train_script(arm: Arm, model: Any, documents: Documents, windows: Windows) -> None:
    """Train as the scripts of the seeds: transformers' Trainer on padded batches.

    Their samples come tokenized here, which is in their favour.
    """
    from transformers import Trainer, TrainingArguments

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(documents.lengths)

        def __getitem__(self, index: int) -> Any:
            return documents.ids(index)

    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(v) for name, v in pad_documents(samples).items()}

    class Measured(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            lengths = inputs["attention_mask"].sum(1)
            pairs = (lengths * (lengths + 1) // 2).sum()
            windows.add(lengths.sum(), inputs["input_ids"].numel(), pairs)
            return super().training_step(model, inputs, *rest, **options)

    Measured(
        model=model,
        args=TrainingArguments(**trainer_arguments(arm, model), optim="adamw_torch"),
        train_dataset=Samples(),
        data_collator=collate,
        callbacks=[stop_when_full(windows)],
    ).train()


def trainer_arguments(arm: Arm, model: Any) -> dict[str, Any]:
    """Return the TrainingArguments of both arms that run transformers' Trainer."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": MANY, "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY, "lr_scheduler_type": "cosine", "warmup_steps": 100,
        "per_device_train_batch_size": arm.rows, "gradient_accumulation_steps": arm.accumulation,
        "gradient_checkpointing": arm.checkpointing, "bf16": True, "use_cpu": on_cpu,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10,
        "remove_unused_columns": False,
    }  # fmt: skip


def stop_when_full(windows: Windows) -> Any:
    """Return a callback that counts steps and ends training with the last window."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = windows.step()

    return Steps()


class Enough(Exception):
    """All windows are full: what follows in a run, a saved model, is not measured."""


def train_starloom(arm: Arm, documents: Documents, windows: Windows) -> Any:
    """Train a run as `starloom run` does: a rank's entry point, as torchrun starts it.

    Returns the model, which the recipe describes and the rank builds.
    """
    from transformers import TrainerCallback

    from benchmarks.gpu.runs import make_run
    from pipelines.training import compiled, trainer

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if windows.step():
                raise Enough

    class Measured(trainer.PackedTrainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            models.append(self.model)
            self.add_callback(Steps())

        def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            real = inputs["input_ids"] != PAD
            windows.add(real.sum(), real.numel(), ((inputs["position_ids"] + 1) * real).sum())
            return super().training_step(model, inputs, *rest, **options)

    models: list[Any] = []
    on_cpu = arm.shape == "tiny"
    if on_cpu:
        compiled.BACKEND = CPU_BACKEND
    os.environ |= ONE_RANK
    trainer.PackedTrainer = Measured
    trainer.disable_compiled_ops = lambda: None  # DeepSpeed's; it is not installed, nor used
    with tempfile.TemporaryDirectory() as folder:
        run, stages = make_run(arm, documents, Path(folder), on_cpu=on_cpu)
        with contextlib.suppress(Enough):
            trainer.train(run, stages["pack"], stages["tokenizer"])
    return models[0]
