"""Duplicates are found, verified and resolved for the best record, at linear cost."""

import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.curate import clusters as clusters_module
from pipelines.curate import dedup, signatures
from pipelines.curate.candidates import Buckets, distinct_pairs
from pipelines.curate.minhash import NUM_BINS, jaccard, rows_per_band, sketch
from pipelines.curate.words import hash_ngrams, hash_words, pack, shingle
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
    clusters = [entry for entry in clusters if entry["reason"] != "kept"]
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
            "id": "d", "cluster": 4, "representative": "c", "jaccard": 1.0,
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


@pytest.mark.parametrize("runner", ["threads", "processes"])
def test_the_result_is_the_same_for_one_and_two_workers(tmp_path, monkeypatch, runner):
    monkeypatch.setattr(dedup, "choose_runner", lambda shards: runner)
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


@pytest.mark.parametrize("distinct", [False, True])
def test_thousands_of_alike_records_cost_one_comparison_each(monkeypatch, tmp_path, distinct):
    """A quadratic search would make two million."""
    base = words(300)
    texts = [text([*base, f"end{i}" if distinct else "end"]) for i in range(2000)]
    rows = [record(f"{i:06d}", text=value) for i, value in enumerate(texts)]
    compared = []
    monkeypatch.setattr(
        clusters_module, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b)
    )

    kept, _, clusters = deduplicated(tmp_path, rows)

    assert kept == ["000000"]
    assert {entry["representative"] for entry in clusters} == {"000000"}
    assert len(compared) <= 2 * len(texts)


def test_a_bucket_proposes_a_number_of_pairs_that_grows_linearly():
    buckets = Buckets(np.arange(1000), np.repeat([0, 1], 500))

    pairs = distinct_pairs([buckets.pairs()])

    assert len(pairs) <= 2 * 1000
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert buckets.star().tolist()[0] == [0, 1]
    assert {(a < 500, b < 500) for a, b in pairs.tolist()} == {(True, True), (False, False)}


def test_a_long_chain_is_not_compared_all_with_all(monkeypatch, tmp_path):
    """Each record repeats its neighbors only: 150 are kept, and each is compared with 64 or so."""
    base = words(5000)
    rows = [record(f"{i:06d}", text=text(base[8 * i : 8 * i + 80])) for i in range(600)]
    compared = []
    monkeypatch.setattr(
        clusters_module, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b)
    )

    kept, _, clusters = deduplicated(tmp_path, rows)

    assert len(kept) + len(clusters) == 600
    assert len(kept) >= 150
    assert len(compared) <= 600 * 70


def test_nearly_every_similar_pair_is_found_and_nothing_else(tmp_path):
    """200 pairs at Jaccard 0.70 to 0.74, the hardest to find: 42 bands of 6 miss 0.5 %."""
    rows, similar = [], set()
    for seed in range(200):
        base = words(120 + seed, seed=seed)
        count = round(len(base) * 0.032)
        other = changed(base, *range(10, 10 + 9 * count, 9))
        rows += [record(f"{seed:03d}a", text=text(base)), record(f"{seed:03d}b", text=text(other))]
        if jaccard(shingle(text(base), 5, 42), shingle(text(other), 5, 42)) >= 0.7:
            similar.add((f"{seed:03d}a", f"{seed:03d}b"))

    _, _, clusters = deduplicated(tmp_path, rows)

    pairs = {(entry["representative"], entry["id"]) for entry in clusters}
    assert pairs <= similar
    assert len(similar) > 100
    assert len(pairs) >= 0.98 * len(similar)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7, 0.85, 0.95])
