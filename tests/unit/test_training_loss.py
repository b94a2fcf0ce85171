"""Evaluation: by token, by source, in bits per byte, whatever the batch size and the layout."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pipelines.store import Store
from pipelines.training.attention import use_attention
from pipelines.training.collate import PackedDataset
from pipelines.training.head_loss import HeadLoss
from pipelines.training.loss import EvalLoss, Scorer, as_numbers, from_numbers, total
from pipelines.training.models import build_model, load_tokenizer
from pipelines.training.packed_trainer import HeldOut
from pipelines.training.token_bytes import count_token_bytes
from tests.assets.training_runs import build_stages, make_recipe, packed_rows, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    return store.path(build_stages(store)["pack"])


class Sourced:
    """A packed dataset whose documents come from two sources in turn."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, row):
        return self._dataset[row]

    def sources(self, row):
        return [("oasst", "stack")[(row + i) % 2] for i in range(len(self._dataset[row].lengths))]


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
@pytest.mark.parametrize("head_loss", ["auto", "dense"])
def test_every_batch_size_has_the_same_loss_of_each_source(
    tokenizer_dir, folder, attention, head_loss
):
    model = build_model(make_recipe(), tokenizer_dir)
    use_attention(model, attention)
    sizes = count_token_bytes(load_tokenizer(tokenizer_dir))
    dataset = Sourced(PackedDataset(folder, "validation"))
    head = HeadLoss(model, head_loss)

    found = {
        size: Scorer(head, size, "cpu", sizes)(model, dataset, range(len(dataset)))
        for size in (1, 2, 4, 8)
    }

    expected = {"oasst": [0.0, 0, 0], "stack": [0.0, 0, 0]}  # each document by itself
    plain = build_model(make_recipe(), tokenizer_dir).eval()
    for number, packed in enumerate(packed_rows(9, seed=len("validation"))):
        start = 0
        for size, source in zip(packed["lengths"], dataset.sources(number), strict=True):
            ids = torch.tensor(packed["input_ids"][start : start + size])
            with torch.no_grad():
                logs = plain(ids[None], use_cache=False).logits[0].log_softmax(-1)
            expected[source][0] -= float(logs[1:-1].gather(1, ids[2:, None]).sum())
            expected[source][1] += size - 2
            expected[source][2] += int(sizes[ids[2:]].sum())
            start += size
    for losses in found.values():
        assert list(losses) == ["oasst", "stack"]
        for source, (nll, tokens, size) in expected.items():
            assert losses[source].loss == pytest.approx(nll / tokens, abs=1e-5)
            assert (losses[source].tokens, losses[source].bytes) == (tokens, size)
            assert losses[source].bits_per_byte == pytest.approx(nll / size / math.log(2), abs=1e-5)


def test_control_tokens_are_no_text():
    loss = EvalLoss(10.0, 4, 6.0, 3) + EvalLoss(2.0, 2)

    assert loss == EvalLoss(12.0, 6, 6.0, 3)
    assert loss.report() == {
        "loss": 2.0,
        "tokens": 6,
        "perplexity": math.exp(2),
        "bits_per_byte": 2 / math.log(2),
    }
    assert EvalLoss(4000.0, 2).report() == {
        "loss": 2000.0, "tokens": 2, "perplexity": None, "bits_per_byte": None,
    }  # fmt: skip


def test_losses_travel_between_ranks_as_numbers():
    losses = {"a": EvalLoss(1.5, 2, 1.0, 7), "b": EvalLoss(0.5, 1)}
    doubled = [2 * number for number in as_numbers(losses)]

    assert from_numbers(["a", "b"], doubled) == {k: v + v for k, v in losses.items()}
    assert total(losses.values()) == EvalLoss(2.0, 3, 1.0, 7)


TEXTS = ["def f(x):\n\treturn x  # naïve", "  æøå 你好 🙂\u2028end", "", "a<fim_pad>b"]


def test_the_bytes_of_tokens_add_up_to_the_text_in_byte_level_tokenizers(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    sizes = count_token_bytes(tokenizer)

    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert sizes[ids].sum() == len(text.encode())
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<fim_middle>"])
    assert sizes[special].tolist() == [0, 0]


def test_the_bytes_of_tokens_add_up_to_the_text_in_sentencepiece_tokenizers():
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "d", "e", "f", "å"]
    inner = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    sizes = count_token_bytes(tokenizer)

    for text in TEXTS:
        assert sizes[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_twins_of_permuted_code_are_found_by_their_splits(tokenizer_dir, monkeypatch, folder):
    monkeypatch.setattr(
        "pipelines.training.packed_trainer.splits_of",
        lambda _: {"train", "validation", "validation.psm", "validation.none", "validation.spm"},
    )
    opened = []
    monkeypatch.setattr(
        "pipelines.training.packed_trainer.PackedDataset",
        lambda folder, split, *, rehash: opened.append((split, rehash)) or split,
    )

    held_out = HeldOut.of(folder, load_tokenizer(tokenizer_dir), rehash=False)

    assert held_out.twins == {o: f"validation.{o}" for o in ("none", "psm", "spm")}
    assert opened == [(split, False) for split in held_out.twins.values()]
    assert np.count_nonzero(held_out.token_bytes) == 295  # all but the five control tokens
