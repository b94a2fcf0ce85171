"""The Stack Exchange spider on an invented clock: paging, limits, faults, changes, crashes."""

import gzip
import json

import pytest

from pipelines.errors import SourceError
from pipelines.sources.stack_exchange.api_items import read_posts
from pipelines.spiders import stack_exchange, stack_exchange_api
from pipelines.spiders.stack_exchange import converse
from pipelines.spiders.stack_exchange_pages import (
    KnownQuestions,
    batches,
    page_names,
    write_page,
)
from pipelines.store import write_atomic
from tests.assets.replay_server import Reply, TestClock, play
from tests.assets.stack_exchange_site import (
    START,
    StackExchangeSite,
    question,
    refusal,
    throttled,
)

REQUEST = {
    "site": "stats.stackexchange.com",
    "api_url": "http://api.test/2.3",
    "tags": [],
    "since": None,
    "until": None,
    "min_score": None,
    "window": None,
    "page_size": 3,
    "quota_reserve": 50,
    "recheck_requests": 50,
}


class Crawl:
    """A site, a folder and a clock; `run` is one run of the spider."""

    def __init__(self, folder, site):
        self.folder, self.site, self.clock = folder, site, TestClock()
        site.clock = self.clock

    def run(self, **changes):
        return play(converse(REQUEST | changes, self.folder, self.clock.now), self.site, self.clock)

    def later(self, seconds=3600, **changes):
        """Run again after a while; return the result and the methods that were asked."""
        self.clock.time += seconds
        before = len(self.site.asked)
        done = self.run(**changes)
        return done, [path for path, _ in self.site.asked[before:]]

    def posts(self):
        return {post["id"]: post for post in read_posts(self.folder)}

    def state(self):
        return json.loads((self.folder / "state.json").read_text())


@pytest.fixture
def crawl(tmp_path):
    return Crawl(tmp_path, StackExchangeSite(question(each) for each in range(1, 9)))


def test_a_first_crawl_gets_every_question_with_its_answers_and_forgets_nothing_it_needs(tmp_path):
    site = StackExchangeSite([question(1, answers=[(100, "a"), (101, "b")]), question(2)])
    crawl = Crawl(tmp_path, site)

    done = crawl.run()

    assert done == {
        "new": 2, "edited": 0, "deleted": 0, "rechecked": 0, "pages": 1, "requests": 2,
        "questions": 2, "quota_remaining": 9998, "complete": True, "changed": True,
        "stopped": None, "quiet_until": 0.0,
    }  # fmt: skip
    assert sorted(crawl.posts()) == [1, 2, 100, 101]
    assert site.asked[0] == (
        "/filters/create",
        {"base": "withbody", "include": "question.answers", "unsafe": "false"},
    )


def test_pages_follow_the_last_date_of_the_page_before_so_that_nothing_slides_past(crawl):
    crawl.run()

    asked = [query for path, query in crawl.site.asked if path == "/questions"]
    assert sorted(crawl.posts()) == list(range(1, 9))
    assert [(query.get("min"), query["page"]) for query in asked] == [
        (None, "1"),
        (str(START + 3000), "1"),
        (str(START + 5000), "1"),
        (str(START + 7000), "1"),
    ]


def test_more_questions_in_one_second_than_a_page_holds_are_paged_through(tmp_path):
    crawl = Crawl(tmp_path, StackExchangeSite(question(n, START + 99) for n in range(1, 12)))

    crawl.run()

    assert sorted(crawl.posts()) == list(range(1, 12))
    assert [query["page"] for _, query in crawl.site.asked[1:]] == ["1", "1", "2", "3", "4"]


def test_has_more_is_doubted_where_a_page_is_full_and_where_it_is_empty(crawl):
    crawl.site.extra[1] = {"has_more": False}  # a full page that says it is the last
    crawl.site.extra[4] = {"has_more": True, "items": []}  # an empty one that says it is not

    done = crawl.run()

    assert (done["complete"], done["requests"]) == (True, 5)
    assert len(crawl.posts()) == 7


