"""Judges a deduplication by sets of strings, without starloom's code: precision, planted recall."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pyarrow.parquet as pq

WORD = re.compile(r"[0-9A-Za-z_\x80-\U0010ffff]+")
THRESHOLD, MARGIN = 0.7, 0.05

Shingler = Callable[[str], frozenset]


def word_ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """Return the word 5-grams, case and all: the definition that the stage documents."""
    words = WORD.findall(text)
    return frozenset(zip(*(words[k:] for k in range(5)), strict=False))


def folded_ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """Return 4-grams of lower-cased words and signs: another common definition."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return frozenset(zip(*(words[k:] for k in range(4)), strict=False))


def similarity(left: str, right: str, shingler: Shingler) -> float:
    a, b = shingler(left), shingler(right)
    if not a and not b:
        return float(left.split() == right.split())
    return len(a & b) / len(a | b) if a | b else 0.0


def read_corpus(folder: Path) -> dict[str, str]:
    texts = {}
    for path in sorted(folder.glob("records-*.parquet")):
        table = pq.read_table(path, columns=["id", "text"])
        texts.update(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    return texts


def precision(clusters: Iterable[Mapping], texts: Mapping[str, str]) -> tuple[int, int]:
    """Return (removed records with a similar member of their cluster, all removed records)."""
    clusters = list(clusters)
    members: dict[int, list[str]] = {}
    for entry in clusters:
        members.setdefault(entry["cluster"], []).append(entry["id"])
    right = removed = 0
    for entry in clusters:
        if entry["reason"] == "kept":
            continue
        removed += 1
        name, mine = entry["id"], texts[entry["id"]]
        others = [entry["representative"], *members[entry["cluster"]]]
        right += any(
            similarity(mine, texts[other], word_ngrams) >= THRESHOLD
            for other in others
            if other != name
        )
    return right, removed


def sure_pairs(truth: Iterable[Mapping], texts: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return {pair: kind} of planted pairs that two shinglers put well above the threshold."""
    found = {}
    for entry in truth:
        pair = entry["original"], entry["id"]
        left, right = texts[pair[0]], texts[pair[1]]
        wanted = THRESHOLD + MARGIN
        if all(similarity(left, right, s) >= wanted for s in (word_ngrams, folded_ngrams)):
            found[pair] = entry["kind"]
    return found
