"""Stage `split`: a group is held out or trained on as a whole, by the hash of its name.

A group's split depends on the seed and its name alone: it stays where it is when data grows, and
no group ever lies in two splits. Groups that near-duplicates connect (`meta.joined`, from the dedup
stage) go by one name, across sources, too. Three things come before the hash: a split that the
data brings (`meta.split`, unless `keep_predefined` is off), where a group with rows of several goes
to the one farthest from training; where the data brings one held-out split alone, it is both
validation and test, and every row stays in the split it came with; and where too few groups leave a
held-out split empty, it takes the train group that is next in line. The report names both. Train
rows are then repeated or thinned as the mixture asks.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.curate.mixture import Copies, copies_per_record, plan_copies
from pipelines.curate.places import place_of
from pipelines.curate.rows import add_meta
from pipelines.curate.selection import JOINED
from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import Row, read_rows, write_rows

DEPENDS = ("pyarrow",)
SPLITS = ("train", "validation", "test")
ONCE = Copies(1)


@dataclass(slots=True)
class _Seen:
    """What a first look over all rows finds: groups, and what their records' meta says of them.

    `names` holds joined groups once; `joined` tells those that go by another one's name.
    """

    names: set[str] = field(default_factory=set)
    joined: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)
    source_of: dict[str, str] = field(default_factory=dict)


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the shares, the seed, and how the sources are mixed."""
    mixture = [
        source.model_dump(mode="json", include={"id", "weight", "epochs"})
        for source in recipe.sources
    ]
    return {**recipe.split.model_dump(mode="json"), "mixture": mixture}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Write the shards of each split, in order, none of them empty; the report counts groups.

    Raises SourceError where there are too few groups to train on some and hold others out.
    """
    shards = [path for _, path in inputs["decontaminate"].paths()]
    settings = params(recipe)
    seen = _look(shards)
    settings["joined"] = seen.joined
    settings["given"] = _predefined(seen) if settings["keep_predefined"] else {}
    stands_in = find_stand_in(seen.names, settings)
    settings["moved"] = fill_empty(seen.names, settings, stands_in)
    groups: dict[str, set[str]] = {name: set() for name in SPLITS}
    by_source: Counter[str] = Counter()
    rows = [_count_rows(path, settings, groups, by_source) for path in shards]
    copies = _plan(shards, copies_per_record(settings["mixture"], by_source), settings)
    made: list[ShardReport] = []
    for split in SPLITS:
        read = stands_in.get(split, split)
        holding = [path for path, count in zip(shards, rows, strict=True) if count[read]]
        jobs = [
            Job(f"{split}-{number:05d}.parquet", (path,), split)
            for number, path in enumerate(holding)
        ]
        given = {**settings, "select": read, "copies": copies if split == "train" else {}}
        made += work.map(select_rows, jobs, given)
    report = {
        split: {"groups": len(groups[read]), "rows": sum(count[read] for count in rows)}
        for split in SPLITS
        for read in [stands_in.get(split, split)]
    }
    # Rows that are read for two splits came in once.
    once = sum((each.counts for each in made if each.shard.split not in stands_in), Counts())
    counts = replace(once, rows_out=sum(each.counts.rows_out for each in made))
    mixture = _realised(settings["mixture"], by_source, made)
    predefined = dict(sorted(Counter(settings["given"].values()).items()))
    return Built(
        tuple(made),
        {
            "splits": report,
            "moved": settings["moved"],
            "stands_in": stands_in,
            "predefined_groups": predefined,
            "joined_groups": len(seen.joined),
            "mixture": mixture,
        },
        counts,
    )


def _plan(
    shards: Sequence[Path], averages: Mapping[str, float], params: Params
) -> dict[str, Copies]:
    """Return how often the train records of each source are copied."""

    def train_ids(source: str) -> Iterator[str]:
        for path in shards:
            for row in read_rows(path, ["id", "group", "source"]):
                if row["source"] == source and assign_split(row["group"], params) == "train":
                    yield row["id"]

    return {
        source: plan_copies(average, train_ids(source), params["seed"])
        for source, average in averages.items()
    }


def _realised(
    mixture: Sequence[Mapping[str, Any]], rows: Mapping[str, int], made: Sequence[ShardReport]
) -> dict[str, dict[str, Any]]:
    """Return for each source its train rows before and after mixing, and its share of them."""
    mixed: Counter[str] = Counter()
    for report in made:
        mixed.update(report.extra.get("sources", {}))
    total = mixed.total()
    return {
        source["id"]: {
            "weight": source["weight"],
            "epochs": source["epochs"],
            "train_rows": rows[source["id"]],
            "mixed_rows": mixed[source["id"]],
            "share": round(mixed[source["id"]] / total, 4) if total else 0.0,
        }
        for source in mixture
    }


def _look(shards: Sequence[Path]) -> _Seen:
    seen = _Seen()
    for path in shards:
        for row in read_rows(path, ["group", "source", "meta"]):
            said = _said(row["meta"])
            name = str(said.get(JOINED, row["group"]))
            seen.names.add(name)
            if name != row["group"]:
                seen.joined[row["group"]] = name
            split = said.get("split")
            if split in SPLITS:
                seen.sources.setdefault(row["source"], set()).add(split)
                seen.source_of[name] = row["source"]
                seen.given[name] = max(seen.given.get(name, split), split, key=SPLITS.index)
    return seen


def _said(meta: str | None) -> dict[str, Any]:
    """Return a record's meta where it says something of the split; most say nothing."""
    if meta is None or not ('"split":' in meta or f'"{JOINED}":' in meta):
        return {}
    found: dict[str, Any] = json.loads(meta)
    return found


