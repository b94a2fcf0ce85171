"""Splits hold whole groups, chosen by the hash of their name."""

import pytest

from pipelines.curate.split import assign_split, place_of
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from tests.assets.curation import curation_recipe, record, rows_of, run_stage


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
