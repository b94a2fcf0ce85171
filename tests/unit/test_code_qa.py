"""Questions on code are read from files, or written by a model once and within a budget."""

import csv
import hashlib
import io
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import PreflightError, RecipeError, SourceError
from pipelines.recipe import load_recipe
from pipelines.settings.sources import CodeQaSource
from pipelines.sources import check_sources
from pipelines.sources.code_qa import chat
from pipelines.sources.code_qa.generate import REQUEST
from pipelines.sources.code_qa.pairs import fence
from pipelines.sources.fetch import fetch_source, raw_folder
from tests.assets.chat_server import chat_server, completion, pairs
from tests.assets.curation import curation_recipe, rows_of, run_stages, write_files

ROW = {"code": "x = 1\n", "question": "What is x?", "answer": "It is one."}
GROUP = f"qa:{hashlib.sha256(b'x = 1').hexdigest()[:16]}"


def qa_source(path=None, **keys):
    where = {} if path is None else {"path": str(path)}
    return {"type": "code-qa", "id": "qa", "license": "MIT", **where, **keys}


def collect(tmp_path, *sources, workers=1):
    recipe = curation_recipe(*sources)
    store, refs = run_stages(tmp_path / "store", recipe, until="collect", workers=workers)
    return rows_of(store, refs["collect"]), store.manifest(refs["collect"])


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_row_becomes_a_question_with_fenced_code_and_its_answer(tmp_path):
    row = {
        **ROW,
        "id": 7,
        "url": "https://example.org/x.py",
        "license": "bsd-3-clause",
        "author": "Ada",
        "language": "Python",
        "created": "2024-01-01",
        "split": "test",
    }
    folder = write_files(tmp_path / "raw", {"qa.jsonl": lines(row)})

    [record], manifest = collect(tmp_path, qa_source(folder))

    assert record == {
        "id": "qa:qa.jsonl:7",
        "group": GROUP,
        "source": "qa",
        "revision": manifest.report["sources"]["qa"]["revision"],
        "url": "https://example.org/x.py",
        "author": "Ada",
        "license": "BSD-3-Clause",
        "created": "2024-01-01",
        "score": None,
        "messages": None,
        "prompt": "What is x?\n\n```python\nx = 1\n```",
        "completion": "It is one.",
        "text": None,
        "meta": '{"file":"qa.jsonl","language":"python","row":1,"split":"test"}',
    }
    about = manifest.report["sources"]["qa"]
    assert (about["files"], about["rows"], about["generated"]) == (1, 1, False)
    assert about["licenses"] == {"BSD-3-Clause": 1}


@pytest.mark.parametrize("code", ["code", "snippet", "context", "function"])
@pytest.mark.parametrize(
    ("question", "answer"), [("question", "response"), ("Prompt", "Completion")]
)
def test_columns_are_found_by_their_usual_names(tmp_path, code, question, answer):
    row = {code: ROW["code"], question: ROW["question"], answer: ROW["answer"]}
    folder = write_files(tmp_path / "raw", {"qa.jsonl": lines(row)})

    [record], _ = collect(tmp_path, qa_source(folder))

    assert record["prompt"] == "What is x?\n\n```\nx = 1\n```"
    assert record["completion"] == "It is one."


def test_columns_with_other_names_are_named_in_the_settings(tmp_path):
    folder = write_files(tmp_path / "raw", {"qa.jsonl": lines({"a": "y", "b": "q", "c": "r"})})
    columns = {"code": "a", "question": "b", "answer": "c"}

    [record], _ = collect(tmp_path, qa_source(folder, columns=columns, language="c++"))

    assert (record["prompt"], record["completion"]) == ("q\n\n```c++\ny\n```", "r")


