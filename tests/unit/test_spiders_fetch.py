"""The Stack Exchange source fetched by API, through Scrapy from a server on this machine."""

import json
import threading
from datetime import UTC, date, datetime

import psutil
import pytest

from pipelines.errors import SourceError
from pipelines.settings.sources import StackExchangeSource
from pipelines.sources.fetch import fetch_missing
from pipelines.sources.raw import Fetched, Window
from pipelines.sources.stack_exchange.api_fetch import api_request, fetch
from pipelines.sources.stack_exchange.api_items import post_of, read_posts
from pipelines.sources.stack_exchange.posts import POST_SCHEMA
from pipelines.spiders.stack_exchange_pages import page_names, write_page
from tests.assets.curation import curation_recipe, rows_of, run_stages
from tests.assets.replay_server import ReplayServer, Reply, until
from tests.assets.stack_exchange_site import (
    GONE_OWNER,
    START,
    StackExchangeSite,
    owner,
    question,
    throttled,
)

INSTANT = "tests.assets.instant_crawl"


@pytest.fixture
def site():
    questions = [question(n, answers=[(n + 100, f"to {n}")]) for n in range(1, 8)]
    return StackExchangeSite(questions, gzip=True)


@pytest.fixture
def server(site):
    with ReplayServer(site) as server:
        yield server


def source(server, **changes):
    given = {
        "type": "stack-exchange", "id": "se", "site": "stats.stackexchange.com",
        "api_url": f"{server.url}/2.3", "page_size": 3, "request_delay": 0,
    }  # fmt: skip
    return StackExchangeSource(**given | changes)


def get(settings, folder, window=None):
    return fetch(settings, folder, window or Window(), program=INSTANT)


def test_a_site_is_fetched_then_refreshed_then_left_alone(server, site, tmp_path):
    first = get(source(server), tmp_path)
    site.questions[2] = question(2, START + 90_000, answers=[(102, "better")])
    del site.questions[5]
    second = get(source(server), tmp_path)
    third = get(source(server), tmp_path)

    assert first == Fetched(
        True,
        "7 new questions: 7 questions of stats.stackexchange.com (5 requests, quota 9,995 left)",
        {"new": 7, "edited": 0, "deleted": 0, "rechecked": 0, "requests": 5, "questions": 7},
    )
    assert (second.summary.split(":")[0], second.counts["questions"]) == (
        "1 edited, 1 deleted questions",
        6,
    )
    assert (third.changed, third.summary.split(":")[0]) == (False, "nothing changed")
    posts = {post["id"]: post for post in read_posts(tmp_path)}
    assert sorted(posts) == [1, 2, 3, 4, 6, 7, 101, 102, 103, 104, 106, 107]
    assert posts[102]["body"] == "<p>better</p>\n"
    assert server.most_at_once == 1


def test_what_is_fetched_becomes_records_with_everything_attribution_needs(server, site, tmp_path):
    site.questions = {
        1: question(1, answers=[(101, "It is <code>x</code>.")], accepted_answer_id=101),
        2: question(2, answers=[(102, "Not accepted.")]),
    }
    recipe = curation_recipe(
        {
            "type": "stack-exchange",
            "id": "se",
            "site": "stats.stackexchange.com",
            "api_url": f"{server.url}/2.3",
            "request_delay": 0,
        }
    )

    fetched = fetch_missing(recipe)
    again = fetch_missing(recipe)
    store, refs = run_stages(tmp_path / "store", recipe, until="collect")
    [record] = rows_of(store, refs["collect"])

    assert (fetched["se"].counts["new"], again) == (2, {})
    shown = ("id", "group", "url", "author", "license", "created", "prompt", "completion")
    assert {name: record[name] for name in shown} == {
        "id": "se:101",
        "group": "se:q1",
        "url": "https://stats.stackexchange.com/a/101",
        "author": "Bob",
        "license": "CC-BY-SA-4.0",
        "created": "2020-09-13T12:43:30Z",
        "prompt": 'Why isn\'t "x" < 1?\n\nQuestion 1 & more',
        "completion": "It is `x`.",
    }


