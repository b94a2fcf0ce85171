"""Whatever the forest and the order of its messages, dialogues and counts follow from the trees."""

import json
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sources.oasst import nested_json
from tests.assets.oasst import json_lines, message, read_oasst, spoken


@st.composite
def forests(draw):
    """Messages with some that are deleted, out of turn, unranked, repeated, or without parents."""
    size = draw(st.integers(1, 24))
    depths, messages = [], []
    for number in range(size):
        parent = draw(st.sampled_from([None, *range(number)]))
        depths.append(0 if parent is None else depths[parent] + 1)
        role = "prompter" if depths[-1] % 2 == 0 else "assistant"
        messages.append(
            message(
                f"m{number:02d}",
                None if parent is None else f"m{parent:02d}",
                role=draw(st.sampled_from([role] * 9 + ["assistant"])),
                deleted=draw(st.sampled_from([False] * 9 + [True])),
                rank=draw(st.sampled_from([None, 0, 1, 2])),
            )
        )
    lost = [message(f"l{n:02d}", draw(st.sampled_from(["gone", "l00", "l01"]))) for n in range(3)]
    copies = draw(st.lists(st.sampled_from(messages), max_size=3))
    return [*messages, *draw(st.sampled_from([[], lost])), *copies]


def read(messages, **keys):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "m.jsonl")
        path.write_bytes(json_lines(messages))
        rows, counts, _ = read_oasst(path, Path(name, "build"), **keys)
    return [{**row, "revision": ""} for row in rows], counts


def survivors(messages):
    """Return the ids of what lives by the plain words of the rules, by looking at each alone."""
    by_id = {m["message_id"]: m for m in messages}

    def lives(m, seen=()):
        if m["deleted"] or m["message_id"] in seen:
            return False
        if m["parent_id"] is None:
            return m["role"] == "prompter"
        parent = by_id.get(m["parent_id"])
        return (
            parent is not None
            and parent["role"] != m["role"]
            and lives(parent, (*seen, m["message_id"]))
        )

    return {name for name, m in by_id.items() if lives(m)}


@settings(max_examples=60, deadline=None)
@given(forests(), st.booleans())
def test_every_surviving_answer_is_trained_exactly_once_and_counts_add_up(messages, keep):
    rows, counts = read(messages, keep_user_leaf=keep)

    living = survivors(messages)
    roles = {m["message_id"]: m["role"] for m in messages}
    trained = Counter(name for row in rows for name, train in spoken(row) if train)
    assert trained == Counter(name for name in living if roles[name] == "assistant")
    assert len({row["id"] for row in rows}) == len(rows)
    assert counts.rows_in == len(messages)
    assert counts.used == len({name for row in rows for name, _ in spoken(row)})
    counts.check("oasst")
    for row in rows:
        said = [turn["role"] for turn in row["messages"]]
        assert said == (["user", "assistant"] * len(said))[: len(said)]
        assert len(said) > 1
        assert keep or said[-1] == "assistant"


@settings(max_examples=40, deadline=None)
@given(forests(), st.randoms(use_true_random=False), st.sampled_from(["all_paths", "top1"]))
def test_the_order_of_rows_does_not_matter(messages, random, mode):
    shuffled = random.sample(messages, len(messages))

    assert read(messages, mode=mode) == read(shuffled, mode=mode)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON, st.sampled_from([None, 1]))
def test_the_decoder_for_deep_json_agrees_with_the_standard_one(value, indent):
    text = json.dumps(value, indent=indent)

    assert nested_json._Nested(text, 0).decode() == (value, len(text))


@given(JSON, st.data())
def test_the_decoder_for_deep_json_refuses_what_the_standard_one_refuses(value, data):
    text = json.dumps(value)
    place = data.draw(st.integers(0, len(text) - 1))
    broken = (
        text[:place] + data.draw(st.sampled_from(["", ",", "]", "}", ":", '"'])) + text[place + 1 :]
    )

    def outcome(decode):
        try:
            return repr(decode())
        except ValueError:
            return "refused"

    standard = outcome(lambda: json.JSONDecoder().raw_decode(broken))

    assert outcome(lambda: nested_json._Nested(broken, 0).decode()) == standard