def test_every_file_type_gives_the_same_pairs(tmp_path):
    rows = [{**ROW, "answer": f"Answer {number}."} for number in range(3)]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(ROW))
    writer.writeheader()
    writer.writerows(rows)
    folder = write_files(
        tmp_path / "raw",
        {"a.jsonl": lines(*rows), "b.json": json.dumps(rows, indent=1), "c.csv": table.getvalue()},
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")

    made, manifest = collect(tmp_path, qa_source(folder))
    again, _ = collect(tmp_path / "2", qa_source(folder), workers=2)

    assert made == again
    assert manifest.counts.rows_in == manifest.counts.used == len(made) == 12
    for start in (0, 3, 6, 9):
        assert [row["completion"] for row in made[start : start + 3]] == [
            "Answer 0.", "Answer 1.", "Answer 2.",
        ]  # fmt: skip
    assert len({row["id"] for row in made}) == 12
    assert {row["group"] for row in made} == {GROUP}


def test_a_fence_is_longer_than_any_in_the_code():
    assert fence("\n\ndoc = '''\n````\n'''\n", "") == "`````\ndoc = '''\n````\n'''\n`````"


BAD = {
    "{": "invalid_json",
    "[1]": "not_an_object",
    "\udcff": "invalid_utf8",
    json.dumps({**ROW, "code": " "}): "empty_code",
    json.dumps({**ROW, "question": None}): "empty_question",
    json.dumps({**ROW, "answer": ""}): "empty_answer",
    json.dumps({**ROW, "answer": 3}): "not_text",
    json.dumps({**ROW, "code": "\0"}): "unstorable_text",
    json.dumps({**ROW, "code": "\ud800"}): "unstorable_text",
    json.dumps({"question": "q", "answer": "a"}): "missing_code",
    '{"code": ' + "[" * 3000 + "]" * 3000 + "}": "nested_too_deep",
}


def test_every_bad_row_is_quarantined_with_its_reason_and_the_others_are_used(tmp_path):
    content = "\n".join([*BAD, json.dumps(ROW), ""]).encode("utf-8", "surrogateescape")
    folder = write_files(tmp_path / "raw", {"qa.jsonl": content})

    rows, manifest = collect(tmp_path, qa_source(folder))

    reasons = {reason: list(BAD.values()).count(reason) for reason in BAD.values()}
    assert [row["id"] for row in rows] == [f"qa:qa.jsonl:{len(BAD) + 1}"]
    assert manifest.counts.quarantined == reasons
    assert manifest.counts.rows_in == len(BAD) + 1
    assert set(manifest.report["samples"]) == set(reasons)


def test_ids_that_rows_share_are_told_apart(tmp_path):
    folder = write_files(
        tmp_path / "raw", {"qa.jsonl": lines({**ROW, "id": "a"}, {**ROW, "id": "a"})}
    )

    rows, _ = collect(tmp_path, qa_source(folder))

    assert [row["id"] for row in rows] == ["qa:qa.jsonl:a", "qa:qa.jsonl:a~2"]


@pytest.mark.parametrize("limit", [1, 2, 4, 9])
def test_a_cap_keeps_the_first_pairs_and_counts_the_rows_left_out(tmp_path, limit):
    rows = lines(*({**ROW, "answer": f"Answer {number}."} for number in range(2)))
    folder = write_files(tmp_path / "raw", {"a.jsonl": rows, "b.jsonl": rows})

    made, manifest = collect(tmp_path, qa_source(folder, max_records=limit))

    assert len(made) == manifest.counts.used == min(limit, 4)
    assert manifest.counts.rows_in == 4
    assert manifest.counts.dropped == ({"max_records": 4 - limit} if limit < 4 else {})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"qa.jsonl": lines({"x": 1})}, r"qa.jsonl: no row has code, question and answer \(row 1"),
        ({"qa.jsonl": ""}, "no rows in qa.jsonl"),
        ({"qa.parquet": b"PAR1"}, "damaged or no parquet file"),
        ({"qa.txt": "x"}, "no data files"),
    ],
)
def test_a_file_without_pairs_is_one_error_that_says_what_was_expected(tmp_path, files, said):
    folder = write_files(tmp_path / "raw", files)

    with pytest.raises(SourceError, match=said):
        collect(tmp_path, qa_source(folder))


def test_a_missing_license_stops_the_run_unless_it_is_allowed(tmp_path):
    folder = write_files(tmp_path / "raw", {"qa.jsonl": lines(ROW)})

    with pytest.raises(SourceError) as caught:
        collect(tmp_path, qa_source(folder, license=None))
    [row], _ = collect(tmp_path / "2", qa_source(folder, license=None, allow_unlicensed=True))

    assert str(caught.value) == (
        "source 'qa': no license found for row 1 of qa.jsonl; say which one it has with "
        "sources.0.license, e.g. license: BSD-3-Clause, or set sources.0.allow_unlicensed: true"
    )
    assert row["license"] == "unknown"


# Written by a model


def functions(count):
    """A module of documented functions f0, f1, ..."""
    return "".join(
        f'def f{number}(x):\n    """Return x plus {number}."""\n    return x + {number}\n\n\n'
        for number in range(count)
    )


