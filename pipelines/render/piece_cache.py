"""The ids of pieces, from a table in bounded memory; what is new is encoded many pieces at once.

Part of the fast encoder: `look_up` for some chunks of text, then `settle`, then `expand` each.
"""

import functools
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]

# Pieces are keys of 1, 2 or 4 words of 7 bytes, in a table for each; longer ones are few.
WORDS = (1, 2, 4)
BYTES = 7
# How many bytes are read behind the text.
PADDING = 32
SLOT_BITS = 19
# A table twice as large as the pieces it may hold; all are emptied together when one is full.
MOST_PIECES = 1 << SLOT_BITS - 1
MOST_OTHERS = 1 << 20
# Fewer new pieces than this are encoded one by one.
FEW_PIECES = 64
# A value is one id with ONE set, or the number of ids + 1 in the upper bits, or'ed with where they
# begin in the pool. LONGER is that of all longer pieces among those of one word.
ONE = 1 << 39
COUNT_SHIFT = 40
LOW = (1 << COUNT_SHIFT) - 1
LONGER = 1
NO_RANK = 1 << 62
MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
# By how much a word is shifted to keep its first n bytes; none of a longer piece.
SHIFTS = np.array([64 - 8 * n for n in range(BYTES + 1)] + [64], dtype=np.uint64)


