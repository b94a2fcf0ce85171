"""The fast encoder's ids are the tokenizer's, and it knows for which tokenizers."""

import logging
import random
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipelines.render import fast_encoder, piece_cache
from pipelines.render.encode import load_tokenizer
from pipelines.render.fast_encoder import FastEncoder, find_problem
from pipelines.render.text_encoder import BatchEncoder, choose_fast, join_texts, open_encoder
from pipelines.render.vocabulary import STARCODER_TOKENS
from tests.assets.real_texts import corpus_texts
from tests.assets.rendering import CORPUS, small_tokenizer

# What the pattern tells apart: blanks of every width, digits of every script, quotes, controls.
FRAGMENTS = (
    *STARCODER_TOKENS, "'s", "'re", "'ll", "'", "''", "'S", "'d", "'ve", "s", "t", " ", "  ", "\n",
    "\t", "\r\n", "\0", "5", "12", "\u00b2", "\u00bd", "\u2167", "\u0663", "\U0001d7d8", "a", "Ab",
    "foo", "\u00e9", "\u65e5\u672c", "\U0001f600", "\u00a0", "\u3000", "\u2028", "\u0085", "\u1680",
    "\u200b", "\x1c", "\x7f", "\ufeff", "_", "!", "...", "\u0301", "\u00df", "\U00010330",
    "x" * 40, " " * 33, "\n" + " " * 15, "\n" + " " * 16,
)  # fmt: skip
RANGES = ((0, 0x80), (0, 0x800), (0, 0xD800), (0xE000, 0x110000))


def fuzzed_texts(number):
    dice = random.Random(7)
    mixed = ["".join(dice.choices(FRAGMENTS, k=dice.randrange(14))) for _ in range(number // 2)]
    wild = [
        "".join(chr(dice.randrange(*dice.choice(RANGES))) for _ in range(dice.randrange(20)))
        for _ in range(number - number // 2)
    ]
    return mixed + wild


def gpt2_tokenizer():
    """Return a tokenizer without single digits, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same(tokenizer, texts, encoder=None):
    data, offsets = join_texts(texts)
    ids, counts = (encoder or FastEncoder(tokenizer)).encode_spans(data, offsets)
    expected, expected_counts = BatchEncoder(tokenizer).encode_spans(data, offsets)
    assert counts.tolist() == expected_counts.tolist()
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("make", [small_tokenizer, gpt2_tokenizer])
def test_ids_of_ten_thousand_fuzzed_strings_are_the_tokenizers(make):
    assert find_problem(make()) is None
    assert_same(make(), fuzzed_texts(10_000))


@pytest.mark.parametrize("name", ["starcoder", "starcoder2"])
def test_ids_of_ten_thousand_fuzzed_strings_are_starcoders(real_data, name):
    assert_same(
        load_tokenizer(real_data / "starcoder_tokenizer" / name), [*fuzzed_texts(10_000), *CORPUS]
    )


@pytest.mark.parametrize(("name", "step"), [("starcoder", 1), ("starcoder2", 20)])
def test_ids_of_all_real_data_are_the_tokenizers(real_data, name, step):
    tokenizer = load_tokenizer(real_data / "starcoder_tokenizer" / name)
    texts = list(corpus_texts(real_data))

    assert sum(map(len, texts)) > 10_000_000
    assert_same(tokenizer, texts[::step])


def test_ids_do_not_depend_on_chunks_or_on_what_is_cached(monkeypatch):
    texts = [*fuzzed_texts(500), *CORPUS, "", "caf\u00e9 " * 300, ""]
    monkeypatch.setattr(fast_encoder, "CHUNK", 64)
    monkeypatch.setattr(fast_encoder, "GROUP", 2000)
    monkeypatch.setattr(piece_cache, "MOST_PIECES", 50)
    monkeypatch.setattr(piece_cache, "MOST_OTHERS", 20)
    monkeypatch.setattr(piece_cache, "FEW_PIECES", 8)

    encoder = FastEncoder(small_tokenizer())

    assert_same(small_tokenizer(), texts, encoder)
    assert_same(small_tokenizer(), texts, encoder)


def test_pieces_that_meet_in_a_slot_of_the_table_are_told_apart(monkeypatch):
    monkeypatch.setattr(piece_cache, "MULTIPLIERS", (np.uint64(1), np.uint64(0)))

    assert_same(small_tokenizer(), [CORPUS[0][:3000], *fuzzed_texts(40)])


def test_nothing_gives_nothing():
    encoder = FastEncoder(small_tokenizer())

    for texts in ([], [""], ["", "x", ""]):
        assert_same(small_tokenizer(), texts, encoder)


def changed(change):
    tokenizer = Tokenizer.from_str(gpt2_tokenizer().to_str())
    change(tokenizer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def set_split(pre_tokenizer):
    return lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizer)


REFUSED = {
    "it splits text by another pattern than GPT-2's": [
        set_split(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        set_split(pre_tokenizers.Whitespace()),
        set_split(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]
            )
        ),
    ],
    "it normalizes text (NFC)": [lambda t: setattr(t, "normalizer", normalizers.NFC())],
    "it has added tokens that are not special, which text can produce": [
        lambda t: t.add_tokens(["<turn>"])
    ],
    "its model is WordPiece, not plain byte-level BPE": [
        lambda t: setattr(t, "model", models.WordPiece({"[UNK]": 0}))
    ],
}


@pytest.mark.parametrize(
    ("problem", "change"), [(p, c) for p, changes in REFUSED.items() for c in changes]
)
def test_other_tokenizers_are_refused_with_the_reason(problem, change, caplog):
    tokenizer = changed(change)

    with caplog.at_level(logging.WARNING):
        assert not choose_fast(tokenizer, ["text"])

    assert find_problem(tokenizer) == problem
    assert caplog.messages == [
        f"the fast encoder is not used ({problem}); encode_batch_fast is, more slowly"
    ]


def test_a_tokenizer_that_does_not_agree_on_the_corpus_is_refused(monkeypatch, caplog):
    find_starts = FastEncoder._find_starts

    def find_starts_wrongly(self, padded, size, spans):
        starts = find_starts(self, padded, size, spans)
        return np.arange(size) if ord("!") in padded else starts

    monkeypatch.setattr(FastEncoder, "_find_starts", find_starts_wrongly)

    assert choose_fast(small_tokenizer(), ["return"])
    assert not choose_fast(small_tokenizer(), ["return", "return!"])
    assert "it gave other ids than the tokenizer on a sample of this corpus" in caplog.text


def test_without_the_module_everything_goes_to_the_tokenizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "pipelines.render.fast_encoder", None)

    assert not choose_fast(small_tokenizer(), ["text"])


def test_a_character_of_no_class_is_encoded_by_the_tokenizer(monkeypatch):
    tokenizer = small_tokenizer()
    encoder = open_encoder(tokenizer, fast=True)
    monkeypatch.setattr(FastEncoder, "_is_number", lambda self, character: False)

    assert_same(tokenizer, ["x = \u0663", "y"], encoder)
    with pytest.raises(fast_encoder.UnprovenText, match=r"U\+0030 is of no class"):
        FastEncoder(tokenizer)
