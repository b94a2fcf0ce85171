"""One rank of a training run: `-m pipelines.training.trainer --run R --dataset D --tokenizer T`.

transformers.Trainer does the loop, DeepSpeed or DDP the distribution; this file chooses, counts,
evaluates and commits. Invariant: the weights are in `model/` before anything else that can fail at
the end, and `training.json` is written last.
"""

import argparse
import contextlib
import errno
import logging
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from pipelines.engine import usage
from pipelines.errors import DiskFull, StarloomError
from pipelines.jsonlines import read_lines
from pipelines.recipe import Hardware, Recipe
from pipelines.runs import Run
from pipelines.store import sync_folder
from pipelines.training.attention import check_packing
from pipelines.training.callbacks import (
    Meter,
    StepAgreement,
    sum_over_ranks,
)
from pipelines.training.checkpoints import (
    checkpoint_folder,
    commit,
    newest_checkpoint,
    read_progress,
    remove_incomplete,
    rotate,
    step_of,
)
from pipelines.training.collate import Collator, PackedDataset, PassedDataset
from pipelines.training.deepspeed_config import deepspeed_config, disable_compiled_ops
from pipelines.training.environment import hardware_of
from pipelines.training.loss import EvalLoss, evaluate_loss, validation_rows
from pipelines.training.models import build_model, count_parameters, load_tokenizer, save_trained
from pipelines.training.plots import draw_loss

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class PackedTrainer(Trainer):  # type: ignore[misc]
    """Trainer with exact counts, token-weighted evaluation and checkpoints that are whole."""

    def __init__(self, *, meter: Meter, pad_id: int, keep: int, **options: Any) -> None:
        """Take Trainer's options; `keep` complete checkpoints stay."""
        super().__init__(data_collator=Collator(pad_id), **options)
        self._meter = meter
        self._pad_id = pad_id
        self._keep = keep

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Count the real tokens of the batches of one step."""
        batches, num_items = super().get_batch_samples(*arguments, **options)
        for batch in batches:
            self._meter.local_tokens += int((batch["input_ids"] != self._pad_id).sum())
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand a step's loss to the meter instead of Trainer's growing history."""
        if "loss" in logs:
            self._meter.trained(self.state.global_step, self.state.max_steps, logs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the token-weighted loss of (a fixed part of) the validation rows, on all ranks."""
        result = self._evaluate_share()
        self._meter.evaluated(self.state.global_step, result.loss, result.tokens)
        self._meter.mark()
        metrics = {"eval_loss": result.loss, "eval_tokens": result.tokens}
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_share(self) -> EvalLoss:
        """Evaluate this rank's rows and return the sum over all ranks."""
        world, batch_size = self.args.world_size, self.args.per_device_eval_batch_size
        rows = validation_rows(len(self.eval_dataset))
        share = rows[self.args.process_index :: world]

        def evaluate(numbers: list[int]) -> EvalLoss:
            return evaluate_loss(
                self.model, self.eval_dataset, batch_size, self.args.device, rows=numbers
            )

        result = evaluate(share)
        if math.ceil(len(share) / batch_size) < math.ceil(len(rows[::world]) / batch_size):
            evaluate(rows[:1])  # ZeRO-3 gathers weights batch by batch: all ranks run equally many
        nll, tokens = sum_over_ranks([result.nll, float(result.tokens)], self.args.device)
        return EvalLoss(nll, int(tokens))

    def _run_epoch(self, *arguments: Any, epoch: int, **options: Any) -> None:
        """Train an epoch on its pass, unless the checkpoint is of the last step already."""
        if self.state.global_step < self.state.max_steps:
            # Not left to the data loader: on several ranks it forwards the epoch to samplers only.
            self.train_dataset.set_epoch(epoch)
            super()._run_epoch(*arguments, epoch=epoch, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save on all ranks, then declare the checkpoint complete and drop older ones."""
        root = Path(self.args.output_dir)
        folder = checkpoint_folder(root, self.state.global_step)
        try:
            super()._save_checkpoint(model, trial)
            wait_for_ranks()
            if self.is_world_process_zero():
                commit(folder, self._meter.state())
                rotate(root, self._keep)
        except Exception as error:
            raise_disk_full(folder, error)
            raise
        self._meter.mark()


def raise_disk_full(path: Path, error: BaseException) -> None:
    """Raise DiskFull where an error is one: torch.save hides the errno behind a RuntimeError."""
    no_space = getattr(error, "errno", None) == errno.ENOSPC
    if no_space or shutil.disk_usage(path.parent).free < 2**20:
        raise DiskFull(
            f"{path}: no space left while saving; the last complete checkpoint is kept. "
            "Free some space and run the same command again"
        ) from error


def wait_for_ranks() -> None:
    """Return when every rank is here."""
    if distributed.is_initialized():
        distributed.barrier()


def training_arguments(
    recipe: Recipe, hardware: Hardware, folder: Path, *, fresh: bool
) -> TrainingArguments:
    """Return TrainingArguments for a recipe; every metric is logged, the meter thins them out."""
    training = recipe.training
    same = training.model_dump(exclude={"logging_steps", "save_total_limit"})
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
        report_to="none",
        disable_tqdm=True,
    )


def train(run: Run, dataset_dir: Path, tokenizer_dir: Path) -> None:
    """Train a run from its newest complete checkpoint to its last step, or until SIGTERM."""
    recipe, hardware = run.recipe(), hardware_of(run)
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if hardware.device == "cpu":
        disable_compiled_ops()
    # Model and adapter come before TrainingArguments: PEFT cannot be added to sharded weights.
    model = build_model(recipe, tokenizer_dir)
    parameters = count_parameters(model)
    check_packing(model, "cpu" if hardware.device == "cpu" else f"cuda:{local_rank}")
    train_rows = PassedDataset(dataset_dir, rehash=local_rank == 0)
    validation = PackedDataset(dataset_dir, "validation", rehash=local_rank == 0)
    checkpoint = newest_checkpoint(run.checkpoints)
    meter = Meter(run.path / METRICS if rank == 0 else None, recipe.training.logging_steps)
    meter.start(*((step_of(checkpoint), read_progress(checkpoint)) if checkpoint else (-1, {})))
    arguments = training_arguments(recipe, hardware, run.checkpoints, fresh=checkpoint is None)
    trainer = PackedTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation,
        callbacks=[StepAgreement(meter, arguments.device)],
        meter=meter,
        pad_id=load_tokenizer(tokenizer_dir).pad_token_id,
        keep=recipe.training.save_total_limit,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finished = trainer.state.global_step >= trainer.state.max_steps
    if finished:
        commit_model(trainer, run, recipe, tokenizer_dir)
    cpu_seconds, peak_rss = sum_over_ranks([*usage()], arguments.device)
    meter.used(cpu_seconds, int(peak_rss))
    if rank == 0:
        finish(trainer, run, meter, parameters, finished=finished)


def commit_model(trainer: PackedTrainer, run: Run, recipe: Recipe, tokenizer_dir: Path) -> None:
    """Write `model/`, whole or not at all: gathered on all ranks, saved by rank 0, renamed."""
    model = trainer.model
    if hardware_of(run).strategy == "zero3":
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            unset_hf_deepspeed_config()  # or this model's weights would be sharded as well
            model = build_model(recipe, tokenizer_dir)
            model.load_state_dict(weights)
    if trainer.is_world_process_zero():
        for left_over in run.path.glob("model.tmp-*"):
            shutil.rmtree(left_over)
        temporary = run.path / f"model.tmp-{os.getpid()}"
        try:
            save_trained(model, temporary, tokenizer_dir, recipe.model.dtype)
            for path in [p for p in temporary.rglob("*") if p.is_file()]:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if run.model.exists():
                shutil.rmtree(run.model)
            temporary.rename(run.model)
            sync_folder(run.path)
        except Exception as error:
            raise_disk_full(temporary, error)
            raise


def finish(
    trainer: PackedTrainer, run: Run, meter: Meter, parameters: tuple[int, int], *, finished: bool
) -> None:
    """Draw the curve and write training.json (rank 0)."""
    metrics = read_lines(run.path / METRICS)
    draw_loss(metrics, f"{run.info()['recipe']}: loss", run.path / "loss.png")
    state, progress = trainer.state, meter.progress
    run.write(
        "training.json",
        {
            "status": "finished" if finished else "interrupted",
            "global_step": state.global_step,
            "max_steps": state.max_steps,
            "train_loss": progress.loss_sum / max(state.global_step, 1),
            "eval": [
                {"step": line["step"], "loss": line["eval_loss"], "tokens": line["eval_tokens"]}
                for line in metrics
                if "eval_loss" in line
            ],
            "seconds": round(meter.state()["seconds"], 2),
            "cpu_seconds": round(progress.cpu_seconds, 2),
            "peak_rss": progress.peak_rss,
            "tokens_seen": progress.tokens,
            "parameters": parameters[0],
            "trainable_parameters": parameters[1],
            "world_size": trainer.args.world_size,
            "model_files": {p.name: p.stat().st_size for p in run.model.glob("*") if p.is_file()},
        },
    )


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
        with contextlib.suppress(OSError):  # the disk may be full: the log has the text too
            run.write("training.json", {"status": "failed", "error": str(error)})
        return 1
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
