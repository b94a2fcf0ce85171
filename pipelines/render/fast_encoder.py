"""Byte-level BPE at memory speed: numpy splits text into pieces, a cache knows most pieces' ids.

Gives the ids of a Hugging Face tokenizer called with `split_special_tokens=True`. Only the split
is our own, and only for tokenizers whose split is GPT-2's pattern, with or without single digits
before it; a piece that is not in the cache is encoded by the tokenizer's own model, and what class
a character belongs to is asked of its own pre-tokenizer. Every other tokenizer is refused, and
whoever uses this proves it on a sample of the corpus first (`encode.open_encoder`).

This module can be deleted: `encode` then uses `Tokenizer.encode_batch_fast`.
Source of the pattern: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

Array = np.ndarray[Any, np.dtype[Any]]

SPACE, LETTER, OTHER, NUMBER, UNKNOWN = range(5)
# Bytes split at once: the arrays stay in the processor's cache.
CHUNK = 1 << 18
PADDING = 16
# A table twice as large as the pieces it may hold; both are emptied together when it is full.
SLOTS = 1 << 19
MOST_PIECES = SLOTS // 2
SHIFT = np.uint64(64 - 19)
MOST_OTHERS = 1 << 20
COUNT_SHIFT = 40
LOW = (1 << COUNT_SHIFT) - 1
MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
# The first n bytes of a little-endian word.
MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)
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


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


class FastEncoder:
    """Encodes spans of UTF-8; keeps a bounded cache, so one thread at a time may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that `find_problem` has nothing against."""
        self._digits_apart = bool(_digits_apart(tokenizer))
        self._split = tokenizer.pre_tokenizer.pre_tokenize_str
        self._classes = np.full(0x110000, UNKNOWN, dtype=np.uint8)
        self._classify(np.arange(128))
        self._byte_classes = np.full(256, UNKNOWN, dtype=np.uint8)
        self._byte_classes[:128] = self._classes[:128]
        self._cache = _PieceCache(tokenizer)

    def encode_spans(self, data: Array, offsets: Array) -> tuple[Array, Array]:
        """Encode each span data[offsets[i]:offsets[i + 1]] by itself.

        `data` is uint8 [n], valid UTF-8; returns all ids, int32, and the number of ids of each
        span, int64. Raises UnprovenText where the pattern's classes do not cover a character.
        """
        ids, counts = [np.empty(0, np.int32)], np.zeros(len(offsets) - 1, np.int64)
        for first, stop in _chunks(offsets):
            start = int(offsets[first])
            found, per_span = self._encode(
                data[start : int(offsets[stop])], offsets[first:stop] - start
            )
            ids.append(found)
            counts[first:stop] = per_span
        return np.concatenate(ids), counts

    def _encode(self, data: Array, spans: Array) -> tuple[Array, Array]:
        """Return the ids of one chunk and their number in each span that begins in it."""
        size = len(data)
        if not size:
            return np.empty(0, np.int32), np.zeros(len(spans), np.int64)
        padded = np.zeros(size + PADDING, np.uint8)
        padded[:size] = data
        starts = self._find_starts(padded, size, spans[spans < size])
        values = self._cache.look_up(padded, starts, size)
        sizes = (values >> np.uint64(COUNT_SHIFT)).astype(np.int64)
        ends = np.cumsum(sizes)
        ids = np.empty(int(ends[-1]), np.int32)
        low = (values & np.uint64(LOW)).astype(np.int64)
        ids[ends - sizes] = low
        several = np.flatnonzero(sizes > 1)
        many = sizes[several]
        within = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
        places = np.repeat(ends[several] - many, many) + within
        ids[places] = self._cache.pool[np.repeat(low[several], many) + within]
        before = np.concatenate([[0], ends])[np.searchsorted(starts, spans)]
        return ids, np.diff(before, append=ends[-1])

    # The split.

    def _find_starts(self, padded: Array, size: int, spans: Array) -> Array:
        """Return where the pieces of a chunk begin, by GPT-2's pattern within each span."""
        data = padded[:size]
        classes = self._byte_classes[data]
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


def _chunks(offsets: Array) -> Iterator[tuple[int, int]]:
    """Yield ranges of spans of about CHUNK bytes; a longer span is a chunk of its own."""
    first, last = 0, len(offsets) - 1
    while first < last:
        stop = int(np.searchsorted(offsets, offsets[first] + CHUNK, side="right")) - 1
        stop = min(max(stop, first + 1), last)
        yield first, stop
        first = stop


