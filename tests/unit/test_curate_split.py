"""Splits hold whole groups, chosen by the hash of their name."""

import json
from collections import Counter

import pytest

from pipelines.curate.places import place_of
from pipelines.curate.split import assign_split
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.plan import build_stage, get_stage
from pipelines.store import Store
from tests.assets.curation import (
    curation_recipe,
    folder_source,
    record,
    rows_of,
    run_stage,
    store_stage,
)

SETTINGS = {"seed": 42, "validation": 0.05, "test": 0.05}


def split(tmp_path, *shards, workers=1, **settings):
    recipe = curation_recipe(split=settings)
    return run_stage(tmp_path, "split", recipe, *shards, workers=workers)


def rows(groups, per_group=3):
    return [
        record(f"g{group:03d}:{number}", group=f"g{group:03d}", text=f"x = {number}")
        for group in groups
        for number in range(per_group)
    ]


def test_every_row_lands_in_the_split_of_its_group_and_no_shard_is_empty(tmp_path):
    shards = [rows(range(50)), rows(range(50, 51)), rows(range(51, 100))]
    every = [row for shard in shards for row in shard]

    store, ref = split(tmp_path, *shards, validation=0.1, test=0.2, workers=2)
    manifest = store.manifest(ref)

    settings = {"seed": 42, "validation": 0.1, "test": 0.2}
    for name in ("train", "validation", "test"):
        wanted = [row for row in every if assign_split(row["group"], settings) == name]
        assert rows_of(store, ref, name) == wanted
        assert manifest.report["splits"][name] == {
            "groups": len(wanted) // 3,
            "rows": len(wanted),
        }
    names = [(s.file, s.split) for s in manifest.shards]
    assert names[:3] == [
        ("train-00000.parquet", "train"),
        ("train-00001.parquet", "train"),
        ("train-00002.parquet", "train"),
    ]
    assert ("validation-00000.parquet", "validation") in names
    assert ("test-00000.parquet", "test") in names
    assert all(shard.rows for shard in manifest.shards)
    assert manifest.counts == Counts(rows_in=300, rows_out=300, used=300)


def test_shares_of_many_groups_come_out_as_asked():
    settings = {"seed": 7, "validation": 0.05, "test": 0.1}

    found = [assign_split(f"group {i}", settings) for i in range(20_000)]

    assert abs(found.count("validation") / 20_000 - 0.05) < 0.005
    assert abs(found.count("test") / 20_000 - 0.10) < 0.007


def test_these_groups_stay_where_they_are_for_good():
    settings = {"seed": 42, "validation": 0.25, "test": 0.25}

    assert [assign_split(name, settings) for name in ("a", "b", "c", "d", "e", "f")] == [
        "train", "train", "train", "validation", "test", "validation",
    ]  # fmt: skip


def test_a_split_that_few_groups_leave_empty_takes_the_next_in_line(tmp_path):
    store, ref = split(tmp_path, rows(range(6)), validation=0.01, test=0.01)
    report = store.manifest(ref).report

    order = sorted((f"g{i:03d}" for i in range(6)), key=lambda group: place_of(group, 42))
    assert report["moved"] == {order[0]: "test", order[1]: "validation"}
    assert {row["group"] for row in rows_of(store, ref, "test")} == {order[0]}
    assert {row["group"] for row in rows_of(store, ref, "validation")} == {order[1]}
    assert {row["group"] for row in rows_of(store, ref, "train")} == set(order[2:])


@pytest.mark.parametrize(
    ("groups", "settings", "message"),
    [
        (0, {}, "0 groups (files, questions, trees) are too few"),
        (2, {}, "2 groups (files, questions, trees) are too few"),
        (1, {}, "1 groups (files, questions, trees) are too few"),
    ],
)
def test_too_few_groups_are_one_line_that_says_what_to_do(tmp_path, groups, settings, message):
    with pytest.raises(SourceError) as caught:
        split(tmp_path, rows(range(groups)), **settings)

    assert str(caught.value).startswith(f"split: {message}")
    assert "add data" in str(caught.value)