def test_bands_miss_few_pairs_at_any_threshold(threshold):
    rows = rows_per_band(threshold)

    assert (1 - threshold**rows) ** (NUM_BINS // rows) <= 0.0055
    assert rows <= NUM_BINS // 8


def signatures_made(monkeypatch):
    made = []
    real = signatures.sign_bodies
    monkeypatch.setattr(
        signatures, "sign_bodies", lambda *given: made.append(given[0]) or real(*given)
    )
    return made


def test_a_refresh_signs_new_shards_only_and_gives_what_a_first_build_gives(monkeypatch, tmp_path):
    old = [record(f"o{i}", text=text(words(60, seed=i))) for i in range(30)]
    new = [record(f"a{i}", text=text(changed(words(60, seed=i), 30))) for i in range(9)]
    made = signatures_made(monkeypatch)

    deduplicated(tmp_path / "kept", old)
    first = len(made)
    kept, refreshed, _ = deduplicated(tmp_path / "kept", old, new)
    second = len(made) - first
    _, fresh, _ = deduplicated(tmp_path / "fresh", old, new, incremental=False)

    assert (first, second) == (1, 1)
    assert refreshed.report["signatures"] == {"shards": 2, "reused": 1}
    assert fresh.report["signatures"] == {"shards": 2, "reused": 0}
    assert refreshed.digest == fresh.digest
    assert set(kept) == {f"a{i}" for i in range(9)} | {f"o{i}" for i in range(9, 30)}


def test_kept_signatures_that_were_cut_are_made_again(monkeypatch, tmp_path):
    rows = [record(f"o{i}", text=text(words(60, seed=i))) for i in range(5)]
    _, before, _ = deduplicated(tmp_path, rows)
    [kept] = tmp_path.glob("dedup/.signatures-*/*.arrow")
    kept.write_bytes(kept.read_bytes()[:-100])
    made = signatures_made(monkeypatch)

    _, after, _ = deduplicated(tmp_path, rows, [record("z", text="z")])

    assert len(made) == 2
    assert after.counts.rows_out == before.counts.rows_out + 1


def grown(tmp_path, *more, **settings):
    """Build on 40 pairs in 4 shards, then with `more`, as from nothing; return both results."""
    rows = []
    for i in range(40):
        base = words(60, seed=i)
        rows += [
            record(f"a{i:02d}", text=text(base)),
            record(f"b{i:02d}", text=text(changed(base, 9))),
        ]
    old = [rows[start : start + 20] for start in range(0, 80, 20)]
    before = deduplicated(tmp_path / "kept", *old)
    after = deduplicated(tmp_path / "kept", *old, *more, **settings)
    fresh = deduplicated(tmp_path / "fresh", *old, *more, incremental=False, **settings)
    assert (after[0], after[1].digest, after[2]) == (fresh[0], fresh[1].digest, fresh[2])
    return before, after


def test_a_refresh_compares_new_records_and_what_they_resemble_only(tmp_path):
    best = record("best", text=text(changed(words(60, seed=3), 30)), score=9.0)

    before, after = grown(tmp_path, [best, record("z", text=text(words(60, seed=99)))])

    assert before[1].report["compared"] == 80
    # Both new ones, and the pair that one of them resembles.
    assert after[1].report["compared"] == 4
    # a03 makes way for the better one, and b03 repeated a03 alone.
    assert set(after[0]) - set(before[0]) == {"best", "z", "b03"}
    assert set(before[0]) - set(after[0]) == {"a03"}
    assert {e["id"]: e["representative"] for e in after[2] if e["id"] in ("a03", "b03")} == {
        "a03": "best"
    }


def test_with_other_settings_nothing_that_was_kept_is_used(tmp_path):
    _, after = grown(tmp_path, [record("z", text="z")], threshold=0.6)

    assert after[1].report["compared"] == 81
    assert len(list((tmp_path / "kept" / "dedup").glob(".index-*"))) == 2


@pytest.mark.parametrize("name", ["index.json", "labels.bin", "members.arrow", "output-00001"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_kept_index_that_is_damaged_is_passed_over(tmp_path, name, damage):
    rows = [[record(f"o{i}{n}", text=text(words(60, seed=i))) for i in range(4)] for n in range(2)]
    deduplicated(tmp_path / "kept", *rows)
    [kept] = (tmp_path / "kept").glob(f"dedup/.index-*/*/{name}")
    data = kept.read_bytes()
    kept.unlink()  # the finished stage has the same file by another name
    if damage != "gone":
        kept.write_bytes(data[:-9] if damage == "cut" else data[:-9] + bytes(9))

    new = [record("z", text=text(words(60, seed=2)), score=1.0)]
    _, after, clusters = deduplicated(tmp_path / "kept", *rows, new)
    _, fresh, expected = deduplicated(tmp_path / "fresh", *rows, new, incremental=False)

    assert (after.digest, clusters) == (fresh.digest, expected)
    assert after.report["compared"] == (3 if name == "output-00001" else 9)


def test_a_build_that_was_killed_goes_on_without_the_index_it_began_with(monkeypatch, tmp_path):
    rows = [[record(f"o{i}{n}", text=text(words(60, seed=i))) for i in range(9)] for n in range(2)]
    new = [record("z", text=text(changed(words(60, seed=2), 5)), score=1.0)]
    deduplicated(tmp_path / "kept", *rows)

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dedup, "write_clusters", stop)
        with pytest.raises(KeyboardInterrupt):
            deduplicated(tmp_path / "kept", *rows, new)
    for folder in (tmp_path / "kept" / "dedup").glob(".index-*"):
        shutil.rmtree(folder)
    _, after, clusters = deduplicated(tmp_path / "kept", *rows, new)
    _, fresh, expected = deduplicated(tmp_path / "fresh", *rows, new, incremental=False)

    assert (after.digest, clusters) == (fresh.digest, expected)
    assert after.report["compared"] == 19


def test_memory_changes_no_byte_of_the_result(tmp_path):
    rows = [record(f"r{i:03d}", text=text(changed(words(99, seed=i % 50), i))) for i in range(400)]
    shards = [rows[:150], rows[150:]]

    _, much, clusters = deduplicated(tmp_path / "2", *shards)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("pipelines.curate.candidates.BYTES_PER_DOCUMENT", 2**21)
        patch.setattr("pipelines.curate.partitions.BYTES_PER_DOCUMENT", 2**21)
        _, little, same = deduplicated(tmp_path / "1", *shards, memory_gb=0.1)

    assert much.digest == little.digest
    assert clusters == same
    assert len(clusters) == 350


def test_what_stays_does_not_depend_on_the_order_of_shards(tmp_path):
    rows = [record(f"r{i:03d}", text=text(changed(words(99, seed=i % 40), i))) for i in range(400)]
    shards = [rows[start : start + 80] for start in range(0, 400, 80)]

    kept, _, clusters = deduplicated(tmp_path / "1", *shards)
    again, _, other = deduplicated(tmp_path / "2", *reversed(shards))

    assert sorted(kept) == sorted(again)
    pairs = [{(e["id"], e["representative"], e["jaccard"]) for e in c} for c in (clusters, other)]
    assert pairs[0] == pairs[1]


def test_clusters_join_the_groups_of_all_their_records(tmp_path):
    a, b, c = (words(80, seed=seed) for seed in range(3))
    rows = [
        record("1", group="left", source="one", text=text(a)),
        record("2", group="middle", source="two", text=text(changed(a, 40))),
        record("3", group="middle", source="two", text=text(b)),
        record("4", group="right", source="one", text=text(b)),
        record("5", group="other", text=text(c)),
        record("6", group="other", text=text(c)),
    ]
    store, ref = run_stage(tmp_path, "dedup", curation_recipe(), rows[:3], rows[3:])

    table = pq.read_table(store.path(ref) / "groups.parquet").to_pylist()

    assert table == [
        {"group": "left", "joined": "left"},
        {"group": "middle", "joined": "left"},
        {"group": "right", "joined": "left"},
    ]
    assert store.manifest(ref).report["joined_groups"] == {"groups": 3, "joined": 1, "largest": 3}


def test_every_record_of_a_cluster_is_in_the_table(tmp_path):
    base = words(80)
    rows = [record("a", text=text(base)), record("b", text=text(base)), record("c", text="x")]
    store, ref = run_stage(tmp_path, "dedup", curation_recipe(), rows)

    table = pq.read_table(store.path(ref) / "clusters.parquet").to_pylist()

    assert [(e["id"], e["cluster"], e["representative"], e["reason"]) for e in table] == [
        ("a", 0, "a", "kept"),
        ("b", 0, "a", "exact_duplicate"),
    ]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "word",
        "+-*/ " * 40_000,
        "x" * 5_000_000,
        "same " * 500_000,
        "a b c d e f g " * 100_000,
        "\u00a0".join(["nbsp"] * 9),
    ],
    ids=["empty", "one token", "no words", "one long line", "repeats", "periodic", "nbsp"],
)
def test_odd_texts_are_compared_like_any_other(tmp_path, body):
    rows = [record("a", text=body), record("b", text=body), record("c", text=text(words(30)))]

    kept, manifest, _ = deduplicated(tmp_path, rows)

    assert kept == ["a", "c"]
    assert manifest.counts.dropped == {"exact_duplicate": 1}