def _predefined(seen: _Seen) -> dict[str, str]:
    """Return {group: split} as the data brings them; a source of nothing but train brings none."""
    return {
        group: split
        for group, split in seen.given.items()
        if seen.sources[seen.source_of[group]] != {"train"}
    }


def _count_rows(
    path: Path, params: Params, groups: dict[str, set[str]], by_source: Counter[str]
) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in read_rows(path, ["group", "source"]):
        split = assign_split(row["group"], params)
        groups[split].add(row["group"])
        found[split] += 1
        by_source[row["source"]] += split == "train"
    return found


def find_stand_in(groups: Collection[str], params: Params) -> dict[str, str]:
    """Return {split: split read in its place} where the data brings only one that is held out.

    Taking rows for the other would change a split that is to be kept as it was given.
    """
    filled = {assign_split(group, params) for group in groups}
    brought = set(params["given"].values())
    for empty, other in (("validation", "test"), ("test", "validation")):
        if empty not in filled and other in brought:
            return {empty: other}
    return {}


def fill_empty(
    groups: Collection[str], params: Params, stands_in: Mapping[str, str]
) -> dict[str, str]:
    """Return {group: split} for the train groups that have to fill an empty held-out split.

    Raises SourceError where fewer groups than splits are left.
    """
    order = sorted(groups, key=lambda group: place_of(group, params["seed"]))
    filled = Counter(assign_split(group, params) for group in order)
    empty = [name for name in ("test", "validation") if params[name] and not filled[name]]
    wanted = [name for name in empty if name not in stands_in]
    train = [group for group in order if assign_split(group, params) == "train"]
    if len(train) <= len(wanted):
        raise SourceError(
            f"split: {len(groups)} groups (files, questions, trees) are too few to train on some "
            f"and hold others out (empty: {', '.join([*wanted, 'train'])}); add data"
        )
    return dict(zip(train, wanted, strict=False))


def assign_split(group: str, params: Params) -> str:
    """Return the split of a group by the place of its name, or of the one that it is joined to.

    `given` and `moved` name the exceptions.

    >>> assign_split("a", {"seed": 42, "validation": 0.0, "test": 0.0})
    'train'
    """
    name = params.get("joined", {}).get(group, group)
    for exceptions in (params.get("moved"), params.get("given")):
        if exceptions and name in exceptions:
            return str(exceptions[name])
    place = place_of(name, params["seed"])
    if place < params["test"]:
        return "test"
    return "validation" if place < params["test"] + params["validation"] else "train"


def select_rows(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Copy the rows of one split, each as often as the mixture asks.

    Rows of other splits are counted by the shards of theirs.
    """
    copies, wanted = params["copies"], params["select"]
    kept: list[Row] = []
    mixed: Counter[str] = Counter()
    rows = left_out = 0
    for row in read_rows(inputs[0]):
        if assign_split(row["group"], params) != wanted:
            continue
        rows += 1
        made = list(_copies(row, copies.get(row["source"], ONCE), params["seed"]))
        left_out += not made
        mixed[row["source"]] += len(made)
        kept.extend(made)
    write_rows(output, kept)
    dropped = {"mixture": left_out} if left_out else {}
    extra = {"sources": dict(sorted(mixed.items()))} if wanted == "train" else {}
    counts = Counts(rows_in=rows, rows_out=len(kept), used=rows - left_out, dropped=dropped)
    return Outcome(counts, extra=extra)


def _copies(row: Row, copies: Copies, seed: int) -> Iterator[Row]:
    """Yield a row's copies; all but the first say so, that their code is permuted anew."""
    for number in range(copies.of(row["id"], seed)):
        copy = dict(row)
        if number:
            add_meta(copy, copy=number)
        yield copy
