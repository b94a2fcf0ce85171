"""Packing loses nothing, cuts nothing, fills no row beyond a block, and is repeatable."""

import tempfile
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.render.pack import (
    cut_stream,
    gather_examples,
    order_rows,
    pack_shard,
    plan_rows,
    unpack,
    whole_examples,
    write_plans,
)
from tests.assets.rendering import write_examples

BLOCK = 40
PARAMS = {"wide_ids": False, "mixing": False}
LENGTHS = st.lists(st.integers(1, BLOCK), max_size=60)
EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), min_size=1, max_size=BLOCK),
    max_size=25,
)


@settings(deadline=None)
@given(LENGTHS)
def test_every_example_is_in_one_row_and_no_row_is_over_full(lengths):
    plan = plan_rows(lengths, BLOCK)

    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= BLOCK for row in plan)
    assert plan == plan_rows(lengths, BLOCK)


@settings(deadline=None)
@given(LENGTHS)
def test_no_two_rows_would_have_fitted_in_one(lengths):
    sizes = sorted(sum(lengths[i] for i in row) for row in plan_rows(lengths, BLOCK))

    assert len(sizes) < 2 or sizes[0] + sizes[1] > BLOCK


@settings(deadline=None, max_examples=40)
@given(EXAMPLES, st.integers(1, 50), st.integers(1, 4))
def test_constant_length_rows_are_the_stream_cut_at_every_block(examples, block_size, per_shard):
    rows = [
        {
            "record_id": f"r:{number}",
            "source": "s",
            "fim": "none",
            "input_ids": [token for token, _ in example],
            "labels": [token if trained else -100 for token, trained in example],
        }
        for number, example in enumerate(examples)
    ]
    order = list(range(len(rows)))[::-1]
    owners = [rows[i]["record_id"] for i in order for _ in rows[i]["input_ids"]]
    stream = [token for i in order for token in rows[i]["input_ids"]]
    labels = [label for i in order for label in rows[i]["labels"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "examples.arrow"
        write_examples(source, rows)
        gathered = gather_examples([source], folder, "train")
        segments = cut_stream(order, gathered, block_size)
        packed = []
        for job in write_plans(segments, gathered, "train", per_shard, folder):
            pack_shard(job.inputs, folder / job.file, {**PARAMS, "mixing": True})
            with pa.ipc.open_stream(str(folder / job.file)) as stream_file:
                packed += stream_file.read_all().to_pylist()

    whole = [range(i, i + block_size) for i in range(0, len(stream) - block_size + 1, block_size)]
    assert [row["input_ids"] for row in packed] == [[stream[i] for i in span] for span in whole]
    assert [row["labels"] for row in packed] == [[labels[i] for i in span] for span in whole]
    assert [row["lengths"] for row in packed] == [[block_size]] * len(whole)
    assert [row["record_ids"] for row in packed] == [
        list(dict.fromkeys(owners[i] for i in span)) for span in whole
    ]


@settings(deadline=None, max_examples=40)
@given(EXAMPLES, st.integers(1, 4), st.sampled_from(["train", "test"]))
def test_unpacking_gives_every_example_back(examples, rows_per_shard, split):
    rows = [
        {
            "record_id": f"r:{number}",
            "source": "s",
            "fim": "none",
            "input_ids": [token for token, _ in example],
            "labels": [token if trained else -100 for token, trained in example],
        }
        for number, example in enumerate(examples)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "examples.arrow"
        write_examples(source, rows)
        gathered = gather_examples([source], folder, split)
        plan = order_rows(plan_rows(gathered.lengths.tolist(), BLOCK), split, {"seed": 1})
        packed = []
        segments = whole_examples(plan, gathered)
        for job in write_plans(segments, gathered, split, rows_per_shard, folder):
            outcome = pack_shard(job.inputs, folder / job.file, PARAMS)
            with pa.ipc.open_stream(str(folder / job.file)) as stream:
                found = stream.read_all().to_pylist()
            assert outcome.counts.rows_out == len(found) <= rows_per_shard
            assert outcome.tokens == sum(len(row["input_ids"]) for row in found)
            packed += found

    unpacked = sorted(example for row in packed for example in unpack(row))
    assert unpacked == sorted((r["record_id"], r["input_ids"], r["labels"]) for r in rows)
    assert all(len(row["input_ids"]) <= BLOCK for row in packed)
