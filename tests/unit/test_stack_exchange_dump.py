"""A dump is read through the real store: every post is counted, every record is attributed."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.manifest import Counts
from pipelines.sources import stack_exchange
from pipelines.sources.stack_exchange import dump, imports, partitions
from pipelines.sources.stack_exchange.joins import piece_number
from pipelines.spiders.stack_exchange_pages import write_page
from tests.assets.curation import curation_recipe, rows_of, run_stages, write_files
from tests.assets.stack_exchange_dump import (
    USERS,
    answer,
    dump_source,
    posts_xml,
    question,
    row,
    table,
)

NO_SCORE = "Score='x' is not an integer"
SITE = "https://stats.stackexchange.com"


def collect(tmp_path, *sources, workers=1, name="store"):
    recipe = curation_recipe(*sources)
    store, refs = run_stages(tmp_path / name, recipe, until="collect", workers=workers)
    return rows_of(store, refs["collect"]), store.manifest(refs["collect"])


def write_dump(tmp_path, *lines, **tables):
    """Write Posts.xml and other tables into a folder and return it."""
    others = {f"{name}.xml": content for name, content in tables.items()}
    return write_files(tmp_path / "dump", {"Posts.xml": posts_xml(*lines), **others})


def byte_of(folder, id_):
    """Return the offset of the line of a row in Posts.xml."""
    return (folder / "Posts.xml").read_bytes().index(f'  <row Id="{id_}"'.encode())


def ids(rows):
    return [row["id"] for row in rows]


@pytest.fixture
def small_pieces(monkeypatch):
    """Ranges, groups and partitions so small that a few rows fill several of each."""
    monkeypatch.setattr(imports, "RANGE_BYTES", 3000)
    monkeypatch.setattr(partitions, "PARTITION_BYTES", 5000)
    monkeypatch.setattr(partitions, "GROUP_BYTES", 1000)
    monkeypatch.setattr(dump, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(dump, "HEAD_BYTES", 200)


def test_an_accepted_answer_becomes_a_record_with_everything_attribution_needs(tmp_path):
    folder = write_dump(
        tmp_path,
        question(
            1, AcceptedAnswerId=3, Body="<p>How to <code>fit</code>?</p>\n", Title="Fit & <predict>"
        ),
        answer(2, 1, Score=9),
        answer(3, 1, Body="<p>So:</p>\n<pre><code>fit(x)\n</code></pre>\n", LastEditDate=None),
        Users=USERS,
    )

    rows, manifest = collect(tmp_path, dump_source(folder))

    [found] = rows
    assert json.loads(found.pop("meta")) == {
        "site": "stats.stackexchange.com",
        "tags": ["r", "regression"],
        "accepted": True,
        "preference": 3,
        "revised": "2019-03-01T11:00:00Z",
        "author_url": f"{SITE}/users/12",
        "question_id": 1,
        "question_score": 5,
        "question_url": f"{SITE}/questions/1",
        "question_author": "Ada & Co",
        "question_author_url": f"{SITE}/users/11",
        "question_license": "CC-BY-SA-4.0",
        "question_revised": "2019-03-01T10:00:00Z",
        "combined_license": "CC-BY-SA-4.0",
    }
    assert found == {
        "id": "se:3",
        "group": "se:q1",
        "source": "se",
        "revision": manifest.report["sources"]["se"]["revision"],
        "url": f"{SITE}/a/3",
        "author": "Grace",
        "license": "CC-BY-SA-4.0",
        "created": "2019-03-01T11:00:00Z",
        "score": 3.0,
        "messages": None,
        "prompt": "Fit & <predict>\n\nHow to `fit`?",
        "completion": "So:\n\n```\nfit(x)\n```",
        "text": None,
    }
    assert manifest.counts == Counts(
        rows_in=3, rows_out=1, used=2, dropped={"not_selected": 1}, quarantined={}
    )
    assert manifest.report["sources"]["se"] == {
        "type": "stack-exchange",
        "revision": found["revision"],
        "url": SITE,
        "author": "users of stats.stackexchange.com",
        "license": "CC-BY-SA-4.0",
        "licenses": {"CC-BY-SA-4.0": 1},
        "openai_outputs": False,
        "records": 1,
        "site": "stats.stackexchange.com",
        "posts": 3,
        "unnamed_authors": 0,
        "users": {"rows": 3, "bad": 0},
    }


def test_posts_of_every_type_are_counted_and_only_questions_and_answers_are_read(tmp_path):
    folder = write_dump(
        tmp_path,
        question(1, AcceptedAnswerId=2),
        answer(2, 1),
        *[row(Id=n, PostTypeId=n, Body="", CreationDate="x") for n in (3, 4, 5, 6, 7, 8, 99)],
    )

    _, manifest = collect(tmp_path, dump_source(folder))

    assert manifest.counts == Counts(
        rows_in=9,
        rows_out=1,
        used=2,
        dropped={
            "moderator_nomination": 1,
            "orphaned_tag_wiki": 1,
            "other_post_type": 1,
            "privilege_wiki": 1,
            "tag_wiki": 1,
            "tag_wiki_excerpt": 1,
            "wiki_placeholder": 1,
        },
        quarantined={},
    )


def test_owners_are_named_by_the_row_then_by_users_and_the_community_by_itself(tmp_path):
    owners = [
        {"OwnerUserId": None, "OwnerDisplayName": "user99"},
        {"OwnerUserId": 12},
        {"OwnerUserId": -1},
        {"OwnerUserId": 404},
        {"OwnerUserId": None},
    ]
    lines = [answer(2 + n, 1, Score=9 - n, **owner) for n, owner in enumerate(owners)]
    folder = write_dump(tmp_path, question(1), *lines, Users=USERS)

    rows, manifest = collect(tmp_path, dump_source(folder, select="all"))

    assert [(r["author"], json.loads(r["meta"]).get("author_url")) for r in rows] == [
        ("user99", None),
        ("Grace", f"{SITE}/users/12"),
        ("Community", f"{SITE}/users/-1"),
        (None, f"{SITE}/users/404"),
        (None, None),
    ]
    assert manifest.report["sources"]["se"]["unnamed_authors"] == 2


def test_bad_rows_are_quarantined_with_their_place_and_end_nothing(tmp_path):
    folder = write_dump(
        tmp_path,
        question(1, AcceptedAnswerId=2),
        answer(2, 1),
        answer(3, 1, Score="x"),
        '  <row Id="4" Body="\x01" />\r\n',
        b'  <row Id="5" Body="\xff" />\r\n',
        answer(6, 1, Body=None),
        "  <row Id='7' PostTypeId='2'\r\n",
        "",
    )

    rows, manifest = collect(tmp_path, dump_source(folder))

    assert ids(rows) == ["se:2"]
    assert manifest.counts.rows_in == 7
    assert manifest.counts.quarantined == {
        "bad_Score": 1,
        "control_character": 1,
        "invalid_utf8": 1,
        "malformed_xml": 1,
        "missing_Body": 1,
    }
    samples = manifest.report["samples"]
    assert samples["bad_Score"] == [
        {
            "id": "se:Posts.xml:5",
            "reason": "bad_Score",
            "detail": f"Posts.xml, line 5, byte {byte_of(folder, 3)}: {NO_SCORE}",
        }
    ]
    assert samples["invalid_utf8"][0]["id"] == "se:Posts.xml:7"
    assert samples["malformed_xml"][0]["id"] == "se:Posts.xml:9"


def test_lines_and_bytes_are_right_in_every_range(tmp_path, small_pieces):
    lines = [answer(n, 1) for n in range(2, 60)]
    places = (3, 20, 41, 57)
    for place in places:
        lines[place] = answer(1000 + place, 1, Score="x")
    folder = write_dump(tmp_path, question(1), *lines)

    _, manifest = collect(tmp_path, dump_source(folder, select="all"))

    found = [(s["id"], s["detail"]) for s in manifest.report["samples"]["bad_Score"]]
    assert found == [
        (
            f"se:Posts.xml:{place + 4}",
            f"Posts.xml, line {place + 4}, byte {byte_of(folder, 1000 + place)}: {NO_SCORE}",
        )
        for place in places
    ]
    assert manifest.counts.rows_in == 59


@pytest.mark.parametrize("order", ["sorted", "answers first", "mixed"])
def test_answers_find_their_question_wherever_it_is(tmp_path, small_pieces, order):
    questions = [question(n, AcceptedAnswerId=100 + n) for n in range(1, 41)]
    answers = [answer(100 + n, n) for n in range(1, 41)] + [answer(500, 77)]
    lines = {
        "sorted": questions + answers,
        "answers first": answers + questions,
        "mixed": [x for pair in zip(answers, reversed(questions), strict=False) for x in pair]
        + answers[40:],
    }[order]
    folder = write_dump(tmp_path, *lines)

    rows, manifest = collect(tmp_path, dump_source(folder))

    assert len(manifest.shards) > 3
    assert sorted(ids(rows)) == sorted(f"se:{100 + n}" for n in range(1, 41))
    shards = [s.rows for s in manifest.shards]
    starts = [sum(shards[:n]) for n in range(len(shards) + 1)]
    for low, high in pairwise(starts):
        questions_of_shard = [int(r["group"][4:]) for r in rows[low:high]]
        assert questions_of_shard == sorted(questions_of_shard)
    assert manifest.counts == Counts(
        rows_in=81, rows_out=40, used=80, dropped={"no_question": 1}, quarantined={}
    )


def test_shards_are_the_same_bytes_for_any_number_of_workers(tmp_path, small_pieces):
    lines = [question(n, AcceptedAnswerId=100 + n) + answer(100 + n, n) for n in range(1, 30)]
    folder = write_dump(tmp_path, *lines, answer(900, 1, Score="x"), Users=USERS)
    sources = [dump_source(folder), dump_source(folder, id="again", select="all")]

    _, one = collect(tmp_path, *sources, workers=1, name="one")
    # Spawned processes do not see the patched sizes of groups and chunks: these must not matter.
    _, two = collect(tmp_path, *sources, workers=2, name="two")

    assert len(one.shards) > 6
    assert one.shards == two.shards
    assert one.counts == two.counts
    assert one.report == two.report


def test_rows_that_come_twice_are_counted_once(tmp_path):
    folder = write_dump(
        tmp_path, question(1, AcceptedAnswerId=2), answer(2, 1), answer(2, 1, Body="x"), question(1)
    )

    rows, manifest = collect(tmp_path, dump_source(folder))

    assert [r["completion"] for r in rows] == ["Answer 2."]
    assert manifest.counts.dropped == {"repeated_id": 2}


def test_a_cap_stops_reading_and_counts_the_rest(tmp_path, small_pieces):
    lines = [question(n) + answer(100 + n, n) + answer(200 + n, n) for n in range(1, 30)]
    folder = write_dump(tmp_path, *lines)

    rows, manifest = collect(tmp_path, dump_source(folder, select="all", max_records=7))

    assert len(rows) == 7
    assert manifest.counts == Counts(
        rows_in=87, rows_out=7, used=11, dropped={"max_records": 76}, quarantined={}
    )


def test_posts_without_text_are_counted(tmp_path):
    folder = write_dump(
        tmp_path,
        question(1, AcceptedAnswerId=2),
        answer(2, 1, Body=""),
        question(3, Title="", Body=" ", AcceptedAnswerId=4),
        answer(4, 3),
        question(5, Title="Only a title", Body="", AcceptedAnswerId=6),
        answer(6, 5),
    )

    rows, manifest = collect(tmp_path, dump_source(folder))

    assert [(r["prompt"], r["completion"]) for r in rows] == [("Only a title", "Answer 6.")]
    assert manifest.counts.dropped == {
        "empty_body": 2,
        "no_selected_answer": 1,
        "question_unusable": 1,
    }


def test_duplicates_are_dropped_by_their_links_and_closed_questions_by_their_date(tmp_path):
    folder = write_dump(
        tmp_path,
        question(1, AcceptedAnswerId=2),
        answer(2, 1),
        question(3, AcceptedAnswerId=4, ClosedDate="2020-01-01T00:00:00.000"),
        answer(4, 3),
        question(5, AcceptedAnswerId=6),
        answer(6, 5),
        PostLinks=table(
            "postlinks",
            row(Id=1, PostId=1, RelatedPostId=9, LinkTypeId=3),
            row(Id=2, PostId=5, RelatedPostId=9, LinkTypeId=1),
            "  <row Id='3' PostId='x' LinkTypeId='3' />\r\n  <row />\r\n  <ro />\r\n",
        ),
    )

    kept, _ = collect(tmp_path, dump_source(folder), name="kept")
    drop = {"closed_questions": "drop", "duplicate_questions": "drop"}
    rows, manifest = collect(tmp_path, dump_source(folder, **drop))

    assert ids(kept) == ["se:2", "se:4", "se:6"]
    assert ids(rows) == ["se:6"]
    assert manifest.counts.dropped == {"closed": 2, "duplicate": 2}
    assert manifest.report["sources"]["se"]["postlinks"] == {"rows": 2, "bad": 3}


def test_rows_without_a_license_get_that_of_their_date_or_the_recipe(tmp_path):
    def dated(id_, created, edited=None, named=None):
        about = {"CreationDate": created, "LastEditDate": edited, "ContentLicense": named}
        return answer(id_, 1, Score=99 - id_, **about)

    folder = write_dump(
        tmp_path,
        question(1, CreationDate="2009-01-01T00:00:00.000", ContentLicense=None),
        dated(2, "2011-04-07T23:59:59.999"),
        dated(3, "2011-04-08T00:00:00.000"),
        dated(4, "2018-05-01T23:59:59.999"),
        dated(5, "2009-01-01T00:00:00.000", "2018-05-02T00:00:00.000"),
        dated(6, "2009-01-01T00:00:00.000", "2018-05-02T00:00:00.000", "CC BY-SA 2.5"),
    )

    rows, manifest = collect(tmp_path, dump_source(folder, select="all"), name="a")
    named, _ = collect(tmp_path, dump_source(folder, select="all", license="CC0-1.0"), name="b")

    by = "CC-BY-SA"
    assert [r["license"] for r in rows] == [
        f"{by}-2.5", f"{by}-3.0", f"{by}-3.0", f"{by}-4.0", f"{by}-2.5",
    ]  # fmt: skip
    assert [json.loads(r["meta"])["combined_license"] for r in rows][3:] == [
        f"{by}-4.0", f"{by}-2.5",
    ]  # fmt: skip
    assert {json.loads(r["meta"])["question_license"] for r in rows} == {f"{by}-2.5"}
    assert [r["license"] for r in named] == ["CC0-1.0"] * 4 + [f"{by}-2.5"]
    assert json.loads(named[4]["meta"])["combined_license"] == f"CC0-1.0 AND {by}-2.5"
    assert manifest.report["sources"]["se"]["licenses"] == {
        f"{by}-2.5": 2, f"{by}-3.0": 2, f"{by}-4.0": 1,
    }  # fmt: skip


def test_a_killed_run_goes_on_after_its_finished_pieces(tmp_path, small_pieces, monkeypatch):
    lines = [question(n, AcceptedAnswerId=100 + n) + answer(100 + n, n) for n in range(1, 30)]
    recipe = curation_recipe(dump_source(write_dump(tmp_path, *lines)))
    whole, done = run_stages(tmp_path / "whole", recipe, until="collect")
    original, parsed = imports.parse_range, []

    def die_once(inputs, output, params):
        parsed.append(piece_number(output))
        if len(parsed) == 3:
            raise KeyboardInterrupt
        return original(inputs, output, params)

    monkeypatch.setattr(imports, "parse_range", die_once)
    with pytest.raises(KeyboardInterrupt):
        run_stages(tmp_path / "killed", recipe, until="collect")
    store, refs = run_stages(tmp_path / "killed", recipe, until="collect")

    assert parsed == [0, 1, 2, *range(2, max(parsed) + 1)]
    assert store.manifest(refs["collect"]).digest == whole.manifest(done["collect"]).digest


def test_pages_of_the_api_give_the_records_that_a_dump_gives(tmp_path, monkeypatch):
    owner = {"display_name": "Ada &amp; Co", "user_id": 11}
    made = {"owner": owner, "content_license": "CC BY-SA 4.0", "creation_date": 1551434400}
    item = {
        **made,
        "question_id": 1,
        "title": "Fit &amp; predict",
        "body": "<p>How?</p>\n",
        "score": 5,
        "tags": ["r", "c++"],
        "accepted_answer_id": 2,
        "answer_count": 2,
        "answers": [
            {**made, "answer_id": 2, "question_id": 1, "score": 3, "body": "<p>So.</p>\n"},
            {**made, "answer_id": 3, "question_id": 1, "score": 2**40, "body": "<p>Or.</p>\n"},
        ],
    }
    untitled = {**item, "question_id": 7, "title": None, "answers": []}
    pages = tmp_path / "pages"
    body = json.dumps({"items": [item, untitled, {"question_id": "x"}]}).encode()
    write_page(pages, 1, {"method": "questions"}, body)
    monkeypatch.setattr(stack_exchange, "fetched_folder", lambda source: pages)
    common = {"OwnerUserId": 11, "CreationDate": "2019-03-01T10:00:00.000"}
    folder = write_dump(
        tmp_path,
        question(
            1,
            Title="Fit & predict",
            Body="<p>How?</p>\n",
            Tags="<r><c++>",
            AcceptedAnswerId=2,
            **common,
        ),
        answer(2, 1, Body="<p>So.</p>\n", **common),
        Users=USERS,
    )

    by_dump, _ = collect(tmp_path, dump_source(folder, revision="1"), name="dump")
    asked = {"type": "stack-exchange", "id": "se", "site": "stats", "revision": "1"}
    by_api, manifest = collect(tmp_path, asked, name="api")

    assert by_api == by_dump
    assert len(by_api) == 1
    assert manifest.counts == Counts(
        rows_in=5,
        rows_out=1,
        used=2,
        dropped={},
        quarantined={"bad_Score": 1, "bad_item": 1, "missing_Title": 1},
    )


REAL = {
    # site: (rows, questions and answers used, accepted answers)
    "se_cardano_2021": (2630, 918, 459),
    "se_conlang_meta_2020": (177, 22, 11),
}


@pytest.mark.parametrize("name", REAL)
def test_real_dumps_are_read_whole(tmp_path, name):
    folder = os.environ.get("STARLOOM_REAL_DATA")
    if not folder:
        pytest.skip("STARLOOM_REAL_DATA is not set")
    rows_in, used, accepted = REAL[name]

    rows, manifest = collect(tmp_path, dump_source(Path(folder, name)))

    counts = manifest.counts
    assert (counts.rows_in, counts.used, len(rows)) == (rows_in, used, accepted)
    assert counts.quarantined == {}
    assert len(set(ids(rows))) == len(rows)
    assert all(r["author"] and r["license"].startswith("CC-BY-SA-") for r in rows)
