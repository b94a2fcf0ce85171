"""Stage `split`: a group is held out or trained on as a whole, by the hash of its name.

A group's split depends on the seed and its name alone: it stays where it is when data grows, and
no group ever lies in two splits. The one exception: where too few groups leave a held-out split
empty, it takes the train group that is next in line; the report names it.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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

    Raises SourceError where there are too few groups to train on some and hold others out.
    """
    shards = inputs["dedup"].paths()
    seen = {row["group"] for _, path in shards for row in read_rows(path, ["group"])}
    given = {**params(recipe), "moved": fill_empty(seen, params(recipe))}
    groups: dict[str, set[str]] = {name: set() for name in SPLITS}
    rows = [_count_rows(path, given, groups) for _, path in shards]
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
    return Built(tuple(made), {"splits": report, "moved": given["moved"]})


def _count_rows(path: Path, params: Params, groups: dict[str, set[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in read_rows(path, ["group"]):
        split = assign_split(row["group"], params)
        groups[split].add(row["group"])
        found[split] += 1
    return found


def fill_empty(groups: Collection[str], params: Params) -> dict[str, str]:
    """Return {group: split} for the train groups that have to fill an empty held-out split.

    Raises SourceError where fewer groups than splits are left.
    """
    order = sorted(groups, key=lambda group: place_of(group, params["seed"]))
    filled = Counter(assign_split(group, params) for group in order)
    wanted = [name for name in ("test", "validation") if params[name] and not filled[name]]
    train = [group for group in order if assign_split(group, params) == "train"]
    if len(train) <= len(wanted):
        raise SourceError(
            f"split: {len(groups)} groups (files, questions, trees) are too few to train on some "
            f"and hold others out (empty: {', '.join([*wanted, 'train'])}); add data"
        )
    return dict(zip(train, wanted, strict=False))


def place_of(group: str, seed: int) -> float:
    """Return the sha256 of seed and name as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_split(group: str, params: Params) -> str:
    """Return the split of a group by its place; `moved` names the exceptions.

    >>> assign_split("a", {"seed": 42, "validation": 0.0, "test": 0.0})
    'train'
    """
    moved: dict[str, str] = params.get("moved") or {}
    if group in moved:
        return moved[group]
    place = place_of(group, params["seed"])
    if place < params["test"]:
        return "test"
    return "validation" if place < params["test"] + params["validation"] else "train"


def select_rows(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy the rows of one split; the others are counted by the shards of theirs."""
    wanted = params["select"]
    kept = [row for row in read_rows(inputs[0]) if assign_split(row["group"], params) == wanted]
    write_rows(output, kept)
    return Outcome(Counts(rows_in=len(kept), rows_out=len(kept), used=len(kept)))
