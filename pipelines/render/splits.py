"""The splits of a dataset: the three of its records, further passes over train, and twins.

`train.1`, `train.2`, ... hold the train split once more, its code permuted anew: epoch e trains
pass e mod `fim_passes`. `validation.none`, `validation.psm` and `validation.spm` hold the same
held-out code in each order.
"""

from collections.abc import Iterator
from typing import Any

from pipelines.render.fim import ORDERS, is_permuted
from pipelines.settings.fim import Fim

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")


def list_extra_splits(settings: Fim) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each further split, the one whose records it holds, and how these are rendered."""
    if not is_permuted(settings):
        return
    for number in range(1, settings.fim_passes):
        yield f"{TRAIN}.{number}", TRAIN, {"pass": number}
    for order in ORDERS:
        yield f"{VALIDATION}.{order}", VALIDATION, {"twin": order}


def is_extra(split: str) -> bool:
    """Return whether a split holds records that another split holds already."""
    return "." in split


def origin_of(split: str) -> str:
    """Return the split whose records a split holds."""
    return split.partition(".")[0]