def test_a_backoff_holds_for_its_method_only_and_outlives_the_process(crawl):
    crawl.site.extra[1] = {"backoff": 10}
    crawl.site.extra[4] = {"backoff": 300}  # on the last page

    crawl.run()
    waits, crawl.clock.waits = crawl.clock.waits, []
    done, asked = crawl.later(100)

    assert waits == [pytest.approx(10, abs=0.2)]
    assert crawl.clock.waits == [pytest.approx(200, abs=0.2)]
    assert asked == ["/questions", *[f"/questions/{n}%3B{n + 1}%3B{n + 2}" for n in (1, 4)],
                     "/questions/7%3B8"]  # fmt: skip
    assert not done["changed"]


def test_a_recorded_backoff_of_a_fraction_of_a_second_is_waited_out(crawl):
    crawl.site.extra[1] = {"backoff": 0.2}

    crawl.run()

    assert crawl.clock.waits == [pytest.approx(0.2, abs=0.01)]


def test_at_the_quotas_reserve_the_crawl_stops_and_the_next_day_goes_on(crawl):
    crawl.site.quota = 53

    first = crawl.run()
    again, asked_again = crawl.later(60)
    crawl.site.quota = 10_000
    last, asked_last = crawl.later(24 * 3600)

    assert (first["stopped"], first["complete"], first["quota_remaining"]) == ("quota", False, 50)
    assert (again["stopped"], asked_again) == ("quota", [])
    assert (last["stopped"], last["complete"], asked_last) == (None, True, ["/questions"] * 2)
    assert sorted(crawl.posts()) == list(range(1, 9))


def test_a_throttle_violation_is_waited_out_as_long_as_it_says(crawl):
    crawl.site.faults[2] = throttled(47)

    done = crawl.run()

    assert (done["complete"], crawl.clock.waits) == (True, [47.0])


def test_a_long_throttle_stops_the_crawl_and_is_kept_by_the_next_process(crawl):
    crawl.site.faults[2] = throttled(80_000)

    first = crawl.run()
    again, asked = crawl.later(3600)
    last, _ = crawl.later(80_000)

    assert (first["stopped"], first["complete"], crawl.clock.waits) == ("throttled", False, [])
    assert (again["stopped"], asked) == ("throttled", [])
    assert (last["stopped"], last["complete"], last["questions"]) == (None, True, 8)


def test_a_throttle_violation_without_a_time_waits_half_a_minute(crawl):
    crawl.site.faults[1] = refusal(502, "throttle_violation", "Violation of backoff parameter")

    assert crawl.run()["complete"]
    assert crawl.clock.waits == [30.0]


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Reply(b"", 429, {"Retry-After": "17"}), [17.0]),
        (Reply(b"", 429, {"Retry-After": "Tue, 14 Nov 2023 22:14:00 GMT"}), [39.7]),
        (Reply(b"slow down", 429), [2.0]),
        (Reply.html(502), [2.0]),
        (Reply.html(503, **{"Retry-After": "5"}), [5.0]),
        (Reply.html(200, "<html>We are offline for maintenance</html>"), [2.0]),
        (refusal(500, "internal_error", "an error occurred"), [2.0]),
        (refusal(503, "temporarily_unavailable", "simply try again"), [2.0]),
        (Reply(b'{"items": [{"question_id": 1', 200), [2.0]),
        (Reply(b"[" * 100_000, 200), [2.0]),
        (Reply(b'{"items": null}', 200), [2.0]),
        (Reply(b"\xff\xfe", 200), [2.0]),
        (Reply(b"", 200), [2.0]),
        (Reply(fault="truncated"), [2.0]),
        (Reply(fault="slow"), [2.0]),
        (Reply(fault="reset"), [2.0]),
    ],
    ids="429-seconds 429-date 429-bare 502-html 503-retry-after 200-html internal unavailable "
    "cut-json deep-json no-items not-utf8 empty truncated slow reset".split(),
)
def test_a_fault_is_waited_out_and_asked_again(crawl, fault, waits):
    crawl.site.faults[2] = fault

    done = crawl.run()

    assert (done["complete"], done["questions"]) == (True, 8)
    assert crawl.clock.waits == [pytest.approx(each, abs=0.01) for each in waits]