def test_faults_on_the_wire_change_nothing_of_what_is_fetched(server, site, tmp_path):
    site.faults = {
        1: Reply.html(502),
        3: throttled(40),
        5: Reply(status=429, headers={"Retry-After": "9"}),
        7: Reply.html(200, "<html>offline for maintenance</html>"),
        8: Reply(b'{"items": []}', fault="truncated"),
    }

    done = get(source(server), tmp_path)

    assert (done.changed, done.counts["questions"]) == (True, 7)


def test_a_first_crawl_stopped_by_the_quota_is_an_error_that_keeps_what_came(
    server, site, tmp_path
):
    site.quota = 53

    with pytest.raises(SourceError) as caught:
        get(source(server), tmp_path)
    partial = get(source(server, allow_partial=True), tmp_path)
    site.quota = 300
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"quota_time": 0.0}))  # the next day
    last = get(source(server), tmp_path)

    assert str(caught.value) == (
        "source 'se': the API's quota of the day is used up to quota_reserve (50), a new one "
        "starts at midnight UTC (a key in STARLOOM_STACK_EXCHANGE_KEY has a larger one); 5 "
        "questions are kept, run the same command again then, or set allow_partial: true to go on "
        "with what is there"
    )
    assert (partial.changed, partial.counts["requests"], partial.counts["questions"]) == (
        False,
        0,
        5,
    )
    assert last.counts["questions"] == 7


def test_killed_outright_a_crawl_goes_on_where_it_was(server, site, tmp_path):
    site.faults[3] = Reply(b'{"items": []}', fault="slow")

    def kill():
        until(lambda: len(site.asked) == 4)
        for spider in psutil.Process().children():
            spider.kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(SourceError, match="spider 'stack-exchange' crashed"):
        get(source(server), tmp_path)
    asked = len(site.asked)
    done = get(source(server), tmp_path)

    assert (done.counts["questions"], len(site.asked) - asked) == (7, 2)


def test_a_window_stopped_by_throttling_is_an_error(server, site, tmp_path):
    site.faults[1] = throttled(80_000)
    window = Window(datetime(2020, 9, 13, tzinfo=UTC), datetime(2020, 9, 14, tzinfo=UTC))

    with pytest.raises(SourceError, match=r"the API wants no requests before 20\d\d-.* UTC; 0 que"):
        get(source(server), tmp_path, window)


def test_the_recipe_decides_what_is_asked_in_seconds_of_utc(server):
    settings = source(
        server,
        tags=["r", "c#"],
        since=date(2020, 1, 1),
        until=date(2021, 1, 1),
        min_fetched_score=3,
    )
    window = Window(datetime(2020, 5, 1), datetime(2020, 6, 1, tzinfo=UTC))  # noqa: DTZ001

    assert api_request(settings, window) == {
        "site": "stats.stackexchange.com",
        "api_url": f"{server.url}/2.3",
        "trusted": [f"{server.url}/2.3"],
        "tags": ["r", "c#"],
        "since": 1577836800,
        "until": 1609459200,
        "min_score": 3,
        "window": {"since": 1588291200, "until": 1590969600},
        "page_size": 3,
        "quota_reserve": 50,
        "recheck_requests": 50,
        "delay": 0.0,
        "contact": None,
        "max_bytes": 64 * 2**20,
    }


def test_a_question_and_its_answer_become_rows_with_everything_unescaped():
    item = question(
        5,
        answers=[(50, "yes")],
        accepted_answer_id=50,
        closed_date=START,
        last_edit_date=START + 60,
        tags=["c&#43;&#43;"],
    )
    row, answer = post_of(item), post_of(item["answers"][0] | {"owner": GONE_OWNER})

    assert list(row) == POST_SCHEMA.names
    assert row == {
        "id": 5, "type": 1, "parent": None, "accepted": 50, "score": 5,
        "title": 'Why isn\'t "x" < 5?', "body": "<p>Question 5 &amp; more</p>\n",
        "tags": ["c++"], "author": "Ada & Co", "author_id": 7,
        "created": "2020-09-13T13:50:00Z", "edited": "2020-09-13T12:27:40Z",
        "active": "2020-09-13T13:50:00Z", "closed": "2020-09-13T12:26:40Z",
        "license": "CC BY-SA 4.0",
    }  # fmt: skip
    assert answer == {
        "id": 50, "type": 2, "parent": 5, "accepted": None, "score": 1, "title": None,
        "body": "<p>yes</p>\n", "tags": None, "author": "user1234", "author_id": None,
        "created": "2020-09-13T13:50:10Z", "edited": None, "active": "2020-09-13T13:50:00Z",
        "closed": None, "license": "CC BY-SA 4.0",
    }  # fmt: skip


