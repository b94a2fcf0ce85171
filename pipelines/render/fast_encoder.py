"""Byte-level BPE at memory speed: numpy splits text into pieces, a cache knows most pieces' ids.

Gives the ids of a Hugging Face tokenizer called with `split_special_tokens=True`. The split is
our own, for tokenizers whose split is GPT-2's pattern, with or without single digits before it, and
so are the merges of pieces that are not in the cache, many at once; what class a character belongs
to is asked of the tokenizer's own pre-tokenizer, and long pieces are encoded by its own model.
Every other tokenizer is refused, and whoever uses this proves it on a sample of the corpus first
(`encode.open_encoder`).

This module can be deleted: `encode` then uses `Tokenizer.encode_batch_fast`.
Source of the pattern: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from pipelines.render.piece_cache import PADDING, PieceCache

Array = np.ndarray[Any, np.dtype[Any]]

SPACE, LETTER, OTHER, NUMBER, UNKNOWN = range(5)
# Bytes split at once, so that the arrays stay in the processor's cache, and bytes after which what
# is new is encoded, all at once.
CHUNK, GROUP = 1 << 17, 1 << 23
CONTRACTIONS = {b"s": 1, b"t": 1, b"m": 1, b"d": 1, b"re": 2, b"ve": 2, b"ll": 2}


class UnprovenText(Exception):
    """A character that no class of the pattern describes."""


def find_problem(tokenizer: Tokenizer) -> str | None:
    """Return why this tokenizer's split is not the one written here, or None."""
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        return f"its model is {type(model).__name__}, not plain byte-level BPE"
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return "its model is a BPE with dropout or affixes, not plain byte-level BPE"
    if tokenizer.normalizer is not None:
        return f"it normalizes text ({type(tokenizer.normalizer).__name__})"
    if not all(token.special for token in tokenizer.get_added_tokens_decoder().values()):
        return "it has added tokens that are not special, which text can produce"
    if _digits_apart(tokenizer) is None:
        return "it splits text by another pattern than GPT-2's"
    return None


def _digits_apart(tokenizer: Tokenizer) -> bool | None:
    """Return whether digits are split off one by one; None for any other pre-tokenizer."""
    if tokenizer.pre_tokenizer is None:
        return None
    spec = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = spec["pretokenizers"] if spec.get("type") == "Sequence" else [spec]
    names = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if names[-1:] != ["ByteLevel"] or last.get("add_prefix_space") or not last.get("use_regex"):
        return None
    if names == ["ByteLevel"]:
        return False
    if names == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return True
    return None