def test_a_fault_that_lasts_ends_in_one_sentence_and_the_next_run_goes_on_where_it_was(crawl):
    crawl.site.faults = {number: Reply.html(502) for number in range(3, 9)}

    with pytest.raises(SourceError) as caught:
        crawl.run()
    crawl.site.faults = {}
    done, asked = crawl.later()

    assert str(caught.value) == (
        "http://api.test/2.3/questions (site stats.stackexchange.com): HTTP status 502 (6 "
        "attempts); what has arrived is kept, run the same command again later"
    )
    assert crawl.clock.waits == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert (done["complete"], asked) == (True, ["/questions"] * 2)
    assert sorted(crawl.posts()) == list(range(1, 9))


def test_a_request_the_api_refuses_is_not_asked_again(crawl):
    crawl.site.faults[1] = refusal(400, "bad_parameter", "No site found for name `statz`")

    with pytest.raises(SourceError) as caught:
        crawl.run()

    assert str(caught.value) == (
        "http://api.test/2.3/questions (site stats.stackexchange.com): the API refuses the "
        "request: bad_parameter (400): No site found for name `statz`"
    )
    assert (len(crawl.site.asked), crawl.clock.waits) == (2, [])


def test_a_second_run_asks_from_the_watermark_and_changes_nothing_where_nothing_changed(crawl):
    crawl.run()
    stored = {name: (crawl.folder / name).read_bytes() for name in page_names(crawl.folder)}

    done, _ = crawl.later(recheck_requests=0)

    assert (done["changed"], done["pages"], done["requests"]) == (False, 0, 1)
    assert int(crawl.site.asked[-1][1]["min"]) == START + 8000 - 120
    assert stored == {n: (crawl.folder / n).read_bytes() for n in page_names(crawl.folder)}


def test_views_and_bumps_are_no_change_but_scores_and_texts_are(crawl):
    crawl.run()
    crawl.site.questions[1] |= {"view_count": 99, "last_activity_date": START + 20_000}
    bumped, _ = crawl.later(recheck_requests=0)
    crawl.site.questions[2] |= {"score": 55}
    voted, _ = crawl.later()

    assert not bumped["changed"]
    assert (voted["edited"], voted["pages"], crawl.posts()[2]["score"]) == (1, 1, 55)


def test_edits_and_new_answers_replace_what_was_there(tmp_path):
    site = StackExchangeSite([question(1, answers=[(100, "old"), (101, "goes")]), question(2)])
    crawl = Crawl(tmp_path, site)
    crawl.run()
    now = START + 90_000
    site.questions[1] = question(1, now, answers=[(100, "new"), (102, "came")], title="T &amp; U")

    done, _ = crawl.later(recheck_requests=0)

    posts = crawl.posts()
    assert (done["new"], done["edited"]) == (0, 1)
    assert sorted(posts) == [1, 2, 100, 102]
    assert (posts[1]["title"], posts[100]["body"]) == ("T & U", "<p>new</p>\n")


def test_the_last_answer_of_a_question_can_be_deleted(tmp_path):
    crawl = Crawl(tmp_path, StackExchangeSite([question(1, answers=[(100, "only")])]))
    crawl.run()
    crawl.site.questions[1] = question(1)

    crawl.later()

    assert sorted(crawl.posts()) == [1]


def test_a_question_that_stays_away_when_asked_twice_is_deleted_with_its_answers(tmp_path):
    site = StackExchangeSite([question(1, answers=[(100, "a")]), question(2), question(3)])
    crawl = Crawl(tmp_path, site)
    crawl.run()
    del site.questions[1]

    done, asked = crawl.later()

    assert (done["deleted"], done["rechecked"], done["questions"]) == (1, 3, 2)
    assert asked == ["/questions", "/questions/1%3B2%3B3", "/questions/1"]
    assert sorted(crawl.posts()) == [2, 3]


