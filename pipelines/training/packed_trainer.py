"""The loop: transformers.Trainer on packed rows, with exact counts and whole checkpoints."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import PrinterCallback, Trainer

from pipelines.training.attention import is_flat
from pipelines.training.callbacks import Meter, sum_over_ranks
from pipelines.training.checkpoints import (
    Policy,
    checkpoint_folder,
    commit,
    raise_disk_full,
    rotate,
)
from pipelines.training.collate import Collator, FlatShape, PackedDataset, splits_of
from pipelines.training.compiled import uncompiled
from pipelines.training.head_loss import HeadLoss
from pipelines.training.loss import (
    EvalLoss,
    Scorer,
    as_numbers,
    from_numbers,
    sources_of,
    total,
    validation_rows,
)
from pipelines.training.token_bytes import count_token_bytes
from pipelines.training.watchdog import Heartbeat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """What evaluations report beside the validation loss: bytes of tokens, and FIM twins."""

    token_bytes: Any = None
    twins: dict[str, PackedDataset] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, tokenizer: Any, *, rehash: bool) -> "HeldOut":
        """Return those of a packed dataset: `validation.none`, `.psm` and `.spm` are twins."""
        splits = splits_of(folder)
        twins = {
            order: PackedDataset(folder, f"validation.{order}", rehash=rehash)
            for order in ("none", "psm", "spm")
            if f"validation.{order}" in splits
        }
        return cls(count_token_bytes(tokenizer), twins)


class PackedTrainer(Trainer):  # type: ignore[misc]
    """Trainer with exact counts, token-weighted evaluation and checkpoints that are whole."""

    # The losses of the batches of a step add up to the step's: each is divided by all its tokens.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        meter: Meter,
        pad_id: int,
        policy: Policy,
        heartbeat: Heartbeat,
        held_out: HeldOut,
        head_loss: HeadLoss,
        compiled_for: FlatShape | None = None,
        **options: Any,
    ) -> None:
        """Take Trainer's options; `policy` says which checkpoints stay.

        `compiled_for` is the shape of all training batches of a model whose blocks are compiled.
        """
        flat = is_flat(options["model"])
        collator = Collator(pad_id, flat=flat, fixed=compiled_for)
        super().__init__(data_collator=collator, **options)
        self._compiled = compiled_for is not None
        self._held_out = held_out
        self._head = head_loss
        self.remove_callback(PrinterCallback)  # metrics.jsonl has the lines
        self._meter = meter
        self._pad_id = pad_id
        self._policy = policy
        self._heartbeat = heartbeat

    def get_batch_samples(self, batches: Any, *arguments: Any, **options: Any) -> Any:
        """Count the real tokens of the batches of one step, and the time they are waited for."""
        taken, num_items = super().get_batch_samples(
            self._meter.timed(batches), *arguments, **options
        )
        self._meter.count(taken, self._pad_id)
        return taken, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand a step's loss to the meter instead of Trainer's growing history."""
        if "loss" not in logs:
            return
        line = self._meter.trained(self.state.global_step, self.state.max_steps, logs)
        self._report(line)
        if self._meter.progress.high and not self.control.should_training_stop:
            self.control.should_save = False  # the newest checkpoint stays one before the spike

    def _report(self, line: dict[str, Any] | None) -> None:
        """Give a line of metrics.jsonl to the reporters: once, on rank 0, never fatal."""
        if line is None or not self.is_world_process_zero():
            return
        numbers = {
            name: value
            for name, value in line.items()
            if value is not None and name not in ("step", "max_steps")
        }
        try:
            self.callback_handler.on_log(self.args, self.state, self.control, numbers)
        except Exception as error:  # noqa: BLE001 - a reporter's server may be away: training goes on
            logger.warning("metrics not reported: %s: %s", type(error).__name__, error)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the summed loss of a batch over the trained tokens of the step on all ranks."""
        if return_outputs or num_items_in_batch is None:
            raise TypeError("only training steps compute a loss here; evaluate() evaluates")
        # DDP, DeepSpeed and FSDP average gradients over the ranks: the sum is what is wanted.
        return self._head(model, inputs) * (self.args.world_size / num_items_in_batch)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the token-weighted loss of (a fixed part of) the validation rows, on all ranks.

        metrics.jsonl also gets perplexity, bits per byte, the same of every source, and of code
        that is permuted for FIM, in each order.
        """
        step = self.state.global_step
        self._heartbeat.beat(f"evaluating after step {step}")
        with uncompiled(compiled=self._compiled):
            sources = self._evaluate_share(self.eval_dataset)
            twins = {
                order: total(self._evaluate_share(twin).values()).report()
                for order, twin in self._held_out.twins.items()
            }
        result = total(sources.values())
        parts: dict[str, Any] = {f"eval_{name}": number for name, number in result.report().items()}
        parts["eval_sources"] = {name: loss.report() for name, loss in sources.items()}
        if twins:
            parts["eval_fim"] = twins
        self._meter.evaluated(step, result.loss, result.tokens, parts)
        self._meter.mark()
        self._heartbeat.beat(f"in step {step + 1}")
        metrics = {"eval_loss": result.loss, "eval_tokens": result.tokens}
        self._report(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_share(self, dataset: PackedDataset) -> dict[str, EvalLoss]:
        """Evaluate this rank's rows and return the sums over all ranks, by source."""
        world, batch_size = self.args.world_size, self.args.per_device_eval_batch_size
        rows = validation_rows(len(dataset))
        share = rows[self.args.process_index :: world]
        score = Scorer(self._head, batch_size, self.args.device, self._held_out.token_bytes)
        names = sources_of(dataset, rows)
        result = dict.fromkeys(names, EvalLoss(0.0, 0)) | score(self.model, dataset, share)
        if math.ceil(len(share) / batch_size) < math.ceil(len(rows[::world]) / batch_size):
            # ZeRO-3 gathers weights batch by batch: all ranks run equally many
            score(self.model, dataset, rows[:1])
        return from_numbers(names, sum_over_ranks(as_numbers(result), self.args.device))

    def _run_epoch(self, *arguments: Any, epoch: int, **options: Any) -> None:
        """Train an epoch on its pass, unless the checkpoint is of the last step already."""
        stopped = self._meter.progress.stopped_by is not None
        if self.state.global_step < self.state.max_steps and not stopped:
            # Not left to the data loader: on several ranks it forwards the epoch to samplers only.
            self.train_dataset.set_epoch(epoch)
            super()._run_epoch(*arguments, epoch=epoch, **options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save on all ranks, then declare the checkpoint complete and drop older ones."""
        root = Path(self.args.output_dir)
        folder = checkpoint_folder(root, self.state.global_step)
        self._heartbeat.beat(f"saving {folder.name}")
        try:
            super()._save_checkpoint(model, trial)
            wait_for_ranks()
            if self.is_world_process_zero():
                commit(folder, self._meter.state(), self._policy.layout)
                rotate(root, self._policy.keep, keep_best=self._policy.keep_best)
        except Exception as error:
            raise_disk_full(folder, error)
            raise
        self._meter.mark()
        self._heartbeat.beat(f"in step {self.state.global_step + 1}")


def wait_for_ranks() -> None:
    """Return when every rank is here."""
    if distributed.is_initialized():
        distributed.barrier()