class _PieceCache:
    """The ids of the pieces met so far, in bounded memory.

    Pieces of at most 16 bytes without a NUL are two words, which an open hash table compares whole;
    others are in a dictionary. A value is the number of ids << 40, or'ed with the one id or with
    where the ids begin in `pool`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model
        self._characters = np.array([ord(c) for c in _byte_characters()], dtype="<u4")
        self._clear()

    def _clear(self) -> None:
        self._table = np.zeros((SLOTS, 4), np.uint64)  # two words, value, nothing
        self._num_pieces = 0
        self._others: dict[bytes, int] = {}
        self.pool = np.empty(1 << 16, np.int32)
        self._pooled = 0

    def look_up(self, padded: Array, starts: Array, size: int) -> Array:
        """Return the value of each piece of a chunk; they hold until the next call."""
        if self._num_pieces >= MOST_PIECES or max(len(self._others), self._pooled) > MOST_OTHERS:
            self._clear()
        lengths = np.diff(starts, append=size)
        words = np.ndarray((size + PADDING - 7,), "<u8", padded, strides=(1,))
        keys = np.zeros((2, len(starts)), np.uint64)
        keys[0] = words[starts] & MASKS[np.minimum(lengths, 8)]
        over = np.flatnonzero(lengths > 8)
        keys[1, over] = words[starts[over] + 8] & MASKS[np.minimum(lengths[over] - 8, 8)]
        values, _ = self._probe(keys)
        other = lengths > 16
        if not padded[:size].all():
            nuls = np.concatenate([[0], np.cumsum(padded[:size] == 0)])
            other |= nuls[starts + lengths] > nuls[starts]
        values[other] = 0
        missing = np.flatnonzero(values == 0)
        if len(missing):
            self._fill(padded.tobytes(), starts, lengths, keys, values, missing, other)
        return values

    def _probe(self, keys: Array) -> tuple[Array, Array]:
        """Return each key's value and slot; the value is 0, the slot a free one, if it is new."""
        slots = ((keys[0] ^ keys[1] * MULTIPLIERS[1]) * MULTIPLIERS[0] >> SHIFT).astype(np.int64)
        rows = self._table.take(slots, axis=0)
        values: Array = rows[:, 2].copy()
        differs = (rows[:, 0] != keys[0]) | (rows[:, 1] != keys[1])
        wrong = np.flatnonzero(differs & (values != 0))
        while len(wrong):
            slots[wrong] = (slots[wrong] + 1) & (SLOTS - 1)
            rows = self._table.take(slots[wrong], axis=0)
            values[wrong] = rows[:, 2]
            differs = (rows[:, 0] != keys[0, wrong]) | (rows[:, 1] != keys[1, wrong])
            wrong = wrong[differs & (rows[:, 2] != 0)]
        return values, slots

    def _fill(
        self,
        raw: bytes,
        starts: Array,
        lengths: Array,
        keys: Array,
        values: Array,
        missing: Array,
        other: Array,
    ) -> None:
        """Put the values of the missing pieces into `values`, encoding those that are new."""
        begin, length = starts[missing].tolist(), lengths[missing].tolist()
        pieces = [raw[at : at + size] for at, size in zip(begin, length, strict=True)]
        new: dict[bytes, int] = {}
        for number, piece in enumerate(pieces):
            if piece not in self._others:
                new.setdefault(piece, number)
        found = dict(zip(new, self._encode(list(new)), strict=True))
        values[missing] = [found[p] if p in found else self._others[p] for p in pieces]
        firsts = missing[np.fromiter(new.values(), np.int64, len(new))]
        room = MOST_PIECES - self._num_pieces
        short = firsts[~other[firsts]][:room]
        self._insert(keys[:, short], values[short])
        # What the table does not take stays known for the rest of the chunk.
        rest = np.setdiff1d(firsts, short, assume_unique=True)
        for at in rest.tolist():
            self._others[raw[starts[at] : starts[at] + lengths[at]]] = int(values[at])

    def _insert(self, keys: Array, values: Array) -> None:
        """Give every new key a slot of its own."""
        self._num_pieces += len(values)
        todo = np.arange(len(values))
        while len(todo):
            _, slots = self._probe(keys[:, todo])
            # Of keys that meet in a slot the last one stays, and the others look for the next.
            self._table[slots, 3] = todo
            won = self._table[slots, 3] == todo
            self._table[slots[won], 0] = keys[0, todo[won]]
            self._table[slots[won], 1] = keys[1, todo[won]]
            self._table[slots[won], 2] = values[todo[won]]
            todo = todo[~won]

    def _encode(self, pieces: list[bytes]) -> list[int]:
        """Encode pieces with the tokenizer's own model; return their values."""
        points = self._characters[np.frombuffer(b"".join(pieces), np.uint8)]
        text = points.tobytes().decode("utf-32-le")
        values, at = [], 0
        pool: list[int] = []
        for piece in pieces:
            ids = [token.id for token in self._model.tokenize(text[at : at + len(piece)])]
            at += len(piece)
            values.append(
                len(ids) << COUNT_SHIFT | (ids[0] if len(ids) == 1 else self._pooled + len(pool))
            )
            if len(ids) > 1:
                pool += ids
        self._keep(pool)
        return values

    def _keep(self, ids: list[int]) -> None:
        stop = self._pooled + len(ids)
        if stop > len(self.pool):
            wider = np.empty(2 * stop, np.int32)
            wider[: self._pooled] = self.pool[: self._pooled]
            self.pool = wider
        self.pool[self._pooled : stop] = ids
        self._pooled = stop
