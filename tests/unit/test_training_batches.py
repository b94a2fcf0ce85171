"""Packed rows to batches, packed documents apart, and the token-weighted loss."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import GPTBigCodeConfig, LlamaConfig, Starcoder2Config

from pipelines.errors import StoreError, TrainingError
from pipelines.manifest import Manifest, Shard
from pipelines.store import Store
from pipelines.training import collate
from pipelines.training.attention import build_twin, check_packing, packing_difference
from pipelines.training.collate import Collator, FlatShape, PackedDataset, PackedRow, PassedDataset
from pipelines.training.loss import EvalLoss, evaluate_loss
from pipelines.training.models import build_model
from tests.assets.training_runs import build_stages, make_recipe, packed_rows, write_tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def folder(store):
    return store.path(build_stages(store)["pack"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(make_recipe(), write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def row(ids, labels, lengths):
    return PackedRow(np.array(ids, np.uint16), np.array(labels, np.int32), np.array(lengths))


def test_a_batch_restarts_positions_per_document_and_unlabels_every_first_token():
    rows = [
        row([1, 2, 3, 4, 5], [1, 2, -100, 4, 5], [3, 2]),
        row([6, 7], [6, 7], [2]),
    ]

    batch = Collator(pad_id=9)(rows)

    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]],
        "labels": [[-100, 2, -100, -100, 5], [-100, 7, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_flat_batch_is_one_row_with_the_boundaries_of_its_documents():
    rows = [
        row([1, 2, 3, 4, 5], [1, 2, -100, 4, 5], [3, 2]),
        row([6, 7], [6, 7], [2]),
    ]
    flat = {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7]],
        "labels": [[-100, 2, -100, -100, 5, -100, 7]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5, 7],
        "cu_seq_lens_k": [0, 3, 5, 7],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    fixed = flat | {
        "input_ids": [[*flat["input_ids"][0], 9, 9, 9, 9, 9]],
        "labels": [[*flat["labels"][0], -100, -100, -100, -100, -100]],
        "position_ids": [[*flat["position_ids"][0], 0, 1, 2, 3, 0]],
        "cu_seq_lens_q": [0, 3, 5, 7, 11, 12, 12],
        "cu_seq_lens_k": [0, 3, 5, 7, 11, 12, 12],
        "max_length_q": 4,
        "max_length_k": 4,
    }

    def listed(batch):
        return {k: v.tolist() if torch.is_tensor(v) else v for k, v in batch.items()}

    assert listed(Collator(pad_id=9, flat=True)(rows)) == flat
    assert listed(Collator(pad_id=9, fixed=FlatShape(12, 6, 4))(rows)) == fixed
    for shape in (FlatShape(6, 6, 4), FlatShape(12, 4, 4), FlatShape(12, 6, 2)):
        with pytest.raises(ValueError, match="2 rows do not fit into FlatShape"):
            Collator(pad_id=9, fixed=shape)(rows)


def test_the_sources_of_a_row_are_what_its_record_ids_begin_with(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.assets.training_runs.packed_rows", sourced_rows)
    store = Store(tmp_path)
    dataset = PackedDataset(store.path(build_stages(store)["pack"]), "train")

    assert dataset.sources(0) == ["oasst", "stack-exchange"]
    assert dataset.sources(30) == ["unnamed"]


def sourced_rows(number, seed=0):
    rows = packed_rows(number, seed)
    first = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "lengths": [1, 2]}
    last = {"input_ids": [5], "labels": [5], "lengths": [1], "record_ids": ["of-no-source"]}
    if number > 30:
        rows[0] = first | {"record_ids": ["oasst:1:a", "stack-exchange:2"]}
        rows[30] = last
    return rows


def test_each_epoch_reads_its_pass_and_a_short_pass_begins_anew(tmp_path, folder, monkeypatch):
    sizes = {"train": 3, "train.1": 5, "train.2": 4}

    class Rows(list):
        def __init__(self, _, split, *, rehash):
            assert rehash
            super().__init__(f"{split}:{i}" for i in range(sizes[split]))

    shards = tuple(Shard(f"{s}.arrow", rows, 1, "", s) for s, rows in sizes.items())
    monkeypatch.setattr(collate, "PackedDataset", Rows)
    monkeypatch.setattr(
        collate,
        "_read_manifest",
        lambda _: dataclasses.replace(Manifest.read(folder), shards=shards),
    )
    dataset = PassedDataset(tmp_path)

    epochs = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        epochs.append([dataset[i] for i in range(len(dataset))])

    assert epochs == [
        ["train:0", "train:1", "train:2", "train:0", "train:1"],
        ["train.1:0", "train.1:1", "train.1:2", "train.1:3", "train.1:4"],
        ["train.2:0", "train.2:1", "train.2:2", "train.2:3", "train.2:0"],
        epochs[0],
    ]
    with pytest.raises(IndexError):
        dataset[5]


def test_a_packed_dataset_gives_every_row_of_a_split_across_shards_and_batches(folder):
    dataset = PackedDataset(folder, "train")

    found = [[part.tolist() for part in dataset[i]] for i in range(len(dataset))]

    expected = packed_rows(40, seed=len("train"))
    assert found == [[r["input_ids"], r["labels"], r["lengths"]] for r in expected]
    assert dataset[39].input_ids.dtype == np.uint16
    with pytest.raises(IndexError):
        dataset[40]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "rows"])
def test_a_shard_that_differs_from_its_manifest_is_refused_by_name(tmp_path, damage):
    store = Store(tmp_path)
    folder = store.path(build_stages(store)["pack"])
    path = folder / "train-00001.arrow"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-60] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-8])
    elif damage == "missing":
        path.unlink()
    else:
        manifest = Manifest.read(folder)
        shards = tuple(
            dataclasses.replace(s, rows=s.rows + (s.file == path.name)) for s in manifest.shards
        )
        dataclasses.replace(manifest, shards=shards).write(folder)

    with pytest.raises(StoreError, match=r"train-00001\.arrow"):
        PackedDataset(folder, "train")


def test_a_split_without_rows_is_refused_by_name(folder):
    with pytest.raises(StoreError, match="split 'holdout' holds no rows"):
        PackedDataset(folder, "holdout")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        GPTBigCodeConfig(n_layer=1, n_embd=48, n_head=6, vocab_size=64),
        Starcoder2Config(vocab_size=64),
        LlamaConfig(vocab_size=64),
    ],
    ids=lambda config: config.model_type,
)
def test_packed_documents_have_the_logits_they_have_alone(config, attention):
    assert packing_difference(build_twin(config, attention), "cpu") < 1e-4


@pytest.mark.parametrize("mistake", ["attention_mask", "use_cache", "position_ids"])
def test_the_packing_check_sees_every_known_way_to_mix_documents(mistake):
    twin = build_twin(GPTBigCodeConfig(vocab_size=64), "sdpa")
    forward = twin.forward

    def mistaken(**inputs):
        shape = inputs["input_ids"].shape
        wrong = {
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "use_cache": True,
            "position_ids": torch.arange(shape[1]).expand(shape),
        }
        return forward(**inputs | {mistake: wrong[mistake]})

    twin.forward = mistaken

    assert packing_difference(twin, "cpu") > 0.1


def test_mixing_stops_training_with_one_line(model, monkeypatch):
    check_packing(model, "cpu")
    monkeypatch.setattr("pipelines.training.attention.packing_difference", lambda *_: 7.4)

    with pytest.raises(TrainingError, match="gpt_bigcode with attention 'sdpa' mixes packed"):
        check_packing(model, "cpu")


def test_the_loss_is_the_same_for_every_batch_size_and_any_split_of_the_rows(model, folder):
    dataset = PackedDataset(folder, "validation")
    whole = evaluate_loss(model, dataset, 4, "cpu")

    others = [evaluate_loss(model, dataset, size, "cpu") for size in (1, 2, 9)]
    parts = [evaluate_loss(model, dataset, 2, "cpu", rows=range(i, 9, 2)) for i in (0, 1)]

    trained = sum(
        label != -100 for r in packed_rows(9, seed=len("validation")) for label in r["labels"]
    )
    assert whole.tokens == trained  # the first token of a document is untrained in these rows
    for other in (*others, parts[0] + parts[1]):
        assert other.tokens == whole.tokens
        assert other.loss == pytest.approx(whole.loss, abs=1e-6)
    assert whole.perplexity == pytest.approx(np.exp(whole.loss))


def test_the_loss_equals_that_of_each_document_alone(model, folder):
    dataset = PackedDataset(folder, "validation")
    nll = 0.0
    for packed in packed_rows(9, seed=len("validation")):
        start = 0
        for size in packed["lengths"]:
            ids = torch.tensor([packed["input_ids"][start : start + size]])
            labels = torch.tensor([packed["labels"][start : start + size]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            for position, label in enumerate(labels[0, 1:].tolist()):
                nll -= float(logits[position, label]) if label != -100 else 0.0
            start += size

    assert evaluate_loss(model, dataset, 4, "cpu").nll == pytest.approx(nll, rel=1e-5)


def test_evaluation_leaves_the_model_in_the_mode_it_was_in(model, folder):
    model.train()
    evaluate_loss(model, PackedDataset(folder, "validation"), 4, "cpu", rows=[0])
    assert model.training


def test_rows_without_a_trained_token_have_no_loss():
    with pytest.raises(TrainingError, match="no trained token"):
        _ = EvalLoss(0.0, 0).loss
