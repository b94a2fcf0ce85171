"""The gate: accepted only with finite losses that fall by the margin, and how sure the fall is."""

import math

import numpy as np
import pytest

from pipelines.evals.scorecard import bootstrap_improvement, verdict


def scorecard(before, after, **changes):
    return {
        "step0": {"loss": before},
        "trained": {"loss": after},
        "tokens": 61_234,
        "min_improvement": 0.5,
        "improvement": None,
    } | changes


def test_a_fall_by_the_margin_is_accepted_with_all_numbers_in_one_line():
    interval = {"low": 4.18, "high": 4.29}
    decision = verdict(scorecard(8.33, 4.1, improvement=interval))

    assert decision.accepted
    assert decision.reason == (
        "accepted: held-out loss 8.330 -> 4.100 nats/token on 61,234 tokens, fell by 4.230 "
        "(95% CI 4.180 to 4.290), needed 0.500"
    )


@pytest.mark.parametrize(
    ("before", "after", "accepted"),
    [(2.0, 1.5, True), (2.0, 1.5001, False), (2.0, 2.0, False), (2.0, 3.0, False)],
)
def test_the_margin_itself_is_enough_and_less_is_not(before, after, accepted):
    assert verdict(scorecard(before, after)).accepted is accepted


def test_a_model_that_got_worse_is_rejected_with_its_numbers():
    decision = verdict(scorecard(2.0, 3.0))

    assert decision.reason == (
        "rejected: held-out loss 2.000 -> 3.000 nats/token on 61,234 tokens, fell by -1.000, "
        "needed 0.500"
    )


@pytest.mark.parametrize(
    ("before", "after", "numbers"),
    [
        (None, 1.0, "not finite -> 1.000"),
        (9.0, None, "9.000 -> not finite"),
        (math.inf, 1.0, "inf -> 1.000"),
        (9.0, math.nan, "9.000 -> nan"),
    ],
)
def test_a_loss_that_is_not_finite_is_rejected(before, after, numbers):
    decision = verdict(scorecard(before, after))

    assert not decision.accepted
    assert decision.reason == (f"rejected: held-out loss {numbers} on 61,234 tokens is not finite")


def test_the_interval_of_a_constant_fall_is_the_fall():
    tokens = [10, 20, 30]
    before = [5.0 * n for n in tokens]
    after = [3.0 * n for n in tokens]

    found = bootstrap_improvement(before, after, tokens, seed=1)

    assert found == {
        "nats": 2.0,
        "low": 2.0,
        "high": 2.0,
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 1,
    }


def test_the_interval_agrees_with_the_normal_one_on_many_rows():
    draws = np.random.default_rng(0)
    after = draws.normal(100, 10, size=400)
    before = after + draws.normal(50, 20, size=400)  # paired: hard rows are hard for both

    found = bootstrap_improvement(before, after, [100] * 400, seed=7)

    mean, error = np.mean(before - after) / 100, np.std(before - after) / 100 / 20
    assert found["nats"] == pytest.approx(mean)
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=error / 3)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=error / 3)
    assert found == bootstrap_improvement(before, after, [100] * 400, seed=7)


def test_rows_without_a_trained_token_change_nothing():
    alone = bootstrap_improvement([9.0, 8.0], [3.0, 5.0], [2, 3], seed=5)
    among = bootstrap_improvement([0.0, 9.0, 0.0, 8.0], [0.0, 3.0, 0.0, 5.0], [0, 2, 0, 3], seed=5)

    assert among == alone
    assert alone["nats"] == pytest.approx(9 / 5)