def given_rows(source, **splits):
    return [
        record(f"{source}:{name}:{n}", source=source, text="x", meta=json.dumps({"split": name}))
        for name, number in splits.items()
        for n in range(number)
    ]


def splits_of(store, ref):
    return {
        name: {row["id"] for row in rows_of(store, ref, name)}
        for name in ("train", "validation", "test")
    }


def test_splits_that_the_data_brings_are_kept_and_nothing_of_theirs_is_trained_on(tmp_path):
    every = given_rows("s", train=200, validation=20, test=30)

    store, ref = split(tmp_path, every, validation=0.3, test=0.3)

    found = splits_of(store, ref)
    assert found == {
        name: {row["id"] for row in every if f":{name}:" in row["id"]} for name in found
    }
    report = store.manifest(ref).report
    assert report["predefined_groups"] == {"test": 30, "train": 200, "validation": 20}


@pytest.mark.parametrize(("only", "empty"), [("test", "validation"), ("validation", "test")])
def test_the_one_held_out_split_that_data_brings_is_both_and_every_row_stays_as_given(
    tmp_path, only, empty
):
    every = given_rows("s", **{"train": 200, only: 100})

    store, ref = split(tmp_path, every, validation=0.05, test=0.05)

    given = {name: {r["id"] for r in every if f":{name}:" in r["id"]} for name in ("train", only)}
    assert splits_of(store, ref) == {**given, empty: given[only]}
    manifest = store.manifest(ref)
    assert manifest.report["stands_in"] == {empty: only}
    assert {name: each["rows"] for name, each in manifest.report["splits"].items()} == {
        "train": 200, only: 100, empty: 100,
    }  # fmt: skip
    assert manifest.counts == Counts(rows_in=300, rows_out=400, used=300)


def test_a_group_of_several_splits_goes_to_the_one_farthest_from_training(tmp_path):
    both = [
        record(f"s:{name}", group="shared", text="x", meta=json.dumps({"split": name}))
        for name in ("test", "train")
    ]

    store, ref = split(tmp_path, [*given_rows("s", train=50, validation=5, test=5), *both])

    assert {"s:test", "s:train"} <= splits_of(store, ref)["test"]


@pytest.mark.parametrize("only_train", [True, False])
def test_the_recipe_splits_anew_where_asked_or_where_all_rows_are_train_rows(tmp_path, only_train):
    numbers = {"train": 300} if only_train else {"train": 200, "validation": 50, "test": 50}
    every = given_rows("s", **numbers)

    store, ref = split(tmp_path, every, validation=0.1, test=0.1, keep_predefined=only_train)

    settings = {"seed": 42, "validation": 0.1, "test": 0.1}
    assert splits_of(store, ref) == {
        name: {row["id"] for row in every if assign_split(row["group"], settings) == name}
        for name in ("train", "validation", "test")
    }


def mixed(tmp_path, rows, *sources, workers=1):
    settings = [{"path": str(tmp_path), **source} for source in sources]
    recipe = curation_recipe(*[folder_source(**source) for source in settings])
    return run_stage(tmp_path, "split", recipe, *rows, workers=workers)


def test_epochs_repeat_and_thin_a_source_in_training_alone(tmp_path):
    rows = [
        [record(f"{name}:{n}", source=name, text="x") for n in range(1000)] for name in ("a", "b")
    ]

    store, ref = mixed(tmp_path, rows, {"id": "a", "epochs": 2.5}, {"id": "b", "epochs": 0.5})

    manifest = store.manifest(ref)
    mixture = manifest.report["mixture"]
    train = rows_of(store, ref, "train")
    counted = Counter(row["id"] for row in train)
    a, b = (mixture[name] for name in "ab")
    assert (a["train_rows"], b["train_rows"]) == tuple(
        sum(1 for r in rows[i] if assign_split(r["group"], SETTINGS) == "train") for i in (0, 1)
    )
    assert {n for id_, n in counted.items() if id_.startswith("a")} == {2, 3}
    assert {n for id_, n in counted.items() if id_.startswith("b")} == {1}
    assert a["mixed_rows"] == sum(n for id_, n in counted.items() if id_.startswith("a"))
    assert a["mixed_rows"] == round(2.5 * a["train_rows"])
    assert b["mixed_rows"] == round(0.5 * b["train_rows"])
    assert manifest.counts.dropped == {"mixture": b["train_rows"] - b["mixed_rows"]}
    held_out = [*rows_of(store, ref, "validation"), *rows_of(store, ref, "test")]
    assert max(Counter(row["id"] for row in held_out).values()) == 1
    second = [row for row in train if row["meta"]]
    assert {json.loads(row["meta"])["copy"] for row in second} == {1, 2}


