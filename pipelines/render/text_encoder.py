"""Many texts to token ids at once, from one buffer of UTF-8 into one array of ids.

Two encoders give the same ids: the tokenizer's own, and the fast one, which is used only where it
was shown to agree with the tokenizer on a sample of the very corpus (`choose_fast`).
"""

import logging
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

# What is encoded twice before a stage begins: rows of some shards, up to so many characters.
SAMPLED_SHARDS, SAMPLED_ROWS = 8, 64
SAMPLE_CHARACTERS = 300_000
LONGEST_SAMPLE = 20_000


class TextEncoder(Protocol):
    """Encodes texts as content: no control token, whatever they say."""

    def encode_spans(self, data: Array, offsets: Array) -> tuple[Array, Array]:
        """Encode data[offsets[i]:offsets[i + 1]], UTF-8 in uint8, each by itself.

        Returns all ids, int32, and the number of ids of each span, int64.
        """


class BatchEncoder:
    """The tokenizer's own `encode_batch_fast`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer loaded with `load_tokenizer`."""
        assert tokenizer.encode_special_tokens, "load the tokenizer with load_tokenizer"
        self._tokenizer = tokenizer

    def encode_spans(self, data: Array, offsets: Array) -> tuple[Array, Array]:
        """Encode each span; see TextEncoder."""
        raw = data.tobytes()
        ends = offsets.tolist()
        texts = [raw[i:j].decode() for i, j in pairwise(ends)]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts = [np.array(encoding.ids, np.int32) for encoding in encodings]
        counts = np.array([len(part) for part in parts], np.int64)
        return np.concatenate([np.empty(0, np.int32), *parts]), counts


class _ProvenEncoder:
    """The fast encoder; what holds a character it does not know goes to the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from pipelines.render.fast_encoder import FastEncoder, UnprovenText

        self._fast, self._exact = FastEncoder(tokenizer), BatchEncoder(tokenizer)
        self._unproven = UnprovenText

    def encode_spans(self, data: Array, offsets: Array) -> tuple[Array, Array]:
        try:
            return self._fast.encode_spans(data, offsets)
        except self._unproven:
            return self._exact.encode_spans(data, offsets)


def open_encoder(tokenizer: Tokenizer, *, fast: bool) -> TextEncoder:
    """Return an encoder; `fast` only for a tokenizer that `choose_fast` has proven."""
    try:
        return _ProvenEncoder(tokenizer) if fast else BatchEncoder(tokenizer)
    except ModuleNotFoundError:
        return BatchEncoder(tokenizer)


def join_texts(texts: Iterable[str]) -> tuple[Array, Array]:
    """Return the texts as one buffer of UTF-8 and the offsets at which each begins and ends."""
    parts = [text.encode() for text in texts]
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    return np.frombuffer(b"".join(parts), np.uint8), np.concatenate([[0], np.cumsum(sizes)])


def choose_fast(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    open_fast: Callable[[], TextEncoder] | None = None,
) -> bool:
    """Say whether the fast encoder may be used, which both encoding a sample alike decides.

    A line in the log names the reason where it may not.
    """
    try:
        from pipelines.render.fast_encoder import find_problem
    except ModuleNotFoundError:
        return False
    problem = find_problem(tokenizer)
    if problem is None:
        sample, left = [], SAMPLE_CHARACTERS
        for text in texts:
            sample.append(text[: min(left, LONGEST_SAMPLE)])
            left -= len(sample[-1])
            if left <= 0:
                break
        data, offsets = join_texts(sample)
        encoder = open_fast() if open_fast else open_encoder(tokenizer, fast=True)
        fast = encoder.encode_spans(data, offsets)
        exact = BatchEncoder(tokenizer).encode_spans(data, offsets)
        if all(np.array_equal(*pair) for pair in zip(fast, exact, strict=True)):
            return True
        problem = "it gave other ids than the tokenizer on a sample of this corpus"
    logger.warning("the fast encoder is not used (%s); encode_batch_fast is, more slowly", problem)
    return False
