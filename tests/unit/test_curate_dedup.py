"""Duplicates are found, verified and resolved for the best record, at linear cost."""

import random

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.curate import dedup
from pipelines.curate.dedup import Document, find_duplicates
from pipelines.curate.minhash import (
    NUM_BINS,
    band_hashes,
    candidate_pairs,
    jaccard,
    shingle,
    sketch,
)
from pipelines.manifest import Counts
from tests.assets.curation import curation_recipe, record, rows_of, run_stage

WORDS = [f"word{number}" for number in range(5000)]


def words(count, seed=0):
    return random.Random(seed).sample(WORDS, count)


def text(values):
    return " ".join(values)


def changed(values, *places):
    return [f"new{i}" if i in places else value for i, value in enumerate(values)]


def deduplicated(tmp_path, *shards, workers=1, **settings):
    recipe = curation_recipe(curation={"dedup": settings})
    store, ref = run_stage(tmp_path, "dedup", recipe, *shards, workers=workers)
    clusters = pq.read_table(store.path(ref) / "clusters.parquet").to_pylist()
    return [row["id"] for row in rows_of(store, ref)], store.manifest(ref), clusters


def test_of_duplicates_the_best_scored_then_the_smallest_id_stays(tmp_path):
    base = words(200)
    near, other = changed(base, 100), words(200, seed=1)
    first = [
        record("z", text=text(base), score=2.0),
        record("b", text="  ".join(base) + "\n", score=1.0),
        record("alone", text=text(words(200, seed=2))),
    ]
    second = [
        record("a", text=text(near)),
        record("d", text=text(other)),
        record("c", text=text(other)),
    ]

    kept, manifest, clusters = deduplicated(tmp_path, first, second)

    assert kept == ["z", "alone", "c"]
    assert manifest.counts == Counts(
        rows_in=6, rows_out=3, used=3, dropped={"exact_duplicate": 2, "near_duplicate": 1}
    )
    assert manifest.report["clusters"] == 2
    similarity = 191 / 201
    assert clusters == [
        {
            "id": "b", "cluster": 0, "representative": "z", "jaccard": 1.0,
            "reason": "exact_duplicate", "file": "records-00000.parquet", "row": 1,
        },
        {
            "id": "a", "cluster": 0, "representative": "z", "jaccard": similarity,
            "reason": "near_duplicate", "file": "records-00001.parquet", "row": 0,
        },
        {
            "id": "d", "cluster": 1, "representative": "c", "jaccard": 1.0,
            "reason": "exact_duplicate", "file": "records-00001.parquet", "row": 1,
        },
    ]  # fmt: skip
    assert manifest.report["samples"]["near_duplicate"] == [
        {"id": "a", "reason": "near_duplicate", "detail": "of z (0.95)"}
    ]


def test_bodies_of_different_kinds_are_never_duplicates_of_each_other(tmp_path):
    body = text(words(100))
    talk = [{"role": "user", "content": body, "train": True}]
    rows = [
        record("file", text=f"\n{body}"),
        record("pair", prompt="", completion=body),
        record("talk", messages=talk),
    ]

    kept, manifest, _ = deduplicated(tmp_path, rows)

    assert kept == ["file", "pair", "talk"]
    assert manifest.counts.dropped == {}


def test_texts_shorter_than_an_ngram_are_only_compared_exactly(tmp_path):
    rows = [record("a", text="x = 1"), record("b", text="x  =  1\n"), record("c", text="x = 2")]

    kept, manifest, _ = deduplicated(tmp_path, rows)

    assert kept == ["a", "c"]
    assert manifest.counts.dropped == {"exact_duplicate": 1}


def test_a_chain_of_similar_records_drops_only_what_repeats_a_kept_one(tmp_path):
    base = words(600)
    chain = [changed(base, *range(0, 100 * step, 10)) for step in range(6)]
    rows = [record(f"r{step}", text=text(values)) for step, values in enumerate(chain)]

    kept, _, clusters = deduplicated(tmp_path, rows, threshold=0.7)

    by_id = {row["id"]: shingle(row["text"], 5, 42) for row in rows}
    dropped = {entry["id"]: entry for entry in clusters}
    assert kept == ["r0", "r3"]
    assert set(kept) | set(dropped) == set(by_id)
    for entry in clusters:
        exact = jaccard(by_id[entry["id"]], by_id[entry["representative"]])
        assert entry["representative"] in kept
        assert entry["jaccard"] == exact >= 0.7
    for i, left in enumerate(kept):
        assert all(jaccard(by_id[left], by_id[right]) < 0.7 for right in kept[:i])


def test_two_records_with_one_id_and_text_leave_one(tmp_path):
    rows = [record("same", text=text(words(50))), record("same", text=text(words(50)))]

    kept, manifest, _ = deduplicated(tmp_path, rows)

    assert kept == ["same"]
    assert manifest.counts.dropped == {"exact_duplicate": 1}


