"""How often each record is trained on, so that sources come in the proportions the recipe asks.

`epochs` repeats a source, or thins it below 1. Where sources have a `weight`, records are taken in
these proportions: the source that is scarcest for its weight is used up (its epochs included),
the others are thinned. Which records go is decided by the hash of their id, so that it does not
change with the order or number of shards, and hardly when data grows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.curate.places import place_of

Settings = Mapping[str, Any]  # id, weight, epochs


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


def num_copies(record_id: str, copies: float, seed: int) -> int:
    """Return how many copies of one record there are: the average, rounded by the id's hash."""
    whole = math.floor(copies)
    return whole + (place_of(f"mixture\0{record_id}", seed) < copies - whole)
