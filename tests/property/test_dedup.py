"""Deduplication against a direct definition over Python sets."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.curate.dedup import Document, find_duplicates
from pipelines.curate.minhash import jaccard, shingle

NGRAM = 3
TEXTS = st.lists(st.sampled_from("a b c dd ee_1 ff X9 ß ,".split()), max_size=14).map(" ".join)


def grams(text):
    words = re.findall(r"[A-Za-z0-9_\x80-\U0010ffff]+", text)
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def similarity(left, right):
    either = grams(left) | grams(right)
    return len(grams(left) & grams(right)) / len(either) if either else 0.0


def make_document(number, text, score, kind):
    normal = " ".join(text.split()).encode()
    return Document(f"id{number:02d}", score, kind, normal, shingle(text, NGRAM, 1), "f", number)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_shingle_sets_have_the_similarity_of_the_word_ngrams(left, right):
    ours = jaccard(shingle(left, NGRAM, 1), shingle(right, NGRAM, 1))

    assert ours == similarity(left, right)
    assert len(shingle(left, NGRAM, 1)) == len(grams(left))


@settings(max_examples=150, deadline=None)
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
    documents = [make_document(number, *row) for number, row in enumerate(rows)]
    shuffled = random.sample(documents, len(documents))

    found = find_duplicates(documents, threshold)
    dropped = {duplicate.document.id for duplicate in found}
    kept = [document for document in documents if document.id not in dropped]

    assert found == find_duplicates(shuffled, threshold)
    for document, _, best, value, reason in found:
        left, right = texts[document.id], texts[best.id]
        assert best.id not in dropped
        assert best.rank < document.rank
        assert best.kind == document.kind
        assert reason in ("exact_duplicate", "near_duplicate")
        if left.split() == right.split():
            assert value == 1.0
        else:
            assert value == similarity(left, right) >= threshold
    for i, left in enumerate(kept):
        for right in kept[:i]:
            if left.kind == right.kind:
                assert left.digest != right.digest
                # Sketches may miss a pair at the threshold, never one with equal shingles.
                assert similarity(texts[left.id], texts[right.id]) < 1.0
