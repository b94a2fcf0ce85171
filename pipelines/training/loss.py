"""Token-weighted loss: the sum of negative log likelihoods over trained tokens, and their number.

The mean of batch means, which Trainer.evaluate reports, depends on the batch size; this does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from pipelines.errors import TrainingError
from pipelines.training.collate import IGNORE_INDEX, Collator, PackedDataset

VALIDATION_ROWS = 60  # enough for a curve; the test split decides, on all of its rows


@dataclass(frozen=True, slots=True)
class EvalLoss:
    """Summed negative log likelihood (nats) of `tokens` trained tokens. Two of them add up."""

    nll: float
    tokens: int

    def __add__(self, other: "EvalLoss") -> "EvalLoss":
        return EvalLoss(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Return nats per token; TrainingError where no token was trained."""
        if not self.tokens:
            raise TrainingError("the evaluated rows hold no trained token: check the template")
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Return e to the loss; infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate_loss(
    model: Any,
    dataset: PackedDataset,
    batch_size: int,
    device: torch.device | str,
    *,
    rows: Sequence[int] | None = None,
) -> EvalLoss:
    """Return the loss of a causal model, already on `device`, over all rows or the given ones."""
    numbers = range(len(dataset)) if rows is None else rows
    collate = Collator(pad_id=0)  # the pad tokens are a document of their own, out of the loss
    total = EvalLoss(0.0, 0)
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(numbers), batch_size):
            batch = collate([dataset[i] for i in numbers[start : start + batch_size]])
            total += batch_loss(model, {k: v.to(device) for k, v in batch.items()})
    model.train(training)
    return total


def batch_loss(model: Any, batch: dict[str, torch.Tensor]) -> EvalLoss:
    """Return the loss of one collated batch on the model's device."""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORE_INDEX
    losses = functional.cross_entropy(
        logits[:, :-1][trained].float(), targets[trained], reduction="none"
    )
    return EvalLoss(float(losses.double().sum()), int(trained.sum()))


def validation_rows(size: int) -> list[int]:
    """Return at most VALIDATION_ROWS row numbers, evenly spread over the split."""
    count = min(VALIDATION_ROWS, size)
    return [i * size // count for i in range(count)]