def test_a_question_missing_once_is_not_deleted(crawl):
    crawl.run()
    kept = crawl.site.questions
    number = len(crawl.site.asked) + 1
    crawl.site.extra[number] = {"items": [kept[2], kept[3]]}

    done, asked = crawl.later()

    assert (done["deleted"], asked[:3]) == (
        0,
        ["/questions", "/questions/1%3B2%3B3", "/questions/1"],
    )
    assert sorted(crawl.posts()) == list(range(1, 9))


def test_a_deleted_question_that_comes_back_is_back(crawl):
    crawl.run()
    gone = crawl.site.questions.pop(4)
    crawl.later()
    assert 4 not in crawl.posts()
    crawl.site.questions[4] = gone | {"last_activity_date": START + 50_000}

    done, _ = crawl.later()

    assert (done["new"], 4 in crawl.posts()) == (1, True)


def test_rechecks_go_round_within_their_budget(crawl):
    crawl.run()
    first, asked = crawl.later(recheck_requests=2)
    second, asked_next = crawl.later(recheck_requests=2)

    assert (first["rechecked"], second["rechecked"]) == (6, 5)
    assert asked[1:] == ["/questions/1%3B2%3B3", "/questions/4%3B5%3B6"]
    assert asked_next[1:] == ["/questions/7%3B8", "/questions/1%3B2%3B3"]


def test_a_window_gets_its_dates_and_leaves_the_watermark_where_it_is(crawl):
    crawl.run()
    before = crawl.state()["passes"]
    crawl.site.questions[3] = question(3, body="<p>new</p>")

    done = crawl.run(window={"since": START + 2000, "until": START + 5000})

    query = crawl.site.asked[-1][1]
    assert (query["fromdate"], query["todate"]) == (str(START + 2000), str(START + 4999))
    assert (done["edited"], crawl.state()["passes"], crawl.state()["windows"]) == (1, before, {})


def test_a_window_outside_the_sources_dates_asks_nothing(crawl):
    done = crawl.run(since=START + 9000, window={"since": START, "until": START + 5000})

    assert (done["new"], [path for path, _ in crawl.site.asked]) == (0, ["/filters/create"])


def test_each_tag_is_a_pass_of_its_own_and_a_question_with_both_is_there_once(tmp_path):
    site = StackExchangeSite(
        [question(1, tags=["a"]), question(2, tags=["b"]), question(3, tags=["b", "a"]),
         question(4, tags=["c"])]
    )  # fmt: skip
    crawl = Crawl(tmp_path, site)

    done = crawl.run(tags=["a", "b"])

    assert (done["new"], sorted(crawl.posts())) == (3, [1, 2, 3])
    assert sorted(crawl.state()["passes"]) == ["a", "b"]


def test_dates_of_the_source_limit_what_is_asked(crawl):
    crawl.run(since=START + 2000, until=START + 5000)

    assert sorted(crawl.posts()) == [2, 3, 4]


def test_with_a_minimum_score_the_first_pass_goes_by_score_and_later_ones_by_activity(crawl):
    for number in range(10, 16):
        crawl.site.questions[number] = question(number, score=4)

    first = crawl.run(min_score=4)
    scores = [post["score"] for post in crawl.posts().values()]
    asked = [query for path, query in crawl.site.asked if path == "/questions"]
    now = int(crawl.clock.now()) + 30
    crawl.site.questions[3] = question(3, now, body="<p>edited</p>")
    later, _ = crawl.later(min_score=4, recheck_requests=0)

    assert sorted(scores) == [4] * 7 + [5, 6]
    assert [(query.get("max"), query["min"], query["page"]) for query in asked] == [
        (None, "4", "1"), ("4", "4", "1"), ("4", "4", "2"), ("4", "4", "3"),
    ]  # fmt: skip
    assert (first["complete"], later["new"], later["requests"]) == (True, 1, 1)
    assert crawl.site.asked[-1][1]["sort"] == "activity"


class Killed(BaseException):
    pass


