"""Which questions and answers become records, and which answers are compared."""

import math
from collections.abc import Sequence, Set
from typing import Any

from pipelines.records import Row

Params = dict[str, Any]


def preference_score(score: int, accepted: bool) -> int:
    """Return the score of HuggingFaceH4/stack-exchange-preferences for an answer with net votes.

    round(log2(1 + votes)), plus 1 if accepted; -1 where the votes are negative. The dataset's card
    names Askell et al. 2021, "A General Language Assistant as a Laboratory for Alignment".

    >>> [preference_score(0, False), preference_score(5, True), preference_score(-3, True)]
    [0, 4, -1]
    """
    if score < 0:
        return -1
    return round(math.log2(1 + score)) + accepted


def drop_reason(question: Row, duplicates: Set[int], params: Params) -> str | None:
    """Return why a question with all its answers is left out, or None."""
    day = question["created"]
    if params["since"] and day < params["since"]:
        return "before_since"
    if params["until"] and day >= params["until"]:
        return "from_until_on"
    if params["tags"] and not set(params["tags"]) & set(question["tags"] or ()):
        return "other_tags"
    if (
        params["min_question_score"] is not None
        and question["score"] < params["min_question_score"]
    ):
        return "question_score"
    if params["closed_questions"] == "drop" and question["closed"]:
        return "closed"
    if params["duplicate_questions"] == "drop" and question["id"] in duplicates:
        return "duplicate"
    return None


def rank_answers(question: Row, answers: Sequence[Row]) -> list[Row]:
    """Return answers best first: by score, the accepted one before its equals, then the oldest."""

    def place(answer: Row) -> tuple[int, bool, int]:
        return -answer["score"], answer["id"] != question["accepted"], answer["id"]

    return sorted(answers, key=place)


def select_answers(question: Row, ranked: Sequence[Row], params: Params) -> list[Row]:
    """Return the answers that become completions, best first."""
    least = params["min_answer_score"]
    good = [answer for answer in ranked if least is None or answer["score"] >= least]
    if params["select"] == "accepted":
        return [answer for answer in good if answer["id"] == question["accepted"]]
    count = {"best": 1, "top-k": params["top_k"], "all": None}[params["select"]]
    return good[:count]


def select_pairs(
    question: Row, chosen: Sequence[Row], ranked: Sequence[Row], params: Params
) -> list[tuple[Row, Row]]:
    """Return (better, worse) answers: a chosen one and any with a lower preference score.

    Equal scores make no pair. At most `max_pairs` of a question are kept, those of the best answer
    first, each against the best of the worse ones first.
    """

    def preference(answer: Row) -> int:
        return preference_score(answer["score"], answer["id"] == question["accepted"])

    by_preference = sorted(ranked, key=preference, reverse=True)  # stable: ranks break ties
    pairs = [
        (better, worse)
        for better in sorted(chosen, key=preference, reverse=True)
        for worse in by_preference
        if preference(better) > preference(worse)
    ]
    return pairs[: params["max_pairs"]]