def test_weights_set_the_proportions_and_the_scarcest_source_is_used_up(tmp_path):
    rows = [
        [record(f"{name}:{n}", source=name, text="x") for n in range(count)]
        for name, count in (("a", 300), ("b", 3000))
    ]

    store, ref = mixed(tmp_path, rows, {"id": "a", "weight": 1}, {"id": "b", "weight": 3})

    mixture = store.manifest(ref).report["mixture"]
    assert mixture["a"]["mixed_rows"] == mixture["a"]["train_rows"]
    assert mixture["b"]["mixed_rows"] == 3 * mixture["a"]["mixed_rows"]
    assert abs(mixture["a"]["share"] + mixture["b"]["share"] - 1) < 1e-3


def test_a_mixture_does_not_depend_on_workers_or_shards(tmp_path):
    rows = [[record(f"a:{i}:{n}", source="a", text="x") for n in range(200)] for i in range(4)]
    joined = [[row for shard in rows for row in shard]]

    one, first = mixed(tmp_path / "1", rows, {"id": "a", "epochs": 1.5})
    _, second = mixed(tmp_path / "2", rows, {"id": "a", "epochs": 1.5}, workers=2)
    three, third = mixed(tmp_path / "3", joined, {"id": "a", "epochs": 1.5})

    assert first.digest == second.digest
    assert rows_of(one, first, "train") == rows_of(three, third, "train")


def test_weights_are_for_all_sources_or_for_none(tmp_path):
    sources = [folder_source(str(tmp_path), id="a", weight=1), folder_source(str(tmp_path), id="b")]
    with pytest.raises(ValueError, match="give every source a weight, or none"):
        curation_recipe(*sources)


def test_groups_that_near_duplicates_connect_never_cross_splits_even_between_sources(tmp_path):
    """Through the real dedup: files of two sources, every other one a near copy of its twin."""
    words = [[f"word{n}_{i}" for i in range(80)] for n in range(120)]
    shards = []
    for source in ("a", "b"):
        rows = []
        for number, text in enumerate(words):
            copied = text[:-2] if source == "b" and number % 2 else text
            body = copied if source == "a" or number % 2 else text[::-1]
            for part, text_ in enumerate((" ".join(body), f"own {source} {number}")):
                group = f"{source}:{number:03d}"
                rows.append(record(f"{group}:{part}", group=group, source=source, text=text_))
        shards.append(rows)
    recipe = curation_recipe(
        folder_source(tmp_path, id="a"), folder_source(tmp_path, id="b"),
        split={"validation": 0.2, "test": 0.2},
    )  # fmt: skip
    store = Store(tmp_path)
    refs = {"redact": store_stage(store, "redact", *shards)}
    for name in ("dedup", "decontaminate", "split"):
        refs[name] = build_stage(get_stage(name), recipe, refs, store)

    where = {
        row["group"]: split
        for split in ("train", "validation", "test")
        for row in rows_of(store, refs["split"], split)
    }

    assert len(where) == 240
    twins = [(f"a:{n:03d}", f"b:{n:03d}") for n in range(1, 120, 2)]
    assert all(where[ours] == where[theirs] for ours, theirs in twins)
    assert len({where[ours] for ours, _ in twins}) == 3
    alone = [(f"a:{n:03d}", f"b:{n:03d}") for n in range(0, 120, 2)]
    assert any(where[ours] != where[theirs] for ours, theirs in alone)
    assert store.manifest(refs["split"]).report["joined_groups"] == 60
