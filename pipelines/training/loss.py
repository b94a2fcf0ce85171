"""Token-weighted loss: the sum of negative log likelihoods over trained tokens, and their number.

The mean of batch means, which Trainer.evaluate reports, depends on the batch size; this does not.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from pipelines.errors import TrainingError
from pipelines.training.attention import is_flat
from pipelines.training.collate import IGNORE_INDEX, Collator, PackedDataset, PackedRow
from pipelines.training.head_loss import DENSE, HeadLoss

VALIDATION_ROWS = 60  # enough for a curve; the test split decides, on all of its rows


@dataclass(frozen=True, slots=True)
class EvalLoss:
    """Summed negative log likelihood (nats) of `tokens` trained tokens. Two of them add up.

    `text_nll` is the part of the tokens that stand for text, `bytes` the size of that text: control
    tokens such as an end of turn are neither.
    """

    nll: float
    tokens: int
    text_nll: float = 0.0
    bytes: int = 0

    def __add__(self, other: "EvalLoss") -> "EvalLoss":
        return EvalLoss(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.text_nll + other.text_nll,
            self.bytes + other.bytes,
        )

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

    @property
    def bits_per_byte(self) -> float | None:
        """Return bits per byte of trained text, None where its bytes were not counted."""
        return self.text_nll / self.bytes / math.log(2) if self.bytes else None

    def report(self) -> dict[str, float | int | None]:
        """Return loss, tokens, perplexity and bits_per_byte for a JSON line; None if infinite."""
        numbers = {
            "loss": self.loss,
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}


def evaluate_loss(
    model: Any,
    dataset: PackedDataset,
    batch_size: int,
    device: torch.device | str,
    *,
    rows: Sequence[int] | None = None,
) -> EvalLoss:
    """Return the loss of a causal model, already on `device`, over all rows or the given ones."""
    scorer = Scorer(HeadLoss(model, DENSE), batch_size, device)
    return total(scorer(model, dataset, range(len(dataset)) if rows is None else rows).values())


def total(losses: Iterable[EvalLoss]) -> EvalLoss:
    """Return the sum."""
    return sum(losses, EvalLoss(0.0, 0))


@dataclass(frozen=True)
class Scorer:
    """Scores packed rows in batches; `token_bytes` are the bytes of each token id, where known."""

    head: HeadLoss
    batch_size: int
    device: torch.device | str
    token_bytes: np.ndarray[Any, Any] | None = None

    def __call__(
        self, model: Any, dataset: PackedDataset, rows: Sequence[int]
    ) -> dict[str, EvalLoss]:
        """Return the loss of each source that the rows hold, in the order of their names.

        Independent of the batch size, but for rounding. The model is left in the mode it was in.
        """
        sources = sources_of(dataset, rows)
        numbers = {source: number for number, source in enumerate(sources)}
        sums = np.zeros((len(sources), 4))
        collate = Collator(pad_id=0, flat=is_flat(model))
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(rows), self.batch_size):
                    chosen = rows[start : start + self.batch_size]
                    batch = collate([dataset[row] for row in chosen])
                    nats = self.head(
                        model,
                        {
                            k: v.to(self.device) if torch.is_tensor(v) else v
                            for k, v in batch.items()
                        },
                        summed=False,
                    )
                    sums += self._by_source(nats, dataset, chosen, numbers)
        finally:
            model.train(training)
        return {
            source: EvalLoss(float(nll), int(tokens), float(text_nll), int(size))
            for source, (nll, tokens, text_nll, size) in zip(sources, sums, strict=True)
        }

    def _by_source(
        self,
        nats: torch.Tensor,
        dataset: PackedDataset,
        rows: Sequence[int],
        numbers: dict[str, int],
    ) -> np.ndarray[Any, Any]:
        """Return the sums [sources, 4] of the trained tokens of some rows, in the rows' order."""
        found = [_trained(dataset[row], dataset.sources(row), numbers) for row in rows]
        ids, sources = (np.concatenate(parts) for parts in zip(*found, strict=True))
        values = nats.double().cpu().numpy()
        sizes = np.zeros(len(ids)) if self.token_bytes is None else self.token_bytes[ids]
        columns = (values, np.ones(len(ids)), values * (sizes > 0), sizes)
        return np.stack([np.bincount(sources, c, minlength=len(numbers)) for c in columns], axis=1)


def sources_of(dataset: PackedDataset, rows: Sequence[int]) -> list[str]:
    """Return the names of the sources that some rows hold, sorted."""
    return sorted({source for row in rows for source in dataset.sources(row)})


def as_numbers(losses: dict[str, EvalLoss]) -> list[float]:
    """Return losses as a flat list, which ranks can add up."""
    return [float(number) for loss in losses.values() for number in astuple(loss)]


def from_numbers(names: Sequence[str], numbers: Sequence[float]) -> dict[str, EvalLoss]:
    """Return the losses that `as_numbers` made flat."""
    return {
        name: EvalLoss(numbers[i], round(numbers[i + 1]), numbers[i + 2], round(numbers[i + 3]))
        for name, i in zip(names, range(0, len(numbers), 4), strict=True)
    }


def _trained(
    row: PackedRow, sources: list[str], numbers: dict[str, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the ids of a row's trained tokens and the number of the source of each."""
    trained = row.labels != IGNORE_INDEX
    trained[np.cumsum(row.lengths) - row.lengths] = False  # as the collator has it
    source = np.repeat([numbers[name] for name in sources], row.lengths)
    return row.labels[trained], source[trained]


def validation_rows(size: int) -> list[int]:
    """Return at most VALIDATION_ROWS row numbers, evenly spread over the split."""
    count = min(VALIDATION_ROWS, size)
    return [i * size // count for i in range(count)]