def test_owner_and_license_may_be_missing():
    item = question(1)
    del item["owner"], item["content_license"]

    row = post_of(item)

    assert (row["author"], row["author_id"], row["license"]) == (None, None, None)


def store(folder, *items):
    write_page(folder, 0, {"method": "/questions"}, json.dumps({"items": items}).encode())


def test_an_item_that_is_no_post_is_told_of_and_the_rest_is_read(tmp_path):
    store(
        tmp_path,
        question(1),
        "text",
        None,
        {},
        question(2, score="7"),
        question(3, title="NUL \0"),
        question(4, body="\ud800"),
        question(5, creation_date=10**30),
        question(6, owner=[1]),
        question(7, tags=[1]),
        question(8, answers=[(80, "good")]) | {"question_id": 2**70},
        question(9, answers=[(90, "a"), (91, "b")]),
    )
    told = []

    rows = list(read_posts(tmp_path, lambda *bad: told.append(bad[:2])))

    assert [row["id"] for row in rows] == [1, 9, 90, 91]
    assert told[:7] == [
        ("", "bad_item"),
        ("", "bad_item"),
        ("", "bad_item"),
        ("2", "bad_item"),
        ("3", "bad_characters"),
        ("4", "bad_characters"),
        ("5", "bad_item"),
    ]


def test_posts_are_read_in_the_order_of_their_ids_whatever_the_order_of_pages(tmp_path):
    for number, items in enumerate([[question(9), question(2)], [question(5)], [question(2)]]):
        write_page(tmp_path, number, {}, json.dumps({"items": items}).encode())

    assert [post["id"] for post in read_posts(tmp_path)] == [2, 5, 9]
    assert page_names(tmp_path) == tuple(f"pages/0000000{n}.json.gz" for n in range(3))


def recorded(folder, name):
    return json.loads((folder / name).read_text())["items"]


def test_real_questions_and_answers_are_read_with_title_author_and_license(real_data, tmp_path):
    folder = real_data / "se_api_v23_questions_answers"
    questions, answers = (
        recorded(folder, "mockQuestions.json"),
        recorded(folder, "mockAnswers.json"),
    )
    store(tmp_path, *questions, *answers)

    posts = {post["id"]: post for post in read_posts(tmp_path)}

    assert len(posts) == 60
    assert posts[39084838] == {
        "id": 39084838, "type": 1, "parent": None, "accepted": 39084839, "score": 25,
        "title": "Why can't PowerShell find the gcloud cmdlets?", "body": "",
        "tags": ["powershell", "google-cloud-sdk", "google-cloud-powershell"],
        "author": "Jon Skeet", "author_id": 22656, "created": "2016-08-22T16:51:48Z",
        "edited": "2016-08-22T22:13:09Z", "active": "2021-10-26T09:41:54Z", "closed": None,
        "license": "CC BY-SA 3.0",
    }  # fmt: skip
    assert posts[70045513]["parent"] == 70045442
    assert {post["license"] for post in posts.values()} <= {
        f"CC BY-SA {n}" for n in (2.5, 3.0, 4.0)
    }


def test_recorded_pages_are_replayed_through_scrapy(real_data, server, site, tmp_path):
    folder = real_data / "se_api_wrapper_perceval"
    pages = [
        json.loads((folder / f"stackexchange_question_{name}").read_text())
        for name in ("backoff_page.json", "page_2.json")
    ]
    assert (pages[0]["has_more"], pages[0]["backoff"]) == (True, 0.2)
    site.faults = {1: Reply.json(pages[0], gzip=True), 2: Reply.json(pages[1], gzip=True)}

    done = get(source(server, page_size=100), tmp_path)

    ids = {item["question_id"] for page in pages for item in page["items"]}
    posts = list(read_posts(tmp_path))
    assert (done.changed, done.counts["questions"]) == (True, len(ids))
    assert {post["id"] for post in posts if post["type"] == 1} <= ids
    assert owner(1)["user_type"] == pages[0]["items"][0]["owner"]["user_type"]
