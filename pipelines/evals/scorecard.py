"""The gate: whether a model beats its step-0 self by the recipe's margin, and how sure that is.

Both losses are nats per trained token over the same test rows, so the difference is paired by row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.fingerprint import code_digest
from pipelines.manifest import sha256_file
from pipelines.runs import EVALUATOR, Run

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


def scorecard_parts(run: Run) -> dict[str, Any]:
    """Return what a scorecard depends on; a stored one with equal `key_parts` is still valid."""
    return {
        "evaluation": run.recipe().evaluation.model_dump(mode="json"),
        "training": sha256_file(run.path / "training.json"),
        "stages": {name: ref.digest for name, ref in run.refs().items()},
        "code": code_digest(EVALUATOR),
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's decision, with its numbers in one line."""

    accepted: bool
    reason: str


def verdict(scorecard: dict[str, Any]) -> Verdict:
    """Return the decision on a scorecard: accepted iff both losses are finite and fall by enough.

    Reads `step0.loss`, `trained.loss` (None where not finite), `tokens`, `min_improvement` and,
    where present, `improvement.low` and `.high`.
    """
    before, after = scorecard["step0"]["loss"], scorecard["trained"]["loss"]
    tokens, needed = scorecard["tokens"], scorecard["min_improvement"]
    if not (_finite(before) and _finite(after)):
        return Verdict(
            False,
            f"rejected: held-out loss {_number(before)} -> {_number(after)} on {tokens:,} tokens "
            "is not finite",
        )
    accepted = before - after >= needed
    interval, sure = scorecard.get("improvement"), ""
    if interval:
        sure = f" ({CONFIDENCE:.0%} CI {interval['low']:.3f} to {interval['high']:.3f})"
    return Verdict(
        accepted,
        f"{'accepted' if accepted else 'rejected'}: held-out loss {before:.3f} -> {after:.3f} "
        f"nats/token on {tokens:,} tokens, fell by {before - after:.3f}"
        f"{sure}, needed {needed:.3f}",
    )


def bootstrap_improvement(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[int], *, seed: int
) -> dict[str, Any]:
    """Return the fall in loss with its percentile interval (Efron & Tibshirani 1993, ch. 13).

    `before` and `after` are summed nats of the same rows, `tokens` their trained tokens. Rows are
    drawn with replacement, both models together, so that a hard row is hard for both. Rows
    without a trained token say nothing and are passed over; at least one row must have some.
    """
    weights = np.asarray(tokens, dtype=np.int64)
    fallen = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    fallen, weights = fallen[weights > 0], weights[weights > 0]
    draws = np.random.default_rng(seed)
    samples = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        rows = draws.integers(len(weights), size=len(weights))
        samples[i] = fallen[rows].sum() / weights[rows].sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return {
        "nats": float(fallen.sum() / weights.sum()),
        "low": float(low),
        "high": float(high),
        "confidence": CONFIDENCE,
        "resamples": NUM_RESAMPLES,
        "seed": seed,
    }


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