def test_a_score_that_is_no_number_counts_as_none(tmp_path):
    body = text(words(50))
    rows = [
        record("a", text=body, score=float("nan")),
        record("b", text=body),
        record("c", text=body, score=-5.0),
    ]

    kept, _, _ = deduplicated(tmp_path, rows)

    assert kept == ["c"]


def test_the_result_is_the_same_for_one_and_two_workers(tmp_path):
    base = words(400)
    rows = [record(f"r{i:02d}", text=text(changed(base, i, i + 100))) for i in range(40)]
    rows += [record(f"s{i:02d}", text=text(words(100, seed=i + 1))) for i in range(40)]
    random.Random(1).shuffle(rows)
    shards = [rows[start : start + 16] for start in range(0, 80, 16)]

    kept, alone, clusters = deduplicated(tmp_path / "1", *shards, workers=1)
    _, two, same_clusters = deduplicated(tmp_path / "2", *shards, workers=2)

    assert "r00" in kept
    assert len(kept) == 41
    assert alone.digest == two.digest
    assert clusters == same_clusters


def test_an_empty_stage_and_a_single_record_pass_through(tmp_path):
    assert deduplicated(tmp_path / "none", [])[0] == []
    assert deduplicated(tmp_path / "one", [record("a", text=text(words(9)))])[0] == ["a"]


def documents(texts, kind="text"):
    return [
        Document(f"{i:06d}", None, kind, value.encode(), shingle(value, 5, 42), "f", i)
        for i, value in enumerate(texts)
    ]


@pytest.mark.parametrize("distinct", [False, True])
def test_thousands_of_alike_records_cost_one_comparison_each(monkeypatch, distinct):
    """A quadratic search would make two million."""
    base = words(300)
    texts = [text([*base, f"end{i}" if distinct else "end"]) for i in range(2000)]
    compared = []
    monkeypatch.setattr(dedup, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b))

    duplicates = find_duplicates(documents(texts), 0.7)

    assert [d.document.row for d in duplicates] == list(range(1, 2000))
    assert {d.representative.row for d in duplicates} == {0}
    assert len(compared) <= 2 * len(texts)


def test_alike_records_propose_a_number_of_pairs_that_grows_linearly():
    base = words(300)
    table = np.array(
        [band_hashes(sketch(shingle(text([*base, f"end{i}"]), 5, 42)), 1) for i in range(1000)]
    )

    pairs = candidate_pairs(table)

    assert len(pairs) <= 20 * len(table)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_nearly_every_similar_pair_is_found_and_nothing_else():
    """200 pairs at Jaccard 0.70 to 0.74, the hardest to find: 42 bands of 6 miss 0.5 %."""
    texts = []
    for seed in range(200):
        base = words(120 + seed, seed=seed)
        count = round(len(base) * 0.032)
        places = range(10, 10 + 9 * count, 9)
        texts += [text(base), text(changed(base, *places))]
    found = documents(texts)
    similar = {
        i for i in range(0, 400, 2) if jaccard(found[i].shingles, found[i + 1].shingles) >= 0.7
    }

    duplicates = find_duplicates(found, 0.7)

    pairs = {(d.representative.row, d.document.row) for d in duplicates}
    assert pairs <= {(i, i + 1) for i in similar}
    assert len(similar) > 100
    assert len(pairs) >= 0.98 * len(similar)


@pytest.mark.parametrize("count", [8, 30, 120, 2000])
def test_sketches_estimate_the_similarity_whatever_the_length(count):
    estimates, exact = [], []
    for seed in range(40):
        base = [f"{seed}x{i}" for i in range(count + 4)]
        other = changed(base, *range(0, count, max(count // 2, 20)))
        left, right = shingle(text(base), 5, 42), shingle(text(other), 5, 42)
        estimates.append(float(np.mean(sketch(left) == sketch(right))))
        exact.append(jaccard(left, right))

    assert sketch(left).shape == (NUM_BINS,)
    assert abs(np.mean(estimates) - np.mean(exact)) < 0.04


def test_shingles_depend_on_words_and_seed_and_not_on_what_lies_between():
    spaced = shingle("def f(x):\n    return x + y_1\n", 3, 42)

    assert (spaced == shingle("def f x return,x;y_1", 3, 42)).all()
    assert len(spaced) == 4
    assert set(spaced) & set(shingle("def f(x):\n    return x + y_1\n", 3, 7)) == set()
    assert len(shingle("a b", 3, 42)) == 0
    assert len(shingle("", 1, 42)) == 0
    assert len(shingle("+-*/ \n", 1, 42)) == 0
    assert len(shingle("größer 你好 als", 3, 42)) == 1
    assert len(shingle("x" * 1_000_000, 1, 42)) == 1
