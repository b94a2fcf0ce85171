"""Dialogues longer than a block: whole questions with their answers, end tokens always, counted."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.render.encode import load_tokenizer
from pipelines.render.truncation import Window, choose_windows, count_turns
from tests.assets.rendering import read_examples, record, render_stages, rendering_recipe

POLICIES = ("drop", "keep-last-turns", "split-windows")


def messages(*answers, system=None, ends_with_question=False):
    """Return turns in which question i asks for answer i."""
    turns = [{"role": "system", "content": system, "train": None}] if system else []
    for number, answer in enumerate(answers):
        turns.append({"role": "user", "content": f"q{number}", "train": None})
        turns.append({"role": "assistant", "content": answer, "train": None})
    if ends_with_question:
        turns.append({"role": "user", "content": "and now?", "train": None})
    return turns


def tokenized(tmp_path, policy, records, block_size=64, name="starchat"):
    recipe = rendering_recipe(
        template__name=name,
        template__train_on_prompt=False,
        tokenization__block_size=block_size,
        tokenization__truncation=policy,
        fim__fim_rate=0,
    )
    store, refs = render_stages(tmp_path, recipe, {"train": records}, until="tokenize")
    ((_, path),) = store.shards(refs["tokenize"])
    tokenizer = load_tokenizer(store.path(refs["tokenizer"]))
    rows = [
        (
            row["record_id"],
            tokenizer.decode(row["input_ids"], skip_special_tokens=False),
            tokenizer.decode([i for i in row["labels"] if i != -100], skip_special_tokens=False),
        )
        for row in read_examples(path)
    ]
    return rows, store.manifest(refs["tokenize"])


LONG = "0123456789" * 2  # a token each
RECORDS = [
    record("short", messages=messages("a")),
    record("long", messages=messages(LONG, LONG, "c", LONG, system="S", ends_with_question=True)),
    record("one", messages=messages("x " * 100)),
]


def turn(number, answer):
    return f"<|user|>\nq{number}<|end|>\n<|assistant|>\n{answer}<|end|>\n"


SHORT = ("short", turn(0, "a"), "a<|end|>")


def test_drop_leaves_out_what_is_too_long(tmp_path):
    rows, manifest = tokenized(tmp_path, "drop", RECORDS)

    assert rows == [SHORT]
    assert manifest.counts.dropped == {"too_long": 2}
    assert manifest.report["shortened"] == {}


def test_keep_last_turns_keeps_the_system_turn_and_the_last_questions_that_fit(tmp_path):
    rows, manifest = tokenized(tmp_path, "keep-last-turns", RECORDS)

    kept = "<|system|>\nS<|end|>\n" + turn(2, "c") + turn(3, LONG)
    assert rows == [SHORT, ("long", kept, f"c<|end|>{LONG}<|end|>")]
    assert manifest.counts.dropped == {"too_long": 1}
    assert manifest.report["shortened"] == {
        "dialogues": 1, "rows": 1, "turns_kept": 2, "turns_dropped": 2,
    }  # fmt: skip


def test_split_windows_trains_every_answer_once(tmp_path):
    rows, manifest = tokenized(tmp_path, "split-windows", RECORDS)

    assert [name for name, _, _ in rows] == ["short", *["long"] * (len(rows) - 1)]
    assert all(text.startswith("<|system|>\nS<|end|>\n<|user|>\n") for _, text, _ in rows[1:])
    assert all(text.endswith("<|end|>\n") for _, text, _ in rows)
    trained = "".join(labels for _, _, labels in rows[1:])
    assert trained == "".join(f"{answer}<|end|>" for answer in (LONG, LONG, "c", LONG))
    assert manifest.report["shortened"] == {
        "dialogues": 1, "rows": len(rows) - 1, "turns_kept": 4, "turns_dropped": 0,
    }  # fmt: skip
    assert (manifest.counts.rows_in, manifest.counts.used) == (3, 2)
    assert manifest.counts.rows_out == len(rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pair_is_kept_whole_or_dropped(tmp_path, policy):
    pair = record("p", prompt="q", completion="x " * 100)
    rows, manifest = tokenized(tmp_path, policy, [pair, RECORDS[0]], name="question-answer")

    assert [name for name, _, _ in rows] == ["short"]
    assert manifest.counts.dropped == {"too_long": 1}


def test_the_windows_of_a_dialogue():
    lengths, trained = [4, 10, 10, 50, 10], [False, True, True, True, False]

    assert choose_windows(lengths, trained, 30, "drop") == []
    assert choose_windows(lengths, trained, 30, "keep-last-turns") == []
    assert choose_windows(lengths, trained, 60, "keep-last-turns") == [Window(3, 4)]
    assert choose_windows(lengths, trained, 70, "keep-last-turns") == [Window(2, 4)]
    assert choose_windows(lengths, trained, 30, "split-windows") == [Window(1, 3)]
    assert choose_windows(lengths, trained, 65, "split-windows") == [
        Window(1, 3), Window(2, 4, context=1),
    ]  # fmt: skip
    assert choose_windows([4, 10], [False, False], 8, "split-windows") == []
    assert count_turns([Window(1, 3)], trained) == {
        "dialogues": 1, "rows": 1, "turns_kept": 2, "turns_dropped": 1,
    }  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=9),
    st.integers(0, 20),
    st.integers(20, 60),
    st.sampled_from(POLICIES),
)
def test_windows_fit_train_something_and_train_nothing_twice(parts, head, block_size, policy):
    lengths = [head, *(length for length, _ in parts)]
    trained = [False, *(flag for _, flag in parts)]

    windows = choose_windows(lengths, trained, block_size, policy)

    own = Counter()
    for first, stop, context in windows:
        assert head + sum(lengths[first:stop]) <= block_size
        assert any(trained[first + context : stop])
        own.update(range(first + context, stop))
    assert max(own.values(), default=1) == 1
    if policy == "split-windows":
        fitting = {n for n, length in enumerate(lengths) if n and length <= block_size - head}
        assert {n for n in own if trained[n]} == {n for n in fitting if trained[n]}
    if policy == "keep-last-turns" and windows:
        assert max(own) == max(n for n, flag in enumerate(trained) if flag)
    counts = count_turns(windows, trained)
    assert counts["turns_kept"] + counts["turns_dropped"] == sum(trained)
