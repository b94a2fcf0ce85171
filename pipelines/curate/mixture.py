"""How often each record is trained on, so that sources come in the proportions the recipe asks.

`epochs` repeats a source, or thins it below 1. Where sources have a `weight`, records are taken in
these proportions: the source that is scarcest for its weight is used up (its epochs included),
the others are thinned. Which records go is decided by the hash of their id, so that it does not
change with the order or number of shards, and hardly when data grows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.curate.places import place_of

Settings = Mapping[str, Any]  # id, weight, epochs
NAMESPACE = "mixture\0"  # apart from the places that decide splits


def copies_per_record(sources: Sequence[Settings], rows: Mapping[str, int]) -> dict[str, float]:
    """Return how many copies of a record of each source are trained on, on average.

    >>> copies_per_record([{"id": "a", "weight": None, "epochs": 2.0}], {"a": 10})
    {'a': 2.0}
    >>> half = [{"id": n, "weight": 1.0, "epochs": 1.0} for n in "ab"]
    >>> copies_per_record(half, {"a": 10, "b": 40})
    {'a': 1.0, 'b': 0.25}
    """
    found = {source["id"]: float(source["epochs"]) for source in sources}
    weights = {source["id"]: source["weight"] for source in sources}
    if all(weight is None for weight in weights.values()):
        return found
    # What each source can give for one unit of weight; an empty one cannot set the pace.
    units = [found[name] * rows[name] / weights[name] for name in found if rows.get(name)]
    pace = min(units, default=0.0)
    return {name: pace * weights[name] / rows[name] if rows.get(name) else 0.0 for name in found}


@dataclass(frozen=True, slots=True)
class Copies:
    """How often a source's records are trained on: `whole` times, and those below `place` again."""

    whole: int
    place: float = 0.0

    def of(self, record_id: str, seed: int) -> int:
        """Return the number of copies of one record."""
        again = self.place > 0 and place_of(f"{NAMESPACE}{record_id}", seed) < self.place
        return self.whole + again


def plan_copies(copies: float, ids: Iterable[str], seed: int) -> Copies:
    """Return who is copied how often, so that the copies add up to the average times the records.

    Records with the smallest hashes are taken once more; equal ids go together.
    """
    whole = math.floor(copies)
    if copies == whole:
        return Copies(whole)
    places = np.fromiter((place_of(f"{NAMESPACE}{each}", seed) for each in ids), np.float64)
    again = round((copies - whole) * len(places))
    if again >= len(places):
        return Copies(whole + 1)
    return Copies(whole, float(np.partition(places, again)[again]))