def test_killed_before_or_after_any_write_a_crawl_ends_as_if_nothing_had_happened(
    tmp_path, monkeypatch
):
    def fresh(name):
        (tmp_path / name).mkdir()
        questions = [question(n, answers=[(n + 50, "x")]) for n in range(1, 9)]
        return Crawl(tmp_path / name, StackExchangeSite(questions))

    def kill_at(step):
        """Make the crawl die before its write number `step // 2`, or after it."""
        writes = iter(range(1000))

        def dying(write):
            def write_or_die(*arguments):
                number = next(writes)
                if 2 * number == step:
                    raise Killed
                write(*arguments)
                if 2 * number + 1 == step:
                    raise Killed

            return write_or_die

        monkeypatch.setattr(stack_exchange_api, "write_atomic", dying(write_atomic))
        monkeypatch.setattr(stack_exchange, "write_page", dying(write_page))

    whole = fresh("whole")
    whole.run()
    steps = 0
    while True:
        broken = fresh(f"killed-{steps}")
        kill_at(steps)
        try:
            broken.run()
        except Killed:
            monkeypatch.undo()
        else:
            break
        assert broken.later()[0]["complete"]
        assert broken.posts() == whole.posts()
        steps += 1

    assert steps > 15


def test_a_page_stored_just_before_a_kill_is_never_overwritten(crawl):
    crawl.run()
    state = crawl.state()
    state["next_page"] = 0  # as if the state of the last pages had not reached the disk
    (crawl.folder / "state.json").write_text(json.dumps(state))
    crawl.site.questions[9] = question(9)

    crawl.later()

    assert sorted(crawl.posts()) == list(range(1, 10))


def test_pages_that_later_ones_replace_as_a_whole_are_removed(crawl):
    crawl.run()
    before = crawl.posts()
    for each in crawl.site.questions.values():
        each["score"] = 77

    crawl.later()

    assert page_names(crawl.folder)[0] == "pages/00000004.json.gz"
    assert {**before, **crawl.posts()} == {n: p | {"score": 77} for n, p in before.items()}


def test_the_key_is_sent_but_stored_and_named_nowhere(crawl, monkeypatch):
    monkeypatch.setenv("STARLOOM_STACK_EXCHANGE_KEY", "U4DMV*8nvpm3EOpvf69Rxw((")
    crawl.site.faults[3] = refusal(405, "key_required", "a key is required")

    with pytest.raises(SourceError) as caught:
        crawl.run()

    stored = b"".join(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in crawl.folder.rglob("*")
        if path.is_file()
    )
    assert crawl.site.asked[-1][1]["key"] == "U4DMV*8nvpm3EOpvf69Rxw(("
    assert "U4DMV" not in str(caught.value)
    assert b"U4DMV" not in stored


def test_a_damaged_state_or_page_is_named_with_what_to_do(crawl):
    crawl.run()
    page = crawl.folder / page_names(crawl.folder)[0]
    content = page.read_bytes()

    page.write_bytes(content[:40])
    with pytest.raises(SourceError, match=r"00000000\.json\.gz: not a page .* remove the folder"):
        crawl.later()
    page.write_bytes(content)
    (crawl.folder / "state.json").write_text("{")
    with pytest.raises(SourceError, match=r"state\.json: .* cannot be read .* remove the folder"):
        crawl.later()


def test_the_same_question_is_not_asked_twice_within_a_minute(crawl):
    crawl.run()
    crawl.later(10, recheck_requests=0)

    assert crawl.clock.waits == [pytest.approx(50, abs=0.2)]


def test_batches_go_round_once_and_stop(tmp_path):
    known = KnownQuestions(tmp_path)
    for number in range(1, 8):
        known.learn({"question_id": number}, 0)

    assert list(batches(known, 5, 3, 9)) == [[6, 7], [1, 2, 3], [4, 5]]
    assert list(batches(known, 0, 3, 2)) == [[1, 2, 3], [4, 5, 6]]
    assert list(batches(known, 7, 10, 9)) == [[1, 2, 3, 4, 5, 6, 7]]
