import random

import pytest

from pipelines.errors import TemplateError
from pipelines.render import pack
from pipelines.render.pack import plan_rows, unpack
from tests.assets.rendering import CORPUS, read_examples, record, render_stages, rendering_recipe

FUNCTIONS = [
    record(
        f"p:{i}", prompt=f"Return {i}.", completion=f"def f{i}():\n    return {i}\n" * (1 + i % 7)
    )
    for i in range(60)
]
CODE = [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]
SPLITS = {"train": FUNCTIONS + CODE, "validation": FUNCTIONS[:9], "test": FUNCTIONS[5:6]}
SMALL = {
    "tokenization__block_size": 128,
    "tokenization__rows_per_shard": 16,
    "model__config__n_positions": 128,
}


def open_dataset(store, refs, split):
    import datasets

    shards = store.shards(refs["pack"], split)
    return [row for _, path in shards for row in datasets.Dataset.from_file(str(path))]


def tokenized(store, refs, split):
    shards = store.shards(refs["tokenize"], split)
    return [
        (row["record_id"], row["input_ids"], row["labels"])
        for _, path in shards
        for row in read_examples(path)
    ]


def test_the_dataset_holds_every_example_whole_and_opens_in_datasets(tmp_path):
    import datasets

    store, refs = render_stages(tmp_path, rendering_recipe(**SMALL), SPLITS)
    manifest = store.manifest(refs["pack"])

    for split in SPLITS:
        rows = open_dataset(store, refs, split)
        unpacked = [example for row in rows for example in unpack(row)]
        assert sorted(unpacked) == sorted(tokenized(store, refs, split))
        assert all(len(row["input_ids"]) == len(row["labels"]) <= 128 for row in rows)
        assert all(sum(row["lengths"]) == len(row["input_ids"]) for row in rows)
        shards = [shard for shard, _ in store.shards(refs["pack"], split)]
        assert [shard.rows for shard in shards[:-1]] == [16] * (len(shards) - 1)
        assert sum(s.rows for s in shards) == len(rows)
        assert sum(s.tokens for s in shards) == sum(len(row["input_ids"]) for row in rows)
        assert sum(s.trained_tokens for s in shards) == sum(
            label != -100 for row in rows for label in row["labels"]
        )
    assert manifest.counts.rows_in == manifest.counts.used == refs["tokenize"].rows
    first = datasets.Dataset.from_file(str(store.shards(refs["pack"], "train")[0][1]))
    assert {name: str(feature.feature.dtype) for name, feature in first.features.items()} == {
        "input_ids": "uint16", "labels": "int32", "lengths": "int32", "record_ids": "string",
    }  # fmt: skip
    assert [p.name for p in store.path(refs["pack"]).iterdir() if p.name.startswith(".")] == []


def test_a_large_vocabulary_gets_int32_ids(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(pack, "UINT16_IDS", 500)

    store, refs = render_stages(tmp_path, rendering_recipe(**SMALL), SPLITS)

    shard = datasets.Dataset.from_file(str(store.shards(refs["pack"], "test")[0][1]))
    assert str(shard.features["input_ids"].feature.dtype) == "int32"
    assert [e for row in shard for e in unpack(row)] == tokenized(store, refs, "test")


def test_shards_have_the_same_bytes_whatever_the_workers_and_the_input_shards(tmp_path):
    train = SPLITS["train"]
    in_parts = {**SPLITS, "train": [train[:7], train[7:30], train[30:]]}
    builds = [(SPLITS, 1), (SPLITS, 3), (in_parts, 1), (in_parts, 3)]

    digests = set()
    for number, (splits, workers) in enumerate(builds):
        root = tmp_path / str(number)
        _, refs = render_stages(root, rendering_recipe(**SMALL), splits, workers=workers)
        digests.add(refs["pack"].digest)

    assert len(digests) == 1


def test_only_what_decides_the_rows_changes_the_dataset(tmp_path):
    digests = [
        render_stages(tmp_path, rendering_recipe(**SMALL, **changes), SPLITS)[1]["pack"].digest
        for changes in ({}, {"training__seed": 7, "training__max_steps": 3}, {"split__seed": 7})
    ]

    assert digests[0] == digests[1] != digests[2]


def test_train_rows_are_shuffled_and_held_out_rows_keep_their_order(tmp_path):
    store, refs = render_stages(tmp_path, rendering_recipe(**SMALL), SPLITS)
    order = {
        split: {
            row: i for i, (row, _, _) in reversed(list(enumerate(tokenized(store, refs, split))))
        }
        for split in ("train", "validation")
    }

    firsts = {
        split: [
            min(order[split][record_id] for record_id in row["record_ids"])
            for row in open_dataset(store, refs, split)
        ]
        for split in order
    }

    assert firsts["validation"] == sorted(firsts["validation"])
    assert firsts["train"] != sorted(firsts["train"])
    longest = [max(row["lengths"]) for row in open_dataset(store, refs, "train")]
    assert longest != sorted(longest, reverse=True)


def test_nothing_left_to_train_on_is_an_error_that_says_what_was_dropped(tmp_path):
    long = [record("a", prompt="Say many.", completion="many " * 500)]

    with pytest.raises(TemplateError) as error:
        render_stages(tmp_path, rendering_recipe(**SMALL), {"train": long, "test": FUNCTIONS[:3]})

    assert str(error.value) == (
        "no example is left to train on (dropped: {'too_long': 1}); "
        "raise tokenization.block_size (128) or loosen the filters"
    )


@pytest.mark.parametrize("block_size", [1024, 2048, 8192])
def test_ten_thousand_examples_of_realistic_lengths_fill_their_rows(block_size):
    rng = random.Random(7)
    lengths = [min(block_size, max(8, int(rng.lognormvariate(5.5, 1.0)))) for _ in range(10_000)]

    plan = plan_rows(lengths, block_size)

    assert sorted(i for row in plan for i in row) == list(range(10_000))
    assert sum(lengths) / (len(plan) * block_size) >= 0.995


def test_best_fit_takes_the_fullest_row_that_still_has_room():
    assert plan_rows([3, 7, 5, 5, 2, 1], 10) == [[1, 0], [2, 3], [4, 5]]
    assert plan_rows([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]
    assert plan_rows([], 10) == []
    assert plan_rows([10, 10], 10) == [[0], [1]]
