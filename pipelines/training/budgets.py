"""When training ends before its last step, as a finished run: budgets and early stopping."""

from dataclasses import dataclass

from pipelines.settings.training import Training
from pipelines.training.progress import Progress

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a recipe's training section; None is no limit."""

    max_hours: float | None = None
    max_train_tokens: int | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0

    @classmethod
    def of(cls, training: Training) -> "Limits":
        """Return the limits of a recipe."""
        return cls(
            training.max_hours,
            training.max_train_tokens,
            training.early_stopping_patience,
            training.early_stopping_threshold,
        )

    def after_step(self, progress: Progress, seconds: float) -> str | None:
        """Return which budget is used up, "max_hours" or "max_train_tokens", or None.

        `seconds` is the time of training so far, that of earlier attempts included.
        """
        if self.max_train_tokens is not None and progress.tokens >= self.max_train_tokens:
            return "max_train_tokens"
        if self.max_hours is not None and seconds >= self.max_hours * SECONDS_PER_HOUR:
            return "max_hours"
        return None

    def after_evaluation(self, progress: Progress, loss: float) -> str | None:
        """Note a validation loss; return "early_stopping" when patience is at its end.

        As transformers.EarlyStoppingCallback: an evaluation that is not better than the best one by
        more than the threshold uses up one of `early_stopping_patience`.
        """
        best = progress.best_eval_loss
        if best is None or best - loss > self.early_stopping_threshold:
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        progress.best_eval_loss = loss if best is None else min(best, loss)
        patience = self.early_stopping_patience
        if patience is not None and progress.evaluations_without_gain >= patience:
            return "early_stopping"
        return None