@pytest.fixture
def code(tmp_path):
    """A folder with three documented functions under a license."""
    return write_files(
        tmp_path / "code",
        {"LICENSE": "Permission is hereby granted, free of charge, to any", "m.py": functions(3)},
    )


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that were waited for, without waiting."""
    waited = []
    monkeypatch.setattr(chat, "sleep", waited.append)
    return waited


def written(code, endpoint, **keys):
    return qa_source(
        code={"type": "repository", "path": str(code)},
        endpoint=endpoint,
        model="small",
        license=None,
        **keys,
    )


def fetch(settings, *, refresh=True):
    return fetch_source(CodeQaSource.model_validate(settings), refresh=refresh)


OK = (200, completion(pairs("why", "how")), {})


def test_a_model_is_asked_about_each_function_and_its_pairs_keep_their_provenance(tmp_path, code):
    with chat_server(OK) as (server, endpoint):
        settings = written(code, endpoint)
        fetched = fetch(settings)
        rows, manifest = collect(tmp_path, settings)

    assert fetched.changed
    assert fetched.summary == "6 pairs on 3 functions, 3 new requests"
    assert fetched.counts == {
        "functions": 3,
        "pairs": 6,
        "bad_replies": 0,
        "requests": 3,
        "requests_in_all": 3,
        "tokens_in_all": 300,
        "functions_left": 0,
    }
    body = server.asked[0]
    assert {key: body[key] for key in body if key != "messages"} == {
        "model": "small", "temperature": 0.7, "max_tokens": 1024, "seed": 42,
    }  # fmt: skip
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == REQUEST.format(
        count=2, code="```python\ndef f0(x):\n    \n    return x + 0\n```"
    )
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert "authorization" not in server.headers[0]
    assert [row["completion"] for row in rows] == ["why!", "how!"] * 3
    first = rows[0]
    meta = json.loads(first["meta"])
    assert len(meta.pop("prompt_digest")) == 16
    assert meta == {
        "file": "pairs.jsonl",
        "row": 1,
        "language": "python",
        "generated": True,
        "model": "small",
        "endpoint": "127.0.0.1",
    }
    assert first["id"] == "qa:pairs.jsonl:qa-code:m.py::f0/0"
    assert first["group"] == "qa:qa-code:m.py"
    assert first["prompt"] == "why?\n\n```python\ndef f0(x):\n    \n    return x + 0\n```"
    assert (first["license"], first["url"]) == ("MIT", "m.py#L1-L3")
    assert first["created"]
    assert manifest.report["sources"]["qa"]["generated"] is True


def test_what_was_answered_is_not_asked_again_and_only_changed_code_is(tmp_path, code):
    with chat_server(OK) as (server, endpoint):
        settings = written(code, endpoint)
        fetch(settings)
        again = fetch(settings)
        once = fetch(settings, refresh=False)
        assert len(server.asked) == 3

        write_files(code, {"m.py": functions(4).replace("x + 1", "1 + x").replace("x + 2", "x")})
        changed = fetch(settings)
        rows, _ = collect(tmp_path, settings)

    assert (again.changed, once) == (False, None)
    assert again.summary == "6 pairs on 3 functions, 0 new requests"
    assert changed.summary == "8 pairs on 4 functions, 3 new requests"
    assert len(server.asked) == 6
    assert "1 + x" in rows[2]["prompt"]


def test_the_budget_of_requests_is_kept_over_all_runs_and_a_higher_one_goes_on(code):
    with chat_server(OK) as (server, endpoint):
        first = fetch(written(code, endpoint, max_requests=2))
        same = fetch(written(code, endpoint, max_requests=2))
        assert len(server.asked) == 2
        more = fetch(written(code, endpoint, max_requests=50))

    assert first.summary == "4 pairs on 2 functions, 2 new requests; budget spent, 1 functions left"
    assert (same.changed, same.counts["requests"]) == (False, 0)
    assert more.summary == "6 pairs on 3 functions, 1 new requests"
    assert len(server.asked) == 3


def test_retries_count_as_requests(code, pauses):
    with chat_server((503, {}, {})) as (server, endpoint):
        fetched = fetch(written(code, endpoint, max_requests=4))

    assert len(server.asked) == 4
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    assert (
        fetched.summary == "0 pairs on 0 functions, 4 new requests; budget spent, 3 functions left"
    )


def test_the_budget_of_tokens_is_never_exceeded(code):
    with chat_server((200, completion(pairs("why"), tokens=900), {})) as (server, endpoint):
        settings = written(code, endpoint, max_tokens=2700, max_answer_tokens=500)
        fetched = fetch(settings)

    # A request may cost all that its answer is allowed: at 1,800 used, a third fits no more.
    assert len(server.asked) == 2
    assert fetched.counts["tokens_in_all"] == 1800
    assert fetched.counts["functions_left"] == 1


def test_replies_that_do_not_tell_their_cost_are_charged_with_the_most_they_can_have(code):
    with chat_server((200, completion(pairs("why"), tokens=None), {})) as (_, endpoint):
        fetched = fetch(written(code, endpoint, max_answer_tokens=500))

    assert fetched.counts["tokens_in_all"] > 3 * 500


def test_a_kill_loses_at_most_the_reply_that_was_on_its_way(tmp_path, code):
    with chat_server(OK) as (server, endpoint):
        settings = written(code, endpoint, max_requests=1)
        fetch(settings)
        journal = raw_folder(CodeQaSource.model_validate(settings)) / "journal.jsonl"
        whole = journal.read_bytes()
        # Killed after the second request was noted, in the middle of writing its reply.
        cut = whole + b'{"request": "x", "reserved": 10}\n' + b'{"reply": "x", "pai'
        journal.write_bytes(cut)

        fetched = fetch(written(code, endpoint, max_requests=4))

    assert len(server.asked) == 3
    assert fetched.counts["requests_in_all"] == 4
    assert fetched.counts["pairs"] == 6
    assert journal.read_bytes().startswith(whole + b'{"request": "x", "reserved": 10}\n{"request"')


def test_a_damaged_journal_says_which_line(code):
    with chat_server(OK) as (_, endpoint):
        settings = written(code, endpoint)
        fetch(settings)
        journal = raw_folder(CodeQaSource.model_validate(settings)) / "journal.jsonl"
        journal.write_bytes(b"{}\n" + journal.read_bytes())

        with pytest.raises(SourceError, match=r"journal.jsonl: line 1 is damaged"):
            fetch(settings)


@pytest.mark.parametrize(
    "busy",
    [
        (429, {}, {"Retry-After": "7"}),
        (500, b"<html>", {}),
        (502, {}, {}),
        (200, b"not json", {}),
        (200, {"choices": []}, {}),
        (None, b"", {}),
    ],
)
def test_a_busy_server_is_asked_again_later(code, pauses, busy):
    with chat_server(busy, busy, OK) as (server, endpoint):
        fetched = fetch(written(code, endpoint))

    assert len(server.asked) == 5
    assert fetched.counts["pairs"] == 6
    assert pauses == ([7.0, 7.0] if busy[0] == 429 else [1.0, 2.0])


def test_a_server_that_stays_busy_is_an_error_and_what_it_said_before_is_kept(code, pauses):
    with chat_server(OK, (503, {}, {})) as (server, endpoint):
        with pytest.raises(SourceError, match=r"no reply after 6 attempts \(HTTP 503\); the"):
            fetch(written(code, endpoint))
        server.answers = [OK]
        fetched = fetch(written(code, endpoint))

    assert (fetched.counts["pairs"], fetched.counts["requests"]) == (6, 2)
    assert sum(pauses) == 1 + 2 + 4 + 8 + 16


BAD_REPLIES = {
    "Sure! {}": "not_json",
    "```json\n{}\n```": "not_json",
    "[" * 3000: "not_json",
    "[]": "no_pairs",
    '{"pairs": []}': "no_pairs",
    '{"pairs": "why"}': "no_pairs",
    pairs("a", "b", "c"): "no_pairs",
    '{"pairs": ["why"]}': "bad_pair",
    '{"pairs": [{"question": "why"}]}': "bad_pair",
    '{"pairs": [{"question": "why", "answer": " "}]}': "bad_pair",
    '{"pairs": [{"question": "why", "answer": 1}]}': "bad_pair",
    '{"pairs": [{"question": "why", "answer": "\\ud800"}]}': "bad_pair",
}


@pytest.mark.parametrize("text", BAD_REPLIES)
def test_a_reply_that_is_not_what_was_asked_for_is_quarantined(tmp_path, code, text):
    bad = (200, completion(text), {})
    with chat_server(OK, bad, OK) as (_, endpoint):
        settings = written(code, endpoint)
        fetched = fetch(settings)
        rows, manifest = collect(tmp_path, settings)

    assert (len(rows), fetched.counts["bad_replies"]) == (4, 1)
    assert manifest.counts.quarantined == {BAD_REPLIES[text]: 1}
    [sample] = manifest.report["samples"][BAD_REPLIES[text]]
    assert "qa-code:m.py::f1" in sample["detail"]


def test_a_reply_that_was_cut_off_and_one_that_is_refused_are_quarantined(tmp_path, code):
    cut = (200, completion(pairs("why"), finish_reason="length"), {})
    refused = (400, {"error": {"message": "too long"}}, {})
    with chat_server(refused, cut, OK) as (server, endpoint):
        settings = written(code, endpoint)
        fetch(settings)
        fetch(settings)
        rows, manifest = collect(tmp_path, settings)

    assert len(server.asked) == 3
    assert len(rows) == 2
    assert manifest.counts.quarantined == {"cut_off": 1, "refused": 1}


def test_an_endpoint_that_refuses_everything_is_an_error_and_nothing_is_given_up(code):
    with chat_server((400, {"error": {"message": "no such\nparameter"}}, {})) as (server, endpoint):
        with pytest.raises(SourceError, match=r"refuses every request \(HTTP 400: no such param"):
            fetch(written(code, endpoint))
        server.answers = [OK]
        fetched = fetch(written(code, endpoint))

    assert fetched.counts["pairs"] == 6


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the key is not accepted"),
        (404, "no such model or address"),
        (302, "unexpected answer"),
        (418, r"unexpected answer; check `endpoint` \(key \*\*\*\)"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_an_error_without_the_key(
    monkeypatch, caplog, code, status, said
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "s3cret\n")
    answer = (status, {"error": {"message": "key s3cret"}}, {"Location": "http://127.0.0.1:9/"})
    with chat_server(answer) as (server, endpoint):
        settings = written(code, endpoint, api_key_env="MY_KEY")
        with pytest.raises(SourceError, match=said) as caught:
            fetch(settings)

    assert [each["authorization"] for each in server.headers] == ["Bearer s3cret"]
    kept = b"".join(
        path.read_bytes()
        for path in raw_folder(CodeQaSource.model_validate(settings)).rglob("*")
        if path.is_file()
    )
    assert "s3cret" not in f"{caught.value}{caplog.text}{kept}{settings}"


def test_what_keeps_a_model_from_being_asked_is_said_before_the_run(monkeypatch, code):
    monkeypatch.delenv("NO_KEY", raising=False)
    monkeypatch.setenv("MY_KEY", "s3cret")
    recipe = curation_recipe(
        qa_source(),
        {**written(code, "https://example.org/v1", api_key_env="NO_KEY"), "id": "b"},
        {**written(code, "http://example.org/v1", api_key_env="MY_KEY"), "id": "c"},
        {**written(code / "gone", "http://localhost/v1"), "id": "d"},
        {**written(code, "https://api.openai.com/v1"), "id": "e"},
        {**qa_source(code / "gone.jsonl"), "id": "f"},
    )

    with pytest.raises(PreflightError) as caught:
        check_sources(recipe)

    assert [
        problem.partition(": ")[2][:60] for problem in str(caught.value).split("; sources.")
    ] == [
        "nothing to read; name a local `path:` with rows of code, que",
        "api_key_env: the environment variable NO_KEY is not set",
        "endpoint: a key is not sent over plain http; use https",
        f"code: path '{code}/gone' is neither a folder nor an archive"[:60],
        "'e' holds output of OpenAI models, whose terms forbid traini",
        f"path '{code}/gone.jsonl' does not exist; give a file or a f"[:60],
    ]


def test_what_a_model_of_openai_wrote_is_flagged_unless_the_recipe_says_otherwise(code):
    def flag(endpoint, **keys):
        return CodeQaSource.model_validate(written(code, endpoint, **keys)).openai_outputs

    assert flag("https://api.openai.com/v1")
    assert flag("https://mine.openai.azure.com/v1")
    assert not flag("https://api.openai.com/v1", openai_outputs=False)
    assert not flag("https://notopenai.com/v1")
    assert not flag("http://localhost:8000/v1")


def test_settings_with_mistakes_are_named_down_to_the_inner_source(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {config: {}}\ntokenizer: {train_vocab_size: 512}\nsources:\n"
        "  - {type: code-qa, id: a, endpoint: 'https://me:pw@host/v1', model: m,\n"
        "     code: {type: repository, pth: x}}\n"
        "  - {type: code-qa, id: b, path: x, questions_per_function: 0, api_key_env: 'a b'}\n"
    )

    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe))

    said = str(caught.value)
    assert "sources.0.endpoint: String should match" in said
    assert "sources.0.code.pth: unknown key, did you mean 'path'?" in said
    assert "sources.1.questions_per_function" in said
    assert "sources.1.api_key_env" in said
