"""Whatever happens to a site between refreshes, wherever they are killed: the copy catches up."""

import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sources.stack_exchange.api_items import post_of, read_posts
from pipelines.spiders import stack_exchange, stack_exchange_api
from pipelines.spiders.stack_exchange import converse
from pipelines.spiders.stack_exchange_pages import write_page
from pipelines.store import write_atomic
from tests.assets.replay_server import TestClock, play
from tests.assets.stack_exchange_site import StackExchangeSite, question

REQUEST = {
    "site": "stats.stackexchange.com", "api_url": "http://api.test/2.3", "tags": [], "since": None,
    "until": None, "min_score": None, "window": None, "page_size": 2, "quota_reserve": 0,
    "recheck_requests": 99,
}  # fmt: skip

numbers = st.integers(1, 6)
answers = st.lists(st.integers(0, 3), unique=True, max_size=3)
events = st.one_of(
    st.tuples(st.just("write"), numbers, answers),
    st.tuples(st.just("vote"), numbers, st.integers(-3, 3)),
    st.tuples(st.just("delete"), numbers, st.none()),
    st.tuples(st.just("bump"), numbers, st.none()),
    st.tuples(st.just("refresh"), st.integers(0, 30), st.none()),
)


class Killed(BaseException):
    pass


def dying(write, left):
    """Return a writer that dies after, or instead of, its last write."""

    def write_or_die(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        write(*arguments)
        if left[0] == 1:
            raise Killed

    return write_or_die


def refresh(site, folder, clock, kill_at=10**6):
    clock.time += 3600
    left = [kill_at]
    with (
        mock.patch.object(stack_exchange_api, "write_atomic", dying(write_atomic, left)),
        mock.patch.object(stack_exchange, "write_page", dying(write_page, left)),
    ):
        try:
            play(converse(REQUEST, folder, clock.now), site, clock)
        except Killed:
            return


def happen(event, site, clock):
    kind, number, detail = event
    now = int(clock.time)
    clock.time += 10
    if kind == "write":
        texts = [(number * 10 + 100 + each, f"at {now}") for each in detail]
        site.questions[number] = question(number, now, answers=texts, body=f"<p>{now}</p>")
    elif kind == "delete":
        site.questions.pop(number, None)
    elif number in site.questions:
        change = {"score": detail} if kind == "vote" else {"last_activity_date": now}
        site.questions[number] = site.questions[number] | change


def world(site):
    """Return the posts of the site as rows by id."""
    rows = [
        post_of(item)
        for each in site.questions.values()
        for item in (each, *each.get("answers", ()))
    ]
    return {row["id"]: row for row in rows}


def without_activity(rows):
    return {number: {**row, "active": None} for number, row in rows.items()}


@given(st.lists(events, max_size=30))
@settings(max_examples=60, deadline=None)
def test_after_any_history_of_edits_deletions_and_kills_a_refresh_catches_up(history):
    site, clock = StackExchangeSite([question(1), question(2)]), TestClock()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for event in history:
            if event[0] == "refresh":
                refresh(site, folder, clock, kill_at=event[1] or 10**6)
            else:
                happen(event, site, clock)
        # A first crawl asks for no deletions, and the last refresh may have been killed in it.
        refresh(site, folder, clock)
        refresh(site, folder, clock)

        found = list(read_posts(folder))

        assert [row["id"] for row in found] == sorted(world(site))
        assert without_activity({row["id"]: row for row in found}) == without_activity(world(site))
