"""The end of a run: the weights first, then the curve, and training.json last."""

import os
import shutil
from pathlib import Path

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pipelines.jsonlines import read_lines
from pipelines.recipe import Recipe
from pipelines.runs import Run
from pipelines.store import sync_folder
from pipelines.training.callbacks import Meter
from pipelines.training.checkpoints import best_checkpoint, raise_disk_full, step_of
from pipelines.training.environment import hardware_of
from pipelines.training.fsdp import gather_weights
from pipelines.training.models import build_model, save_trained
from pipelines.training.packed_trainer import PackedTrainer
from pipelines.training.plots import draw_loss
from pipelines.training.stored_weights import load_checkpoint

METRICS = "metrics.jsonl"


def commit_model(trainer: PackedTrainer, run: Run, recipe: Recipe, tokenizer_dir: Path) -> int:
    """Write `model/`, whole or not at all: gathered on all ranks, saved by rank 0, renamed.

    Returns the step of its weights: the last, or with load_best_model_at_end the best one's.
    """
    model, step = trainer.model, int(trainer.state.global_step)
    best = best_checkpoint(run.checkpoints) if recipe.training.load_best_model_at_end else None
    strategy = hardware_of(run).strategy
    if strategy in ("zero3", "fsdp2"):
        gather = gather_weights if strategy == "fsdp2" else trainer.accelerator.get_state_dict
        weights = gather(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            unset_hf_deepspeed_config()  # or this model's weights would be sharded as well
            model = build_model(recipe, tokenizer_dir)
            model.load_state_dict(weights)
    if best is not None and step_of(best) != step:
        step = step_of(best)
        if trainer.is_world_process_zero():
            load_checkpoint(model, best)
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
    return step


def finish(
    trainer: PackedTrainer,
    run: Run,
    meter: Meter,
    parameters: tuple[int, int],
    *,
    model_step: int | None,
) -> None:
    """Draw the curve and write training.json (rank 0).

    `model_step` is the step of the weights in `model/`, None where training was interrupted.
    """
    metrics = read_lines(run.path / METRICS)
    draw_loss(metrics, f"{run.info()['recipe']}: loss", run.path / "loss.png")
    state, progress = trainer.state, meter.progress
    run.write(
        "training.json",
        {
            "status": "interrupted" if model_step is None else "finished",
            "stopped_by": progress.stopped_by or (None if model_step is None else "max_steps"),
            "global_step": state.global_step,
            "max_steps": state.max_steps,
            "model_step": model_step,
            "train_loss": progress.loss_sum / max(state.global_step, 1),
            "eval": [
                {"step": line["step"], "loss": line["eval_loss"], "tokens": line["eval_tokens"]}
                for line in metrics
                if "eval_loss" in line
            ],
            "seconds": round(meter.state()["seconds"], 2),
            "cpu_seconds": round(progress.cpu_seconds, 2),
            "peak_rss": progress.peak_rss,
            "peak_gpu_memory": progress.peak_gpu_memory,
            "tokens_seen": progress.tokens,
            "parameters": parameters[0],
            "trainable_parameters": parameters[1],
            "world_size": trainer.args.world_size,
            "model_files": {p.name: p.stat().st_size for p in run.model.glob("*") if p.is_file()},
        },
    )