def grams_of(*texts):
    return hash_ngrams(hash_words(pack(pa.array(texts))), 5, 42)


@pytest.mark.parametrize("count", [8, 30, 120, 2000])
def test_sketches_estimate_the_similarity_whatever_the_length(count):
    estimates, exact = [], []
    for seed in range(40):
        base = [f"{seed}x{i}" for i in range(count + 4)]
        other = changed(base, *range(0, count, max(count // 2, 20)))
        left, right = shingle(text(base), 5, 42), shingle(text(other), 5, 42)
        sketches = sketch(grams_of(text(base), text(other)))
        estimates.append(float(np.mean(sketches[0] == sketches[1])))
        exact.append(jaccard(left, right))

    assert sketches.shape == (2, NUM_BINS)
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


def test_many_texts_at_once_have_the_shingles_of_each_alone():
    texts = ["", "a b c d e f", "x" * 40, text(words(50)), "größer als a_b 9 9 9", "+", "a b c d e"]

    grams = grams_of(*texts)

    for number, value in enumerate(texts):
        mine = grams.hashes[grams.bounds[number] : grams.bounds[number + 1]]
        assert np.unique(mine).tolist() == shingle(value, 5, 42).tolist()
    assert grams.counts.tolist() == [0, 2, 0, 46, 2, 0, 1]


def test_a_build_that_stopped_goes_on_with_other_memory_and_gives_the_same(monkeypatch, tmp_path):
    rows = [record(f"r{i:03d}", text=text(changed(words(99, seed=i % 50), i))) for i in range(300)]
    shards = [rows[:150], rows[150:]]
    _, whole, clusters = deduplicated(tmp_path / "whole", *shards)

    def stop(inputs, output, params):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.curate.dedup.resolve_partition", stop)
        with pytest.raises(KeyboardInterrupt):
            deduplicated(tmp_path / "stopped", *shards)
    made = signatures_made(monkeypatch)
    monkeypatch.setattr("pipelines.curate.partitions.BYTES_PER_DOCUMENT", 2**20)
    _, resumed, same = deduplicated(tmp_path / "stopped", *shards, memory_gb=0.1)

    assert made == []
    assert whole.digest == resumed.digest
    assert clusters == same


def test_memory_and_signatures_do_not_enter_the_key():
    default = dedup.params(curation_recipe())
    other = {"memory_gb": 0.5, "incremental": False}

    assert dedup.params(curation_recipe(curation={"dedup": other})) == default
    assert dedup.params(curation_recipe(curation={"dedup": {"ngram": 4}})) != default


def test_shards_of_equal_bytes_share_their_kept_signatures(tmp_path):
    rows = [record(f"o{i}", text=text(words(60, seed=i))) for i in range(5)]

    kept, manifest, _ = deduplicated(tmp_path, rows, rows, rows, workers=3)

    assert kept == [f"o{i}" for i in range(5)]
    assert manifest.counts.dropped == {"exact_duplicate": 10}
    assert len(list(tmp_path.glob("dedup/.signatures-*/*.arrow"))) == 1


def test_branches_of_a_tree_are_compared_by_what_is_new_in_them(tmp_path):
    """The turns they share are trained in one of them alone: dropping one would lose an answer."""
    shared = [" ".join(f"{kind}{n}" for n in range(60)) for kind in ("question", "answer")]
    new = [" ".join(f"{kind}{n}" for n in range(9)) for kind in ("more", "less", "else")]

    def dialogue(record_id, *rest, first):
        turns = [*shared, *rest]
        messages = [
            {"role": role, "content": text, "train": role == "assistant" and (first or n > 1)}
            for n, (role, text) in enumerate(zip(("user", "assistant") * 2, turns, strict=False))
        ]
        return record(record_id, group="tree", messages=messages)

    rows = [
        dialogue("a", "and?", new[0], first=True),
        dialogue("b", "and then?", new[1], first=False),
        dialogue("c", "what?", new[2], first=False),
        dialogue("d", "and then?", new[1], first=False),
    ]

    store, ref = run_stage(tmp_path, "dedup", curation_recipe(), rows)

    assert [row["id"] for row in rows_of(store, ref)] == ["a", "b", "c"]
    assert store.manifest(ref).counts.dropped == {"exact_duplicate": 1}