class PieceCache:
    """The ids of the pieces met so far; one thread at a time may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that `fast_encoder.find_problem` has nothing against."""
        self._model = tokenizer.model
        self._characters = np.array([ord(c) for c in byte_characters()], dtype="<u4")
        self._clear()

    def _clear(self) -> None:
        self._tables = [_Table(words, SLOT_BITS) for words in WORDS]
        self._tables[0].add([np.array([BYTES + 1], np.uint64)])
        self._tables[0].settle(np.array([LONGER]))
        self._others: dict[bytes, int] = {}
        self._pool, self._pooled = np.empty(1 << 16, np.int32), 0
        self._forget_new()

    def _forget_new(self) -> None:
        # For each table the values that wait for pieces of it, where, and the keys of these.
        self._waiting: list[list[tuple[Array, Array, list[Array]]]] = [[] for _ in WORDS]
        self._longer: list[tuple[Array, Array, list[bytes]]] = []

    def look_up(self, padded: Array, starts: Array, size: int) -> Array:
        """Return the values of the pieces of a chunk, which hold once `settle` has been called."""
        lengths = np.empty(len(starts), np.int64)
        np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
        lengths[-1] = size - starts[-1]
        words = np.ndarray((size + PADDING - 7,), "<u8", padded, strides=(1,)).copy()
        values = np.empty(len(starts), np.int64)
        self._find(0, values, slice(None), words, starts, np.minimum(lengths, BYTES + 1))
        longer = np.flatnonzero(lengths > BYTES)
        for number, num_words in enumerate(WORDS[1:], 1):
            fits = lengths[longer] <= BYTES * num_words
            at, longer = longer[fits], longer[~fits]
            self._find(number, values, at, words, starts[at], lengths[at])
        if len(longer):
            raw, begins = padded.tobytes(), starts[longer]
            spans = zip(begins.tolist(), (begins + lengths[longer]).tolist(), strict=True)
            self._longer.append((values, longer, [raw[i:j] for i, j in spans]))
        return values

    def _find(
        self, number: int, values: Array, at: Any, words: Array, starts: Array, lengths: Array
    ) -> None:
        """Set values[at] of the pieces that a table knows; the others wait."""
        keys = _make_keys(words, starts, lengths, WORDS[number])
        found, _ = self._tables[number].find(keys)
        values[at] = found
        new = np.flatnonzero(found == 0)
        if len(new):
            places = new if isinstance(at, slice) else at[new]
            self._waiting[number].append((values, places, [key[new] for key in keys]))

    def make_room(self) -> None:
        """Forget everything where little more can be kept."""
        fullest = max(table.size for table in self._tables)
        if fullest > MOST_PIECES * 3 // 4 or max(len(self._others), self._pooled) > MOST_OTHERS:
            self._clear()

    def settle(self) -> None:
        """Encode the pieces that are new, and set the values that wait for them."""
        for table, waiting in zip(self._tables, self._waiting, strict=True):
            if waiting:
                chunks, places, parts = zip(*waiting, strict=True)
                keys = [np.concatenate(words) for words in zip(*parts, strict=True)]
                found = iter(np.split(self._add(table, keys), np.cumsum([len(p) for p in places])))
                for values, at in zip(chunks, places, strict=True):
                    values[at] = next(found)
        pieces = dict.fromkeys(piece for *_, found in self._longer for piece in found)
        new = [piece for piece in pieces if piece not in self._others]
        text = np.frombuffer(b"".join(new), np.uint8)
        encoded = self._encode_alone(text, np.array([len(piece) for piece in new], np.int64))
        self._others.update(zip(new, self._to_values(*encoded).tolist(), strict=True))
        for values, at, pieces_there in self._longer:
            values[at] = [self._others[piece] for piece in pieces_there]
        self._forget_new()

    def _add(self, table: "_Table", keys: list[Array]) -> Array:
        """Return the values of keys that the table lacked, some of which may be alike."""
        room = MOST_PIECES - table.size
        found, new = table.add([key[:room] for key in keys])
        new = np.concatenate([new, np.arange(len(found), len(keys[0]))])
        text, lengths = _read_keys([key[new] for key in keys])
        values = self._to_values(*self._encode(text, lengths))
        table.settle(values)
        return np.concatenate([values[~found], values[len(new) - len(keys[0]) + len(found) :]])

    def _to_values(self, ids: Array, counts: Array) -> Array:
        """Return the values of pieces with these ids, which the pool keeps."""
        start, stop = self._pooled, self._pooled + len(ids)
        if stop > len(self._pool):
            self._pool = np.concatenate([self._pool, np.empty(stop, np.int32)])
        self._pool[start:stop] = ids
        self._pooled = stop
        firsts = np.cumsum(counts) - counts
        alone = counts == 1
        values: Array = (counts + 1) << COUNT_SHIFT | start + firsts
        values[alone] = ids[firsts[alone]].astype(np.int64) | ONE
        return values

    def expand(self, values: Array, spans: Array) -> tuple[Array, Array]:
        """Return the ids of pieces, and how many each span has, given its first piece."""
        at = np.flatnonzero(values >= 1 << COUNT_SHIFT)
        several = values[at]
        counts = (several >> COUNT_SHIFT) - 1
        sizes = np.ones(len(values), np.int64)
        sizes[at] = counts
        ids = np.repeat(values.astype(np.int32), sizes)
        added = np.concatenate([[0], np.cumsum(counts - 1)])
        ends = np.cumsum(counts)
        within = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
        places = np.repeat(several & LOW, counts) + within
        ids[np.repeat(at + added[:-1], counts) + within] = self._pool[places]
        before = spans + added[np.searchsorted(at, spans)]
        return ids, np.diff(before, append=len(ids))

    def _encode(self, text: Array, lengths: Array) -> tuple[Array, Array]:
        """Return the ids of pieces, one after the other, and the number of each."""
        if len(lengths) < FEW_PIECES or self._merges is None:
            return self._encode_alone(text, lengths)
        symbols = self._merges.symbols[text]
        alone = np.minimum.reduceat(symbols, np.cumsum(lengths) - lengths) < 0
        is_alone = np.repeat(alone, lengths)
        together = self._merges.apply(symbols[~is_alone], lengths[~alone])
        apart = self._encode_alone(text[is_alone], lengths[alone])
        counts = np.empty(len(lengths), np.int64)
        counts[~alone], counts[alone] = together[1], apart[1]
        is_alone = np.repeat(alone, counts)
        ids = np.empty(len(is_alone), np.int32)
        ids[~is_alone], ids[is_alone] = together[0], apart[0]
        return ids, counts

    @functools.cached_property
    def _merges(self) -> "_Merges | None":
        spec = json.loads(self._model.__getstate__())
        return None if spec["ignore_merges"] else _Merges(spec["vocab"], spec["merges"])

    def _encode_alone(self, text: Array, lengths: Array) -> tuple[Array, Array]:
        """Encode pieces one by one with the tokenizer's own model."""
        characters = self._characters[text].tobytes().decode("utf-32-le")
        ids: list[int] = []
        counts, at = [], 0
        for length in lengths.tolist():
            found = self._model.tokenize(characters[at : at + length])
            ids += [token.id for token in found]
            counts.append(len(found))
            at += length
        return np.array(ids, np.int32), np.array(counts, np.int64)


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def _make_keys(words: Array, starts: Array, lengths: Array, num_words: int) -> list[Array]:
    """Return the keys of pieces: BYTES of text in each word, the length in the first."""
    keys = []
    for first in range(0, num_words * BYTES, BYTES):
        key = words.take(starts + first if first else starts)
        key <<= SHIFTS.take(np.clip(lengths - first, 0, BYTES) if num_words > 1 else lengths)
        keys.append(key)
    keys[0] |= lengths.view(np.uint64)
    return keys


