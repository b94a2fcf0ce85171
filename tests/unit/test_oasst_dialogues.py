"""Trees become dialogues: which turns survive, which are trained, and where each message went."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import PreflightError, RecipeError, SourceError
from pipelines.recipe import load_recipe
from pipelines.settings.sources import OasstSource
from pipelines.sources import check_sources
from pipelines.sources.oasst import rows as rows_module
from pipelines.sources.oasst import trees as trees_module
from pipelines.sources.oasst.rules import code_sign, code_words, speaks
from tests.assets.curation import curation_recipe, rows_of, run_stages, write_files
from tests.assets.oasst import json_lines, message, nest, oasst_source, read_oasst, spoken

# Ids end in their depth. p0 has two answers; a1 goes on in two ways, c3 ends with an open question.
TREE = [
    message("p0", created_date="2023-02-01T00:00:00", user_id="ada"),
    message("a1", "p0", rank=0, user_id="bob"),
    message("b1", "p0", rank=1),
    message("a2", "a1"),
    message("b2", "a1"),
    message("c2", "a1"),
    message("a3", "a2", rank=1, created_date="2023-02-04T00:00:00", user_id="ada"),
    message("b3", "a2", rank=0),
    message("c3", "b2"),
    message("a4", "c3"),
]


def read(tmp_path, messages, **keys):
    folder = write_files(tmp_path / "raw", {"m.jsonl": json_lines(messages)})
    return read_oasst(folder / "m.jsonl", tmp_path / "build", **keys)


def turns(rows):
    return [" ".join(f"{name}{'*' * trained}" for name, trained in spoken(row)) for row in rows]


def test_each_answer_that_no_other_follows_ends_a_dialogue_and_is_trained_once(tmp_path):
    rows, counts, made = read(tmp_path, TREE)

    assert turns(rows) == ["p0 a1* a2 b3*", "p0 a1 a2 a3*", "p0 a1 b2 c3*", "p0 b1*"]
    assert (counts.rows_in, counts.used, counts.rows_out) == (10, 8, 4)
    assert counts.dropped == {"user_leaf": 2}
    assert counts.quarantined == {}
    assert made.about == {"files": 1, "mode": "all_paths", "about_code": 0}
    assert rows[1] == {
        "id": "o:a3",
        "group": "o:p0",
        "source": "o",
        "revision": rows[0]["revision"],
        "url": None,
        "author": "ada, bob",
        "license": "Apache-2.0",
        "created": "2023-02-04T00:00:00",
        "score": None,
        "messages": [
            {"role": "user", "content": "text of p0", "train": False},
            {"role": "assistant", "content": "text of a1", "train": False},
            {"role": "user", "content": "text of a2", "train": False},
            {"role": "assistant", "content": "text of a3", "train": True},
        ],
        "prompt": None,
        "completion": None,
        "text": None,
        "meta": (
            '{"code":null,"labels":{},"langs":["en","en","en","en"],"leaf_id":"a3",'
            '"message_ids":["p0","a1","a2","a3"],"ranks":[null,0,null,1],"tree_id":"p0"}'
        ),
    }


def test_open_questions_are_kept_at_the_end_as_in_the_seed_s_sample(tmp_path):
    rows, counts, _ = read(tmp_path, TREE, keep_user_leaf=True)

    assert turns(rows) == [
        "p0 a1* c2", "p0 a1 a2 b3*", "p0 a1 a2 a3*", "p0 a1 b2 c3* a4", "p0 b1*",
    ]  # fmt: skip
    assert counts.used == counts.rows_in == 10
    assert [m["role"] for m in rows[3]["messages"]] == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip


def test_modes_follow_the_best_ranked_answers_and_an_only_answer_needs_no_rank(tmp_path):
    best, counts, _ = read(tmp_path / "1", TREE, mode="top1")
    two, _, _ = read(tmp_path / "2", TREE, mode="topk", top_k=2)
    unranked = [*TREE, message("d3", "b2")]
    rest, less, _ = read(tmp_path / "3", unranked, mode="topk", top_k=5)

    assert turns(best) == ["p0 a1* a2 b3*", "p0 a1 b2 c3*"]
    assert counts.dropped == {"beyond_top_k": 2, "user_leaf": 2}
    assert turns(two) == ["p0 a1* a2 b3*", "p0 a1 a2 a3*", "p0 a1 b2 c3*", "p0 b1*"]
    assert turns(rest) == ["p0 a1* a2 b3*", "p0 a1 a2 a3*", "p0 b1*"]
    assert less.dropped == {"cut_off": 1, "unranked": 2, "user_leaf": 2}


def test_each_trained_answer_has_those_ranked_below_it_whatever_the_mode_keeps(tmp_path):
    rows, _, _ = read(tmp_path / "1", [*TREE, message("e1", "p0", deleted=True, rank=9)])
    assert not any("rejected" in json.loads(row["meta"]) for row in rows)

    for mode in ({}, {"mode": "top1"}):
        rows, _, _ = read(tmp_path / f"2{len(mode)}", TREE, pairs=True, **mode)
        found = {
            (json.loads(row["meta"])["message_ids"][each["turn"]], each["id"])
            for row in rows
            for each in json.loads(row["meta"]).get("rejected", ())
        }
        assert found == {("a1", "b1"), ("b3", "a3")}
    worse = json.loads(rows[0]["meta"])["rejected"]
    assert worse[0] == {"turn": 1, "id": "b1", "rank": 1, "text": "text of b1"}


@pytest.mark.parametrize(
    ("fields", "reason", "allowed"),
    [
        ({"deleted": True}, "deleted", None),
        ({"synthetic": True, "model_name": "chip"}, "synthetic", {"allow_synthetic": True}),
        ({"review_result": False}, "failed_review", {"allow_failed_review": True}),
        ({"tree_state": "growing"}, "tree_state", {"tree_states": []}),
        ({"lang": "de"}, "language:de", {"languages": ["en", "de"]}),
        ({"labels": {"spam": {"value": 0.6}}}, "label:spam", {"max_labels": {"spam": 0.6}}),
        ({"labels": {"toxicity": 0.7}}, "label:toxicity", {"max_labels": {"toxicity": 0.7}}),
        ({"labels": {"pii": {"value": 1}}}, "label:pii", {"max_labels": {"pii": 1}}),
        ({"labels": {"quality": {"value": 0.2}}}, "label:quality", {"min_quality": 0.2}),
        ({"role": "prompter"}, "not_alternating", None),
    ],
)
def test_a_message_that_a_rule_objects_to_goes_with_all_that_follows(
    tmp_path, fields, reason, allowed
):
    messages = [{**m, **fields} if m["message_id"] == "a1" else m for m in TREE]

    rows, counts, _ = read(tmp_path / "a", messages)

    assert turns(rows) == ["p0 b1*"]
    assert counts.dropped | counts.quarantined == {reason: 1, "cut_off": 7}
    assert bool(counts.quarantined) == (reason == "not_alternating")
    if allowed is not None:
        rows, _, _ = read(tmp_path / "b", messages, **allowed)
        assert len(rows) == 4


def test_what_the_data_does_not_tell_is_no_objection(tmp_path):
    bare = [{k: m[k] for k in ("message_id", "parent_id", "text", "role")} for m in TREE]

    rows, _, _ = read(tmp_path, bare)

    assert len(rows) == 4
    assert json.loads(rows[0]["meta"])["langs"] == [None] * 4


def test_trees_without_an_answer_and_roots_that_answer_are_accounted_for(tmp_path):
    alone = [message("x0"), message("y1", role="assistant"), message("y2", "y1")]

    rows, counts, _ = read(tmp_path, alone)

    assert rows == []
    assert counts.dropped == {"cut_off": 1, "unanswered": 1}
    assert counts.quarantined == {"not_alternating": 1}


def test_labels_ranks_models_and_signs_of_code_are_summed_up_in_meta(tmp_path):
    asked = message("p0", text="How do I debug Python?", labels={"quality": {"value": 0.5}})
    told = message("a1", "p0", model_name="chip", synthetic=True, labels={"quality": {"value": 1}})

    rows, _, made = read(tmp_path, [asked, told], allow_synthetic=True, openai_outputs=True)

    meta = json.loads(rows[0]["meta"])
    assert (meta["labels"], meta["code"]) == ({"quality": [0.5, 1.0]}, "words")
    assert (meta["models"], meta["openai_outputs"], rows[0]["score"]) == (["chip"], True, 1.0)
    assert made.about["about_code"] == 1


def test_code_shows_by_a_fence_or_by_two_words():
    def sign(*texts):
        return code_sign(code_words(text) for text in texts)

    assert sign("Hello", "so:\n```py\nx\n```") == "fence"
    assert sign("Is Python or C++ better?") == "words"
    assert sign("I use Python", "and SQL") == "words"
    assert sign("I saw a python in the zoo") is None
    assert sign() is None


def test_languages_match_by_tag_or_by_its_first_part():
    assert speaks("pt-BR", ["pt"])
    assert speaks("uk_UA", ["uk-ua"])
    assert speaks(None, ["en"])
    assert speaks("xx", [])
    assert not speaks("eng", ["en"])


def as_hub_row(message):
    """A row of the hub's table: labels as parallel lists, a table's NaN for no rank."""
    labels = message.get("labels")
    pairs = {"name": list(labels), "value": [v["value"] for v in labels.values()]} if labels else {}
    return {
        **{key: message.get(key) for key in ("message_id", "parent_id", "text", "role", "lang")},
        "rank": float(message.get("rank", "nan")),
        "labels": pairs or None,
        "emojis": {"name": ["+1"], "count": [2]},
        "message_tree_id": "p0",
        "tree_state": "ready_for_export",
    }


def test_every_layout_and_file_type_gives_the_same_dialogues(tmp_path):
    messages = [{**m, "labels": {"quality": {"value": 0.75, "count": 3}}} for m in TREE]
    trees = nest(messages)
    hub = [as_hub_row(m) for m in messages]
    seed = [
        {
            "task_message_id": f"t{m['message_id']}",
            "user_message_id": m["message_id"],
            "parent_message_id": m["parent_id"],
            "text": m["text"],
            "role": m["role"],
        }
        for m in messages
    ]
    folder = tmp_path / "raw"
    write_files(
        folder,
        {
            "flat.jsonl": json_lines(messages[::-1]),
            "trees.jsonl.gz": gzip.compress(json_lines(trees)),
            "trees.json": json.dumps(trees, indent=1),
            "nodes.jsonl": json_lines(tree["prompt"] for tree in trees),
            "one.json": json.dumps(trees[0]),
            "hub.jsonl": json_lines(hub),
            "bom.jsonl": b"\xef\xbb\xbf" + json_lines(messages),
            "seed.json": json.dumps(seed),
        },
    )
    pq.write_table(pa.Table.from_pylist(hub), folder / "hub.parquet")

    read_in = {
        path.name: read_oasst(path, tmp_path / path.name) for path in sorted(folder.iterdir())
    }

    expected = turns(read_in["flat.jsonl"][0])
    for name, (rows, counts, _) in read_in.items():
        dialogues = [(row["id"], row["group"], row["messages"]) for row in rows]
        assert counts.rows_in == counts.used + 2 == 10, name
        if name == "seed.json":  # has no ranks: the answers come in the order of their ids
            assert sorted(row["id"] for row in rows) == ["o:a3", "o:b1", "o:b3", "o:c3"]
        else:
            assert turns(rows) == expected, name
            assert dialogues == [
                (row["id"], row["group"], row["messages"]) for row in read_in["flat.jsonl"][0]
            ]


def test_a_folder_of_copies_gives_each_message_once_and_counts_the_others(tmp_path):
    trees = nest(TREE)
    folder = write_files(
        tmp_path / "raw",
        {
            "a/flat.jsonl": json_lines(TREE),
            "b/trees.jsonl": json_lines(trees),
            "SOURCE.txt": "read me not",
            "texts.jsonl": '"just text"\n',
        },
    )

    rows, counts, made = read_oasst(folder, tmp_path / "build")

    assert len(rows) == 4
    assert counts.rows_in == 21
    assert counts.quarantined == {"duplicate_id": 10, "not_an_object": 1}
    # The tree's copy says which tree it is of, so it is the fuller one.
    assert json.loads(rows[0]["meta"])["tree_id"] == "p0"
    assert made.reports[0].rejects[0] == {
        "id": "o:texts.jsonl line 1",
        "reason": "not_an_object",
        "detail": "expected a message or tree, got a str",
    }


BAD = {
    b"{": "invalid_json",
    b'{"a": 1} x': "invalid_json",
    b"[1]": "not_an_object",
    b"\xff{}": "invalid_utf8",
    b'{"x": 1}': "unknown_layout",
    b'{"text": "t", "role": "assistant"}': "missing_id",
    b'{"message_id": "m", "role": "assistant"}': "missing_text",
    b'{"message_id": "m", "text": "t"}': "missing_role",
    b'{"message_id": "m", "text": "t", "role": "bot"}': "unknown_role",
    b'{"message_id": "m", "text": " ", "role": "assistant"}': "empty_text",
    b'{"message_id": "m", "text": "\\u0000", "role": "assistant"}': "bad_text",
    b'{"message_id": "m", "text": "\\ud800", "role": "assistant"}': "bad_text",
    b'{"message_id": "m", "text": ["t"], "role": "assistant"}': "bad_field",
    b'{"message_id": {}, "text": "t", "role": "assistant"}': "bad_field",
    b'{"message_id": "\\ud800", "text": "t", "role": "assistant"}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "rank": 1.5}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "rank": 1e400}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "rank": true}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "deleted": "no"}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "labels": [1]}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "labels": {"spam": "x"}}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "labels": '
    b'{"name": ["spam"], "value": []}}': "bad_field",
    b'{"message_id": "m", "text": "t", "role": "assistant", "parent_id": "gone"}': "orphan",
    b'{"message_id": "a1", "text": "other", "role": "assistant"}': "duplicate_id",
}


def test_every_bad_row_is_quarantined_with_its_reason_and_the_others_are_used(tmp_path):
    content = b"\n".join([*BAD, b"", json_lines(TREE)])
    folder = write_files(tmp_path / "raw", {"m.jsonl": content})

    rows, counts, made = read_oasst(folder, tmp_path / "build")

    expected = {reason: list(BAD.values()).count(reason) for reason in sorted(set(BAD.values()))}
    assert turns(rows) == ["p0 a1* a2 b3*", "p0 a1 a2 a3*", "p0 a1 b2 c3*", "p0 b1*"]
    assert counts.quarantined == expected
    assert counts.rows_in == len(BAD) + len(TREE)
    assert {r["reason"] for r in made.reports[0].rejects} == {*BAD.values(), "user_leaf"}


def test_replies_of_a_bad_message_are_orphans_and_what_follows_them_is_cut_off(tmp_path):
    [tree] = nest(TREE)
    tree["prompt"]["replies"][0]["text"] = None
    tree["prompt"]["replies"][1]["replies"] = "none"

    rows, counts, _ = read(tmp_path, [tree])

    assert turns(rows) == ["p0 b1*"]
    assert counts.quarantined == {"bad_field": 1, "missing_text": 1, "orphan": 3}
    assert counts.dropped == {"cut_off": 4}
    assert counts.rows_in == 11


def test_messages_that_answer_themselves_are_cycles(tmp_path):
    round_ = [message("c0", "c1"), message("c1", "c0"), message("d0", "d0"), message("e1", "d0")]

    rows, counts, _ = read(tmp_path, [*TREE, *round_])

    assert len(rows) == 4
    assert counts.quarantined == {"cycle": 3}
    assert counts.dropped == {"cut_off": 1, "user_leaf": 2}


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_a_dialogue_of_three_thousand_turns_is_read_like_any_other(tmp_path, layout):
    depth = 3000
    chain = [message("m0000")]
    chain += [message(f"m{n:04d}", f"m{n - 1:04d}") for n in range(1, depth)]
    if layout == "tree":
        text = '{"prompt": '
        for m in chain:
            text += json.dumps(m)[:-1] + ', "replies": ['
        content = text + "]}" * depth + "}\n"
    else:
        content = json_lines(chain[::-1]).decode()
    folder = write_files(tmp_path / "raw", {"m.jsonl": content})

    rows, counts, _ = read_oasst(folder, tmp_path / "build")

    assert [len(row["messages"]) for row in rows] == [depth]
    assert counts.used == depth


def test_values_nested_three_thousand_deep_are_counted_and_never_shown(tmp_path):
    deep = "[" * 3000 + "]" * 3000
    bad = [
        f'{{"message_id": "x0", "text": {deep}, "role": "prompter"}}',
        f'{{"message_id": "x0", "text": "t", "role": "prompter", "labels": {deep}}}',
        f'{{"message_id": "x0", "text": "t", "role": "prompter", "replies": {deep}}}',
        deep,
        "[" * 3000,
    ]
    folder = write_files(
        tmp_path / "raw", {"m.jsonl": "\n".join(bad).encode() + b"\n" + json_lines(TREE)}
    )

    rows, counts, _ = read_oasst(folder, tmp_path / "build")

    assert len(rows) == 4
    assert counts.quarantined == {"bad_field": 2, "invalid_json": 1, "not_an_object": 2}
    assert counts.dropped == {"unanswered": 1, "user_leaf": 2}


def test_a_line_without_end_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 400)
    content = b'{"text": "' + b"x" * 1000 + b'"}\n' + json_lines(TREE)

    rows, counts, _ = read_oasst(
        write_files(tmp_path / "raw", {"m.jsonl": content}), tmp_path / "build"
    )

    assert (len(rows), counts.quarantined) == (4, {"long_line": 1})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.jsonl.gz", gzip.compress(json_lines(TREE), mtime=0)[:-20], "damaged or cut short"),
        ("m.jsonl.gz", b"plain", "damaged or cut short"),
        ("m.json", b'[{"message_id": "a"', r"not valid JSON \(Expecting ',' delimiter: line 1"),
        ("m.json", b'[{"message_id": "a"}', "not valid JSON"),
        ("m.json", b"\xff", "not UTF-8 text"),
        ("m.parquet", b"PAR1", "no readable Parquet file after row 0"),
        ("m.jsonl", b"", "no OpenAssistant message in m.jsonl; expected trees"),
        ("m.jsonl", b'{"prompt": "p"}\n', "the first of the others is o:m.jsonl line 1: keys: p"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error_that_says_what_and_why(
    tmp_path, name, content, said
):
    folder = write_files(tmp_path / "raw", {name: content})

    with pytest.raises(SourceError, match=said) as caught:
        read_oasst(folder, tmp_path / "build")

    assert name in str(caught.value)


def test_a_missing_license_stops_the_run_unless_it_is_allowed(tmp_path):
    with pytest.raises(SourceError) as caught:
        read(tmp_path / "a", TREE, license=None)
    rows, _, _ = read(tmp_path / "b", TREE, license=None, allow_unlicensed=True)

    assert str(caught.value) == (
        "source 'o': no license found for m.jsonl; say which one it has with sources.0.license, "
        "e.g. license: Apache-2.0, or set sources.0.allow_unlicensed: true"
    )
    assert {row["license"] for row in rows} == {"unknown"}


@pytest.mark.parametrize("limit", [1, 3, 4, 100])
def test_a_cap_keeps_the_first_dialogues_and_counts_the_messages_left_out(
    tmp_path, monkeypatch, limit
):
    monkeypatch.setattr(trees_module, "MESSAGES_PER_SHARD", 10)
    trees = [
        {**m, **{k: f"{n}{m[k]}" for k in ("message_id", "parent_id") if m[k]}}
        for n in range(3)
        for m in TREE
    ]
    every, _, _ = read(tmp_path / "all", trees)

    rows, counts, made = read(tmp_path / "some", trees, limit=limit)

    assert rows == every[:limit]
    assert counts.rows_in == 30
    assert len(made.reports) == min((limit + 3) // 4, 3)


def test_the_result_is_the_same_for_any_number_of_workers_and_shards_number_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trees_module, "MESSAGES_PER_SHARD", 10)
    other = [{**m, "message_id": f"x{m['message_id']}"} for m in TREE if m["parent_id"] is None]
    other.append(message("xa1", "xp0"))
    folder = write_files(
        tmp_path / "raw",
        {"a.jsonl": json_lines(TREE), "b.jsonl": json_lines(other)},
    )
    sources = [oasst_source(folder), oasst_source(folder, id="again")]
    recipe = curation_recipe(*sources)

    store, refs = run_stages(tmp_path / "one", recipe, until="collect", workers=1)
    _, more = run_stages(tmp_path / "two", recipe, until="collect", workers=2)

    manifest = store.manifest(refs["collect"])
    assert refs["collect"].digest == more["collect"].digest
    assert [(shard.file, shard.rows) for shard in manifest.shards] == [
        (f"records-{number:05d}.parquet", rows) for number, rows in enumerate([4, 1, 4, 1])
    ]
    assert [row["source"] for row in rows_of(store, refs["collect"])] == ["o"] * 5 + ["again"] * 5
    assert manifest.counts.rows_in == 24
    assert set(manifest.report["samples"]) == {"user_leaf"}


def test_settings_that_do_not_fit_together_are_named(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {config: {}}\ntokenizer: {train_vocab_size: 512}\nsources:\n"
        "  - {type: oasst, id: o, path: x, top_k: 2}\n"
        "  - {type: oasst, id: p, path: x, mode: topk}\n"
        "  - {type: oasst, id: q, path: x, max_labels: {spam: 2}, keep_leaf: true}\n"
    )

    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe))

    assert "sources.0: mode: topk needs a number top_k, and top_k needs mode: topk" in str(
        caught.value
    )
    assert "sources.1: mode: topk needs" in str(caught.value)
    assert "sources.2.max_labels.spam" in str(caught.value)
    assert "sources.2.keep_leaf: unknown key, did you mean 'keep_user_leaf'?" in str(caught.value)


def test_what_cannot_be_read_here_is_said_before_the_run(tmp_path):
    (tmp_path / "m.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    recipe = curation_recipe(
        {"type": "oasst", "id": "a"},
        oasst_source(tmp_path / "gone", id="b"),
        oasst_source(tmp_path / "m.csv", id="c"),
    )

    with pytest.raises(PreflightError) as caught:
        check_sources(recipe)
    with pytest.raises(SourceError, match=r"no files in .*empty that end in .jsonl"):
        read_oasst(tmp_path / "empty", tmp_path / "build")

    suffixes = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet"
    assert str(caught.value) == (
        "sources.0: name a hub `dataset:`, e.g. OpenAssistant/oasst1, or a local `path:`; "
        f"sources.1: path {str(tmp_path / 'gone')!r} is not here; "
        f"give a folder or a file ({suffixes}); "
        f"sources.2: path {str(tmp_path / 'm.csv')!r}: give a folder or a file ({suffixes})"
    )


def test_globs_choose_among_the_files_of_a_folder(tmp_path):
    folder = write_files(
        tmp_path / "raw", {"x_ready.jsonl": json_lines(TREE), "x_spam.jsonl": json_lines(TREE)}
    )

    rows, counts, _ = read_oasst(folder, tmp_path / "build", files=["*_ready.jsonl"])

    assert (len(rows), counts.rows_in) == (4, 10)
    assert OasstSource.model_validate(oasst_source(folder)).files == ()


def test_the_hundred_real_trees_give_the_known_numbers(tmp_path, real_data):
    folder = real_data / "oasst_en100_trees"
    path = folder / "en_100_tree.jsonl"

    every, counts, _ = read_oasst(path, tmp_path / "1", allow_synthetic=True, keep_user_leaf=True)
    rows, less, _ = read_oasst(path, tmp_path / "2")
    nodes, _, _ = read_oasst(folder / "en_100_message.jsonl", tmp_path / "3")

    assert (counts.rows_in, counts.used, len(every)) == (1167, 1167, 626)
    assert sum(row["messages"][-1]["role"] == "user" for row in every) == 226
    assert len({row["group"] for row in every}) == 100
    assert less.dropped == {"cut_off": 17, "synthetic": 5, "user_leaf": 226}
    assert len(rows) == 529
    trained = [name for row in rows for name, train in spoken(row) if train]
    assert len(trained) == len(set(trained)) == 687 - 17
    assert [row["messages"] for row in nodes] == [row["messages"] for row in rows]


def test_the_real_seed_messages_are_read_from_their_own_layout(tmp_path, real_data):
    rows, counts, _ = read_oasst(real_data / "oasst_seed_messages", tmp_path)

    assert (counts.rows_in, len(rows)) == (454, 143)
    assert counts.quarantined == {"not_alternating": 1}
    assert counts.dropped == {"cut_off": 78, "tree_state": 7, "user_leaf": 4}
