"""Finds the texts of benchmarks in records, by the word n-grams they share.

White space, newlines, punctuation and case do not count, so neither do CRLF, tabs and indents.
A text of a benchmark is found in a record that has at least the recipe's share (`coverage`) of its
distinct n-grams; a text shorter than an n-gram is found as a whole.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.curate.benchmarks import Item
from pipelines.curate.bodies import Bodies, read_bodies
from pipelines.curate.words import Grams, Hashes, Integers, hash_ngrams, hash_words, pack
from pipelines.engine import Outcome, Params
from pipelines.manifest import Counts

SEED = 0
FILTER_BITS = 22
MOST_CHARACTERS = 4000
# White space beyond ASCII, which the hashing of words takes for letters.
SPACES = r"[\x{85}\x{a0}\x{1680}\x{2000}-\x{200d}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}]"
WORD = re.compile(
    r"(?:[0-9A-Za-z_]|(?!"
    + re.sub(r"\\x\{(\w+)\}", lambda code: f"\\u{int(code[1], 16):04x}", SPACES)
    + r")[\x80-\U0010ffff])+"
)
LETTER = re.compile(r"[^\W\d_]")
ITEM_SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("problem", pa.string()),
        ("field", pa.string()),
        ("text", pa.string()),
        ("length", pa.int64()),
        ("ngrams", pa.int64()),
    ]
)
GRAM_SCHEMA = pa.schema([("length", pa.int64()), ("hash", pa.uint64()), ("item", pa.int64())])
HIT_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("id", pa.string()),
        ("benchmark", pa.string()),
        ("problem", pa.string()),
        ("field", pa.string()),
        ("coverage", pa.float64()),
        ("ngrams", pa.int64()),
        ("benchmark_text", pa.string()),
        ("record_text", pa.string()),
    ]
)


def folded_words(texts: pa.Array) -> Grams:
    """Return the hashes of the words of texts, whatever their case and white space."""
    other = pc.invert(pc.string_is_ascii(texts))
    if pc.any(other).as_py():
        spaced = pc.replace_substring_regex(texts.filter(other), SPACES, " ")
        texts = pc.replace_with_mask(texts, other, spaced)
    return hash_words(pack(texts), fold_case=True)


def index_items(items: Iterable[Item], ngram: int, min_words: int) -> tuple[pa.Table, pa.Table]:
    """Return the items of at least `min_words` words, each once, and all their n-grams, sorted.

    Numbers alone are left out: (1,) (2,) ... (10,) is the input of a test, and is in any code.
    """
    rows: list[dict[str, Any]] = []
    grams, seen = [], set()
    for item in items:
        words = folded_words(pa.array([item.text]))
        length = min(ngram, len(words.hashes))
        key = words.hashes.tobytes()
        if len(words.hashes) < min_words or key in seen or not LETTER.search(item.text):
            continue
        seen.add(key)
        hashes = np.unique(hash_ngrams(words, length, SEED).hashes)
        grams.append((np.full(len(hashes), length), hashes, np.full(len(hashes), len(rows))))
        rows.append({**item._asdict(), "length": length, "ngrams": len(hashes)})
    empty = (np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))
    columns = [np.concatenate(parts) for parts in zip(empty, *grams, strict=True)]
    table = pa.table(columns, schema=GRAM_SCHEMA)
    order = [("length", "ascending"), ("hash", "ascending"), ("item", "ascending")]
    return pa.Table.from_pylist(rows, schema=ITEM_SCHEMA), table.sort_by(order)


class Lookup:
    """The n-grams of one length: which items have them."""

    def __init__(self, length: int, hashes: Hashes, items: Integers) -> None:
        """Take the sorted hashes with their items."""
        self.length, self._hashes, self._items = length, hashes, items
        # Most hashes of a clean text end here: one look at a table that stays in the cache.
        self._maybe = np.zeros(1 << FILTER_BITS, np.bool_)
        self._maybe[self._short(hashes)] = True

    @staticmethod
    def _short(hashes: Hashes) -> Integers:
        return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)

    def find(self, words: Grams) -> "Found":
        """Return all distinct n-grams of each document that items have."""
        grams = hash_ngrams(words, self.length, SEED)
        places = np.flatnonzero(self._maybe[self._short(grams.hashes)])
        documents = np.searchsorted(grams.bounds, places, "right") - 1
        hashes = grams.hashes[places]
        # Only the first place of an n-gram in a document: repeats must not multiply.
        order = np.lexsort((places, hashes, documents))
        is_first = np.ones(len(order), np.bool_)
        is_first[1:] = np.diff(documents[order]) != 0
        is_first[1:] |= np.diff(hashes[order]) != 0
        chosen = order[is_first]
        start = np.searchsorted(self._hashes, hashes[chosen], "left")
        count = np.searchsorted(self._hashes, hashes[chosen], "right") - start
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        every = np.repeat(chosen, count)
        items = self._items[np.repeat(start, count) + offset]
        return Found(documents[every], items, places[every] - grams.bounds[documents[every]])


class Found(NamedTuple):
    """N-grams of documents that items have, one entry for each item, and their places."""

    documents: Integers
    items: Integers
    places: Integers


class Hit(NamedTuple):
    """An item found in a document of a batch, between two of its words."""

    document: int
    item: int
    coverage: float
    first: int
    last: int


class Detector:
    """Finds the items in batches of records."""

    def __init__(self, items: pa.Table, grams: pa.Table, coverage: float) -> None:
        """Take what `index_items` made."""
        lengths = grams["length"].to_numpy()
        hashes, owners = grams["hash"].to_numpy(), grams["item"].to_numpy()
        bounds = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
        self._lookups = [
            Lookup(int(lengths[a]), hashes[a:b], owners[a:b]) for a, b in pairwise(bounds)
        ]
        self._ngrams = items["ngrams"].to_numpy()
        self._coverage = coverage

    def find(self, texts: pa.Array) -> Iterator[Hit]:
        """Yield all hits in some texts."""
        words = folded_words(texts)
        for lookup in self._lookups:
            found = lookup.find(words)
            if len(found.documents):
                yield from self._cover(found, lookup.length)

    def _cover(self, found: Found, length: int) -> Iterator[Hit]:
        order = np.lexsort((found.places, found.items, found.documents))
        documents, items, places = (column[order] for column in found)
        changes = (np.diff(documents) != 0) | (np.diff(items) != 0)
        bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(order)]])
        for start, stop in pairwise(bounds.tolist()):
            item = int(items[start])
            coverage = (stop - start) / int(self._ngrams[item])
            if coverage >= self._coverage:
                last = int(places[stop - 1]) + length - 1
                yield Hit(int(documents[start]), item, coverage, int(places[start]), last)


def find_hits(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write every hit in a shard (first input) of the items and n-grams (the others)."""
    shard, items_path, grams_path = inputs
    items = pq.read_table(items_path, use_threads=False)
    detector = Detector(items, pq.read_table(grams_path, use_threads=False), params["coverage"])
    rows = [
        row
        for bodies in read_bodies(shard, ["id"])
        for hit in detector.find(bodies.texts)
        for row in [_hit_row(shard.name, bodies, hit, items)]
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=HIT_SCHEMA), output)
    return Outcome(Counts())


def _hit_row(file: str, bodies: Bodies, hit: Hit, items: pa.Table) -> dict[str, Any]:
    item = items.slice(hit.item, 1).to_pylist()[0]
    text = bodies.texts[hit.document].as_py()
    return {
        "file": file,
        "row": bodies.first + hit.document,
        "id": bodies.columns["id"][hit.document].as_py(),
        "benchmark": item["benchmark"],
        "problem": item["problem"],
        "field": item["field"],
        "coverage": hit.coverage,
        "ngrams": item["ngrams"],
        "benchmark_text": item["text"][:MOST_CHARACTERS],
        "record_text": cut_words(text, hit.first, hit.last)[:MOST_CHARACTERS],
    }


def cut_words(text: str, first: int, last: int) -> str:
    """Return the part of a text from one word to another, by their numbers.

    >>> cut_words("a, b. c d", 1, 2)
    'b. c'
    """
    start, end = 0, len(text)
    for number, word in enumerate(WORD.finditer(text)):
        if number == first:
            start = word.start()
        if number == last:
            end = word.end()
            break
    return text[start:end]