def _read_keys(keys: list[Array]) -> tuple[Array, Array]:
    """Return the text of the pieces with these keys, and their lengths."""
    lengths = (keys[0] & np.uint64(0xFF)).astype(np.int64)
    held = np.clip(lengths[:, None] - np.arange(0, len(keys) * BYTES, BYTES), 0, BYTES)
    text = np.stack(keys, axis=1).astype("<u8").view(np.uint8).reshape(-1, len(keys), 8)
    return text[np.arange(8) >= 8 - held[:, :, None]], lengths


class _Table:
    """An open hash table from keys of some words, which it compares whole, to values but 0."""

    def __init__(self, num_words: int, bits: int) -> None:
        self._keys = [np.zeros(1 << bits, np.uint64) for _ in range(num_words)]
        self._values = np.zeros(1 << bits, np.int64)
        self._owners = np.empty(1 << bits, np.int64)
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._unsettled: list[Array] = []
        self.size = 0

    def find(self, keys: list[Array]) -> tuple[Array, Array]:
        """Return each key's value and slot; a new one's value is 0, and its slot a free one."""
        hashes = keys[0] * MULTIPLIERS[0]
        for key in keys[1:]:
            hashes = (hashes ^ key) * MULTIPLIERS[1]
        slots = (hashes >> self._shift).view(np.int64)
        values = self._values.take(slots)
        again = np.flatnonzero(self._differ(slots, keys))
        while len(again):
            again = again[values[again] != 0]
            slots[again] = (slots[again] + 1) & self._mask
            values[again] = self._values[slots[again]]
            again = again[self._differ(slots[again], [key[again] for key in keys])]
        return values, slots

    def _differ(self, slots: Array, keys: list[Array]) -> Array:
        differ: Array = self._keys[0].take(slots) != keys[0]
        for own, key in zip(self._keys[1:], keys[1:], strict=True):
            differ |= own.take(slots) != key
        return differ

    def add(self, keys: list[Array]) -> tuple[Array, Array]:
        """Give each key that is new a slot and the value ~number, with numbers from 0 on.

        Returns the values of all keys, and which keys are the new ones, in that order.
        """
        found, new = np.zeros(len(keys[0]), np.int64), [np.empty(0, np.int64)]
        todo, number = np.arange(len(found)), 0
        while len(todo):
            found[todo], slots = self.find([key[todo] for key in keys])
            is_new = found[todo] == 0
            todo, slots = todo[is_new], slots[is_new]
            # Of keys that meet in a slot the last one gets it; the others look again.
            self._owners[slots] = todo
            won = self._owners[slots] == todo
            slots, own, todo = slots[won], todo[won], todo[~won]
            for stored, key in zip(self._keys, keys, strict=True):
                stored[slots] = key[own]
            found[own] = self._values[slots] = ~np.arange(number, number + len(own))
            number += len(own)
            self._unsettled.append(slots)
            new.append(own)
        self.size += number
        return found, np.concatenate(new)

    def settle(self, values: Array) -> None:
        """Replace each value ~number by values[number]."""
        for slots in self._unsettled:
            self._values[slots] = values[~self._values[slots]]
        self._unsettled = []