class FastEncoder:
    """Encodes spans of UTF-8; keeps a bounded cache, so one thread at a time may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that `find_problem` has nothing against."""
        self._digits_apart = bool(_digits_apart(tokenizer))
        self._split = tokenizer.pre_tokenizer.pre_tokenize_str
        self._classes = np.full(0x110000, UNKNOWN, dtype=np.uint8)
        self._classify(np.arange(128))
        self._byte_classes = self._classes[:256].tobytes()
        self._cache = PieceCache(tokenizer)

    def encode_spans(self, data: Array, offsets: Array) -> tuple[Array, Array]:
        """Encode each span data[offsets[i]:offsets[i + 1]] by itself.

        `data` is uint8 [n], valid UTF-8; returns all ids, int32, and the number of ids of each
        span, int64. Raises UnprovenText where the pattern's classes do not cover a character.
        """
        ids, counts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for start, stop in _ranges(offsets, GROUP):
            self._cache.make_room()
            group = offsets[start : stop + 1]
            found = [self._look_up(data, group[i : j + 1]) for i, j in _ranges(group, CHUNK)]
            self._cache.settle()
            for values, spans in found:
                chunk = self._cache.expand(values, spans)
                ids.append(chunk[0])
                counts.append(chunk[1])
        return np.concatenate(ids), np.concatenate(counts)

    def _look_up(self, data: Array, offsets: Array) -> tuple[Array, Array]:
        """Return the values of the pieces of a chunk, and which piece each span begins with."""
        spans = offsets[:-1] - offsets[0]
        size = int(offsets[-1] - offsets[0])
        if not size:
            return np.empty(0, np.int64), np.zeros(len(spans), np.int64)
        padded = np.zeros(size + PADDING, np.uint8)
        padded[:size] = data[int(offsets[0]) : int(offsets[-1])]
        starts = self._find_starts(padded, size, spans[spans < size])
        return self._cache.look_up(padded, starts, size), np.searchsorted(starts, spans)

    # The split.
    def _find_starts(self, padded: Array, size: int, spans: Array) -> Array:
        """Return where the pieces of a chunk begin, by GPT-2's pattern within each span."""
        data = padded[:size]
        classes = np.frombuffer(bytearray(data).translate(self._byte_classes), np.uint8)
        wide = bool((data >= 0x80).any())
        if wide:
            self._class_wide(padded, size, classes)
        begins = np.zeros(size + PADDING, bool)
        begins[spans] = True
        starts = np.empty(size, bool)
        starts[0] = True
        np.not_equal(classes[1:], classes[:-1], out=starts[1:])
        if self._digits_apart:
            starts |= (classes == NUMBER) & ((data & 0xC0) != 0x80 if wide else True)
        starts |= begins[:size]
        # The last blank before a word stands alone, or with the word if it is U+0020.
        blank = classes == SPACE
        last = blank[:-1] & ~blank[1:] & ~begins[1:size]
        if self._digits_apart:
            last &= classes[1:] != NUMBER
        starts[1:] &= ~(last & (data[:-1] == 0x20))
        if wide:
            at = np.flatnonzero(last & (data[:-1] >= 0x80))
            last[at] = False
            for _ in range(3):
                at = np.where((data[at] & 0xC0) == 0x80, at - 1, at)
            starts[at] = True
        starts[:-1] |= last
        self._split_contractions(padded, size, starts, begins)
        return np.flatnonzero(starts)

    def _split_contractions(self, padded: Array, size: int, starts: Array, begins: Array) -> None:
        quotes = np.flatnonzero((padded[:size] == 0x27) & starts)
        first, second = padded[quotes + 1], padded[quotes + 2]
        for letters, length in CONTRACTIONS.items():
            fits = (first == letters[0]) & ~begins[quotes + 1]
            if length == 2:
                fits &= (second == letters[1]) & ~begins[quotes + 2]
            found = quotes[fits]
            starts[found + 1] = False
            after = found + 1 + length
            starts[after[after < size]] = True

    def _class_wide(self, padded: Array, size: int, classes: Array) -> None:
        """Give every byte of a character beyond ASCII the character's class."""
        leads = np.flatnonzero(padded[:size] >= 0xC0)
        first, *rest = (padded[leads + i].astype(np.int64) for i in range(4))
        second, third, fourth = (byte & 0x3F for byte in rest)
        points = np.where(first < 0xE0, (first & 0x1F) << 6 | second, 0)
        three = (first >= 0xE0) & (first < 0xF0)
        points = np.where(three, (first & 0x0F) << 12 | second << 6 | third, points)
        four = first >= 0xF0
        points = np.where(four, (first & 0x07) << 18 | second << 12 | third << 6 | fourth, points)
        found = self._classes[points]
        if (found == UNKNOWN).any():
            self._classify(np.unique(points[found == UNKNOWN]))
            found = self._classes[points]
        classes[leads] = found
        classes[leads + 1] = found
        classes[leads[first >= 0xE0] + 2] = found[first >= 0xE0]
        classes[leads[four] + 3] = found[four]

    def _classify(self, points: Array) -> None:
        """Ask the tokenizer's own pre-tokenizer for the class of each code point."""
        for point in points.tolist():
            character = chr(point)
            joins = tuple(len(self._split(f"{other}{character}")) == 1 for other in "\ta!")
            if sum(joins) > 1 or (not any(joins) and not self._is_number(character)):
                raise UnprovenText(f"U+{point:04X} is of no class of the pattern")
            self._classes[point] = joins.index(True) if any(joins) else NUMBER

    def _is_number(self, character: str) -> bool:
        parts = 2 if self._digits_apart else 1
        return all(len(self._split(f"{other}{character}")) == parts for other in f"1 {character}")


def _ranges(offsets: Array, size: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of spans of about `size` bytes; a longer span is a range of its own."""
    first, last = 0, len(offsets) - 1
    while first < last:
        stop = int(np.searchsorted(offsets, offsets[first] + size, side="right")) - 1
        stop = min(max(stop, first + 1), last)
        yield first, stop
        first = stop
