"""Deduplication against a direct definition over Python sets."""

import re
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.curate.minhash import jaccard
from pipelines.curate.words import shingle
from tests.assets.curation import curation_recipe, record, run_stage

NGRAM = 3
TEXTS = st.lists(st.sampled_from("a b c dd ee_1 ff X9 ß ,".split()), max_size=14).map(" ".join)


def grams(text):
    words = re.findall(r"[A-Za-z0-9_\x80-\U0010ffff]+", text)
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def similarity(left, right):
    either = grams(left) | grams(right)
    return len(grams(left) & grams(right)) / len(either) if either else 0.0


def find_duplicates(rows, threshold):
    recipe = curation_recipe(curation={"dedup": {"ngram": NGRAM, "threshold": threshold}})
    with tempfile.TemporaryDirectory() as folder:
        half = len(rows) // 2
        store, ref = run_stage(Path(folder), "dedup", recipe, rows[:half], rows[half:])
        table = pq.read_table(store.path(ref) / "clusters.parquet").to_pylist()
    found = [entry for entry in table if entry["reason"] != "kept"]
    return {e["id"]: (e["representative"], e["jaccard"], e["reason"]) for e in found}


def make_row(number, text, score, kind):
    body = {"text": text} if kind == "text" else {"prompt": "", "completion": text}
    return record(f"id{number:02d}", score=score, **body)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_shingle_sets_have_the_similarity_of_the_word_ngrams(left, right):
    ours = jaccard(shingle(left, NGRAM, 1), shingle(right, NGRAM, 1))

    assert ours == similarity(left, right)
    assert len(shingle(left, NGRAM, 1)) == len(grams(left))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(TEXTS, st.sampled_from([None, 1.0, 2.0]), st.sampled_from(["text", "prompt"])),
        max_size=25,
    ),
    st.sampled_from([0.5, 0.7, 1.0]),
    st.randoms(use_true_random=False),
)
def test_what_is_dropped_repeats_a_better_kept_record_and_what_is_kept_differs(
    rows, threshold, random
):
    texts = {f"id{number:02d}": text for number, (text, _, _) in enumerate(rows)}
    kinds = {f"id{number:02d}": kind for number, (_, _, kind) in enumerate(rows)}
    rank = {f"id{n:02d}": (-(score or -9), n) for n, (_, score, _) in enumerate(rows)}
    given = [make_row(number, *row) for number, row in enumerate(rows)]

    found = find_duplicates(given, threshold)

    assert found == find_duplicates(random.sample(given, len(given)), threshold)
    for name, (best, value, reason) in found.items():
        left, right = texts[name], texts[best]
        assert best not in found
        assert rank[best] < rank[name]
        assert kinds[best] == kinds[name]
        if left.split() == right.split():
            assert value == 1.0
        else:
            assert value == similarity(left, right) >= threshold
        assert reason in ("exact_duplicate", "near_duplicate")
    kept = [name for name in texts if name not in found]
    for i, left in enumerate(kept):
        for right in kept[:i]:
            if kinds[left] == kinds[right]:
                assert texts[left].split() != texts[right].split()
                # Sketches may miss a pair at the threshold, never one with equal shingles.
                assert similarity(texts[left], texts[right]) < 1.0


def dedup_bytes(root, shards, threshold, **settings):
    """Return what one build leaves, byte for byte, and how many records it compared."""
    given = {"ngram": NGRAM, "threshold": threshold, **settings}
    store, ref = run_stage(root, "dedup", curation_recipe(curation={"dedup": given}), *shards)
    folder, manifest = store.path(ref), store.manifest(ref)
    sides = [(folder / name).read_bytes() for name in ("clusters.parquet", "groups.parquet")]
    counted = {name: manifest.report[name] for name in ("clusters", "joined_groups", "samples")}
    left = sorted(path.name for path in folder.iterdir())
    return (ref.digest, manifest.counts, counted, sides, left), manifest.report["compared"]


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_a_refresh_gives_the_bytes_of_a_build_from_nothing(data):
    """Whatever came, went or changed: better records, other groups, shards in other places."""
    shard = st.lists(
        st.tuples(TEXTS, st.sampled_from([None, 1.0, 2.0]), st.integers(0, 9), st.integers(0, 4)),
        min_size=1,
        max_size=7,
    )
    threshold, serial, shards = data.draw(st.sampled_from([0.4, 0.7])), 0, []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(3):
            for rows in data.draw(st.lists(shard, min_size=1, max_size=2)):
                made = [
                    record(f"id{n}-{serial}", score=score, group=f"g{group}", text=text)
                    for text, score, n, group in rows
                ]
                serial += 1
                place = data.draw(st.sampled_from([len(shards), len(shards), 0]))
                shards.insert(place, made)
            if step and data.draw(st.booleans()):
                shards.pop(data.draw(st.integers(0, len(shards) - 1)))

            grown, _ = dedup_bytes(Path(folder, "grown"), shards, threshold)
            fresh, _ = dedup_bytes(Path(folder, f"{step}"), shards, threshold, incremental=False)

            assert grown == fresh