class _Merges:
    """The merges of a byte-level BPE, applied to many pieces at once."""

    def __init__(self, vocabulary: dict[str, int], merges: list[Any]) -> None:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        # The id of each byte, -1 where the vocabulary lacks it.
        self.symbols = np.array([vocabulary.get(c, -1) for c in byte_characters()], np.int32)
        self._merged = np.array([vocabulary[left + right] for left, right in pairs], np.int32)
        tokens = (vocabulary[token] for pair in pairs for token in pair)
        ids = np.fromiter(tokens, np.int64, 2 * len(pairs)).reshape(-1, 2)
        self._table = _Table(1, (4 * len(pairs)).bit_length())
        _, order = self._table.add([_join(ids[:, 0], ids[:, 1])])
        self._table.settle(order + 1)

    def apply(self, symbols: Array, lengths: Array) -> tuple[Array, Array]:
        """Merge the pair of lowest rank, the first of these, in every piece until there is none.

        `symbols` are the ids of the bytes of all pieces, of fewer than 31 bytes each. Returns ids,
        int32, and their counts. A piece is a column here, between two rows that nothing merges
        with; `order` holds the ranks of the pairs that begin in each row, and the row.
        """
        height = int(lengths.max(initial=0)) + 2
        columns = np.arange(len(lengths))
        column = np.repeat(columns, lengths)
        row = np.arange(1, len(symbols) + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        grid: Array = np.full((height, len(lengths)), -1, np.int32)
        grid[row, column] = symbols
        order: Array = np.full(grid.shape, NO_RANK)
        order[row, column] = self._order(symbols, grid[row + 1, column], row)
        after: Array = np.repeat(np.arange(1, height + 1, dtype=np.int8)[:, None], len(lengths), 1)
        before: Array = after - np.int8(2)
        done = []
        while len(columns):
            lowest = order.min(axis=0)
            at = np.flatnonzero(lowest != NO_RANK)
            if 2 * len(at) <= len(columns):
                is_done = lowest == NO_RANK
                done.append((grid[:, is_done].T, columns[is_done]))
                grid, order, after, before = (each[:, at] for each in (grid, order, after, before))
                columns, lowest, at = columns[at], lowest[at], np.arange(len(at))
            row = lowest[at] & 31
            right, left = after[row, at], before[row, at]
            beyond = after[right, at]
            merged = grid[row, at] = self._merged[lowest[at] >> 5]
            grid[right, at], order[right, at] = -1, NO_RANK
            after[row, at], before[beyond, at] = beyond, row
            order[row, at] = self._order(merged, grid[beyond, at], row)
            order[left, at] = self._order(grid[left, at], merged, left)
        return _read_grids(done, len(lengths))

    def _order(self, left: Array, right: Array, row: Array) -> Array:
        """Return the ranks of pairs, with their rows; NO_RANK where they are not merged."""
        found, _ = self._table.find([_join(left, right)])
        return np.where(found == 0, NO_RANK, (found - 1) << 5 | row)


def _join(left: Array, right: Array) -> Array:
    """Return one word for a pair of ids; that of a pair with -1 is in no table."""
    return ((left.astype(np.int64) + 1) << 32 | right).astype(np.uint64)


def _read_grids(done: list[tuple[Array, Array]], num_pieces: int) -> tuple[Array, Array]:
    """Return the ids in grids of pieces, ordered by the number of the piece, and the counts."""
    counts, ids = np.zeros(num_pieces, np.int64), [np.empty(0, np.int32)]
    pieces = [np.empty(0, np.int64)]
    for grid, numbers in done:
        counts[numbers] = (grid >= 0).sum(axis=1)
        ids.append(grid[grid >= 0])
        pieces.append(np.repeat(numbers, counts[numbers]))
    return np.concatenate(ids)[np.argsort(np.concatenate(pieces), kind="stable")], counts
