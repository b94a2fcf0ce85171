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

from torch import distributed
from transformers.utils.logging import disable_progress_bar

from pipelines.engine import usage
from pipelines.errors import StarloomError
from pipelines.runs import Run
from pipelines.training.arguments import training_arguments
from pipelines.training.attention import check_packing
from pipelines.training.callbacks import (
    Meter,
    StepAgreement,
    sum_over_ranks,
)
from pipelines.training.checkpoints import (
    newest_checkpoint,
    read_progress,
    remove_incomplete,
    step_of,
)
from pipelines.training.collate import PackedDataset, PassedDataset
from pipelines.training.deepspeed_config import disable_compiled_ops
from pipelines.training.environment import hardware_of
from pipelines.training.finish import METRICS, commit_model, finish
from pipelines.training.models import build_model, count_parameters, load_tokenizer
from pipelines.training.packed_trainer import PackedTrainer

logger = logging.getLogger(__name__)


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
