"""Packed shards as files: read without copies, opened by `datasets`, refused when damaged."""

import random
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import StoreError
from pipelines.manifest import Manifest
from pipelines.training.collate import PackedDataset
from tests.assets.real_texts import corpus_texts
from tests.assets.rendering import CORPUS, record, render_stages, rendering_recipe

RECORDS = [
    record(
        f"p:{i}", prompt=f"Return {i}.", completion=f"def f{i}():\n    return {i}\n" * (1 + i % 7)
    )
    for i in range(120)
] + [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]
NUM_DAMAGES = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed dataset of a few shards in each split."""
    recipe = rendering_recipe(
        tokenization__block_size=128,
        tokenization__rows_per_shard=24,
        model__config__n_positions=128,
    )
    splits = {"train": RECORDS, "validation": RECORDS[:40], "test": RECORDS[40:60]}
    store, refs = render_stages(tmp_path_factory.mktemp("packed"), recipe, splits)
    return store.path(refs["pack"])


def shard_paths(folder, split="train"):
    return [folder / s.file for s in Manifest.read(folder).shards if s.split == split]


def test_load_dataset_and_from_file_give_the_rows_that_are_read_for_training(folder, tmp_path):
    paths = [str(path) for path in shard_paths(folder)]
    dataset = PackedDataset(folder, "train")

    loaded = datasets.load_dataset(
        "arrow", data_files={"train": paths}, split="train", cache_dir=str(tmp_path)
    )
    mapped = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])

    assert len(paths) > 2
    assert len(loaded) == len(mapped) == len(dataset)
    for number, row in enumerate(dataset):
        wanted = {name: getattr(row, name).tolist() for name in ("input_ids", "labels", "lengths")}
        assert {name: loaded[number][name] for name in wanted} == wanted
        assert {name: mapped[number][name] for name in wanted} == wanted


def test_rows_are_views_of_the_mapped_file(folder):
    before = pa.total_allocated_bytes()

    dataset = PackedDataset(folder, "train")
    rows = [dataset[i] for i in range(len(dataset))]

    assert pa.total_allocated_bytes() == before
    assert not any(part.flags.owndata or part.flags.writeable for row in rows for part in row)
    assert {row.input_ids.dtype for row in rows} == {np.dtype(np.uint16)}


def truncate(path, others, dice):
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def flip(path, others, dice):
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def swap(path, others, dice):
    other = dice.choice(others)
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def test_none_of_400_damaged_datasets_is_opened(folder, tmp_path):
    dice = random.Random(5)
    paths = shard_paths(folder)
    contents = {path.name: path.read_bytes() for path in paths}
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    undetected, unnamed = [], []
    for number in range(NUM_DAMAGES):
        damage = (truncate, flip, swap)[number % 3]
        name = dice.choice(list(contents))
        others = [copy / other for other in contents if contents[other] != contents[name]]
        damage(copy / name, others, dice)
        changed = {n for n, data in contents.items() if (copy / n).read_bytes() != data}
        try:
            PackedDataset(copy, "train")
            undetected.append((damage.__name__, name))
        except StoreError as error:
            if not any(str(copy / n) in str(error) for n in changed):
                unnamed.append(str(error))
        for changed_name in changed:
            (copy / changed_name).write_bytes(contents[changed_name])

    assert undetected == []
    assert unnamed == []
    assert len(PackedDataset(copy, "train")) == len(PackedDataset(folder, "train"))


def test_a_missing_shard_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard_paths(copy)[1].unlink()

    with pytest.raises(StoreError, match=r"train-00001.arrow: missing; run the same command again"):
        PackedDataset(copy, "train")


def test_each_shard_says_its_rows_bytes_tokens_and_trained_tokens(folder):
    for shard in Manifest.read(folder).shards:
        with pa.ipc.open_stream(str(folder / shard.file)) as stream:
            table = stream.read_all()
        labels = table["labels"].combine_chunks().flatten().to_numpy()
        assert shard.rows == table.num_rows
        assert shard.bytes == (folder / shard.file).stat().st_size
        assert shard.tokens == len(labels)
        assert shard.trained_tokens == np.count_nonzero(labels != -100)


def test_real_text_fills_rows_of_2048_tokens(real_data, tmp_path):
    folders = ("gpteacher_codegen", "oasst_en100_trees", "oasst_seed_messages", "humaneval")
    texts = [t for name in folders for t in corpus_texts(real_data / name) if t.strip()]
    records = [
        record(f"p:{i}", prompt="Continue.", completion=text) for i, text in enumerate(texts)
    ]
    recipe = rendering_recipe(
        tokenization__block_size=2048, model__config__n_positions=2048, fim__fim_rate=0
    )

    store, refs = render_stages(tmp_path, recipe, {"train": records})
    counted = store.manifest(refs["pack"]).report["token_report"]["splits"]["train"]

    assert counted["examples"] >= 10_000
    assert counted["fill"] >= 0.995
    assert counted["rows"] <= -(-counted["tokens"] // 2048) + 1
