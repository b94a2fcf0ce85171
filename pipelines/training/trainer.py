"""One rank of a training run: `-m pipelines.training.trainer --run R --dataset D --tokenizer T`.

`packed_trainer` has the loop, `finish` the end; this file chooses and puts together. Invariant: the
weights are in `model/` before anything else that can fail at the end, and `training.json` is
written last.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils.logging import disable_progress_bar

from pipelines.engine import usage
from pipelines.errors import StarloomError
from pipelines.recipe import Recipe, load_hardware
from pipelines.runs import Run
from pipelines.training.arguments import training_arguments
from pipelines.training.attention import check_packing, use_attention
from pipelines.training.budgets import Limits
from pipelines.training.callbacks import (
    Meter,
    StepAgreement,
    sum_over_ranks,
)
from pipelines.training.checkpoints import (
    Layout,
    Policy,
    check_layout,
    newest_checkpoint,
    read_progress,
    remove_incomplete,
    step_of,
)
from pipelines.training.collate import PackedDataset, PassedDataset
from pipelines.training.compiled import compile_training
from pipelines.training.deepspeed_config import disable_compiled_ops
from pipelines.training.environment import hardware_of, leave_group
from pipelines.training.finish import METRICS, commit_model, finish
from pipelines.training.flops import Speed, count_flops, find_peak
from pipelines.training.fsdp import block_classes, check_sharded, sharding_on_cpu
from pipelines.training.head_loss import HeadLoss
from pipelines.training.models import build_model, count_parameters, load_tokenizer
from pipelines.training.packed_trainer import HeldOut, PackedTrainer
from pipelines.training.reporters import prepare_reporters
from pipelines.training.watchdog import Heartbeat

logger = logging.getLogger(__name__)


def train(run: Run, dataset_dir: Path, tokenizer_dir: Path) -> None:
    """Train a run from its newest complete checkpoint to its last step, a limit, or SIGTERM."""
    recipe, hardware = run.recipe(), hardware_of(run)
    leave_group(hardware)
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if hardware.device == "cpu":
        disable_compiled_ops()
    layout = Layout.of(recipe.training, hardware)
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        check_layout(checkpoint, layout)
    prepare_reporters(run)
    # Model and adapter come before TrainingArguments: PEFT cannot be added to sharded weights.
    model = build_model(recipe, tokenizer_dir)
    parameters = count_parameters(model)
    use_attention(model, recipe.model.attn_implementation)
    check_packing(model, "cpu" if hardware.device == "cpu" else f"cuda:{local_rank}")
    head_loss = HeadLoss(model, recipe.model.head_loss, half=recipe.model.dtype == "bfloat16")
    logger.info("head loss: %s", head_loss)
    tokenizer = load_tokenizer(tokenizer_dir)
    train_rows = PassedDataset(dataset_dir, rehash=local_rank == 0)
    validation = PackedDataset(dataset_dir, "validation", rehash=local_rank == 0)
    meter = make_meter(run, model, rank, layout.world_size)
    meter.start(*((step_of(checkpoint), read_progress(checkpoint)) if checkpoint else (-1, {})))
    stall = recipe.training.stall_minutes
    heartbeat = Heartbeat(stall and 60 * stall, rank, lambda text: report_failure(run, text))
    blocks = block_classes(model) if hardware.strategy == "fsdp2" else []
    arguments = training_arguments(
        recipe, hardware, run.checkpoints, fresh=checkpoint is None, blocks=blocks
    )
    limits = Limits.of(recipe.training)
    trainer = sharding_on_cpu(arguments)(PackedTrainer)(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation,
        callbacks=[StepAgreement(meter, arguments.device, limits, heartbeat)],
        meter=meter,
        pad_id=tokenizer.pad_token_id,
        held_out=HeldOut.of(dataset_dir, tokenizer, rehash=local_rank == 0),
        head_loss=head_loss,
        compiled_for=compile_training(model, recipe, train_rows),
        policy=Policy(
            recipe.training.save_total_limit, recipe.training.load_best_model_at_end, layout
        ),
        heartbeat=heartbeat,
    )
    check_sharded(trainer)
    with heartbeat.watching():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    ended = trainer.state.global_step >= trainer.state.max_steps
    finished = ended or meter.progress.stopped_by is not None
    model_step = commit_model(trainer, run, recipe, tokenizer_dir) if finished else None
    cpu_seconds, peak_rss = sum_over_ranks([*usage()], arguments.device)
    meter.used(cpu_seconds, int(peak_rss))
    if rank == 0:
        finish(trainer, run, meter, parameters, model_step=model_step)


def make_meter(run: Run, model: Any, rank: int, world_size: int) -> Meter:
    """Return this rank's meter, with what it needs to know of the model and its device."""
    recipe = run.recipe()
    training = recipe.training
    on_gpu = hardware_of(run).device == "cuda"
    peak = find_peak(
        torch.cuda.get_device_name() if on_gpu else None,
        recipe.model.dtype,
        configured_peak(recipe),
    )
    flops = count_flops(model, gradient_checkpointing=training.gradient_checkpointing)
    return Meter(
        run.path / METRICS if rank == 0 else None,
        training.logging_steps,
        Speed(flops, peak and peak * world_size),
        (training.loss_spike_threshold, training.loss_spike_patience),
    )


def configured_peak(recipe: Recipe) -> float | None:
    """Return the hardware file's peak_tflops: no part of a run's key, so read from the file."""
    try:
        return load_hardware(recipe.hardware).peak_tflops
    except StarloomError:  # the file is on another machine
        return None


def report_failure(run: Run, text: str) -> None:
    """Write the error that ends training to training.json; the log has it anyway."""
    with contextlib.suppress(OSError):  # the disk may be full
        run.write("training.json", {"status": "failed", "error": text})


def main(arguments: list[str] | None = None) -> int:
    """Run this rank; a StarloomError ends in one line on stderr and in training.json."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.training.trainer")
    for name in ("run", "dataset", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' notes to one another
    disable_progress_bar()
    run = Run(options.run)
    main_rank = int(os.environ.get("RANK", "0")) == 0
    if main_rank:
        run.checkpoints.mkdir(exist_ok=True)
        remove_incomplete(run.checkpoints)
    try:
        train(run, options.dataset, options.tokenizer)
    except StarloomError as error:
        logger.error("%s", error)  # noqa: TRY400 - the text says it all
        report_failure(run, str(error))
        return 1
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(record(main)())  # torchrun's report then tells which rank failed first, and of what
