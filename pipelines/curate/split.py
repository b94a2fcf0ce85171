"""Stage `split`: a group is held out or trained on as a whole, by the hash of its name.

A group's split depends on the seed and its name alone: it stays where it is when data grows, and
no group ever lies in two splits.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import read_rows, write_rows

DEPENDS = ("pyarrow",)
SPLITS = ("train", "validation", "test")


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the shares and the seed."""
    return recipe.split.model_dump(mode="json")


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Write the shards of each split, in order, none of them empty; the report counts groups.

    Raises SourceError where nothing is left to train on, or nothing fell into a held-out share.
    """
    given = params(recipe)
    shards = inputs["dedup"].paths()
    groups: dict[str, set[str]] = {name: set() for name in SPLITS}
    rows = [_count_rows(path, given, groups) for _, path in shards]
    _check_filled(recipe, groups)
    made: list[ShardReport] = []
    for split in SPLITS:
        holding = [path for (_, path), count in zip(shards, rows, strict=True) if count[split]]
        jobs = [
            Job(f"{split}-{number:05d}.parquet", (path,), split)
            for number, path in enumerate(holding)
        ]
        made += work.map(select_rows, jobs, {**given, "select": split})
    report = {
        split: {"groups": len(groups[split]), "rows": sum(count[split] for count in rows)}
        for split in SPLITS
    }
    return Built(tuple(made), {"splits": report})


def _count_rows(path: Path, params: Params, groups: dict[str, set[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in read_rows(path, ["group"]):
        split = assign_split(row["group"], params)
        groups[split].add(row["group"])
        found[split] += 1
    return found


def _check_filled(recipe: Recipe, groups: Mapping[str, set[str]]) -> None:
    total = sum(map(len, groups.values()))
    if not groups["train"]:
        raise SourceError(f"split: none of {total} groups is left to train on; add data")
    for name in ("validation", "test"):
        share = getattr(recipe.split, name)
        if share and not groups[name]:
            raise SourceError(
                f"split: none of {total} groups fell into {name} (share {share}); "
                f"raise split.{name}, change split.seed or add data"
            )


def assign_split(group: str, params: Params) -> str:
    """Return the split of a group: sha256 of seed and name, as a number in [0, 1).

    >>> assign_split("a", {"seed": 42, "validation": 0.0, "test": 0.0})
    'train'
    """
    digest = hashlib.sha256(f"{params['seed']}\0{group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < params["test"]:
        return "test"
    return "validation" if place < params["test"] + params["validation"] else "train"


def select_rows(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy the rows of one split; the others are counted by the shards of theirs."""
    wanted = params["select"]
    kept = [row for row in read_rows(inputs[0]) if assign_split(row["group"], params) == wanted]
    write_rows(output, kept)
    return Outcome(Counts(rows_in=len(kept), rows_out=len(kept), used=len(kept)))
