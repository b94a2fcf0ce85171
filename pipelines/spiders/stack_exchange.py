"""Spider `stack-exchange`: questions with all their answers from the Stack Exchange API 2.3.

Pages are asked by activity, oldest first, each from the last date of the one before (`min`), never
by a running page number: what becomes active meanwhile moves behind the cursor and is still seen,
nothing slides past it, and a deep crawl needs no page beyond the first few. The cursor where a
pass ended is the watermark of the next run, which therefore gets what changed since.

Deletions are no activity. Each later run asks known questions again by id, in turn, up to
`recheck_requests` requests: the answers that are no longer there are gone, and so are questions
that stay away when asked a second time. Votes that changed are found by the same pass.

With `min_score` the first pass goes by score instead, from the best down to it, which takes far
fewer requests; later runs go by activity from where that pass began. A question that reaches
`min_score` by votes alone is not found until it is active again: votes are no activity.
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import SourceError
from pipelines.spiders.conversation import Answer, Ask, Conversation, Failed, Now, Pause
from pipelines.spiders.stack_exchange_api import KEY, ApiClient, ApiState, Page, StopForNow
from pipelines.spiders.stack_exchange_pages import (
    KnownQuestions,
    batches,
    digest_item,
    page_names,
    page_number,
    question_id,
    remove_outdated,
    write_page,
)

logger = logging.getLogger(__name__)

SECRETS = (KEY,)
# Everything records need and nothing more: the built-in filter with bodies, plus the answers.
FILTER = {"base": "withbody", "include": "question.answers", "unsafe": "false"}
OVERLAP_SECONDS = 120  # the API answers from caches: look back a little before the watermark
QUIET_SECONDS = 60  # the same question is not asked twice within a minute
PROGRESS_REQUESTS = 20

Steps = Generator[Ask | Pause, Answer | Failed | None, None]


def converse(request: dict[str, Any], folder: Path, now: Now) -> Conversation:
    """Bring the pages of a folder up to date.

    `request`: site, api_url, tags (any of them), since and until (seconds since 1970, creation of
    the question), min_score (of the question, or None), window (the same two dates, or None: then
    the watermark moves), page_size, quota_reserve, recheck_requests. Returns counts, `complete`
    (every pass ended once), `changed`, and `stopped` (quota, throttled or None).
    """
    return (yield from _Crawl(request, folder, now).run())


class _Crawl:
    def __init__(self, request: dict[str, Any], folder: Path, now: Now) -> None:
        self._request = request
        self._folder = folder
        self._now = now
        self._state = ApiState(folder)
        self._client = ApiClient(request, self._state, now)
        self._known = KnownQuestions(folder)
        # A page that was stored just before a kill is not in the state yet: never overwrite it.
        after = max((page_number(name) + 1 for name in page_names(folder)), default=0)
        self._state.values["next_page"] = max(self._state.values["next_page"], after)
        self._size = request["page_size"]
        self._counts = dict.fromkeys(("new", "edited", "deleted", "rechecked", "pages"), 0)

    def run(self) -> Conversation:
        values, window = self._state.values, self._request["window"]
        had_all, stopped = self._complete(), None
        try:
            rest = values["finished"] + QUIET_SECONDS - self._now()
            if not window and 0 < rest <= QUIET_SECONDS:
                yield Pause(rest)
            if values["filter"] is None:
                yield from self._create_filter()
            for tag in self._tags():
                yield from self._follow(tag, window)
            if not window:
                if had_all:
                    yield from self._recheck()
                values["finished"] = self._now()
                self._state.save()
        except StopForNow as stop:
            stopped = str(stop)
        if self._counts["pages"]:
            remove_outdated(self._folder, self._known)
        return {
            **self._counts,
            "requests": self._client.requests,
            "questions": len(self._known),
            "quota_remaining": values["quota_remaining"],
            "complete": self._complete(),
            "changed": self._counts["pages"] > 0,
            "stopped": stopped,
            "quiet_until": values["blocked_until"],
        }

    def _tags(self) -> list[str]:
        return list(self._request["tags"]) or [""]

    def _complete(self) -> bool:
        passes = self._state.values["passes"]
        return all(passes.get(tag, {}).get("complete") for tag in self._tags())

    def _create_filter(self) -> Steps:
        """Ask for a filter's name once; the API gives the same name for the same fields."""
        page = yield from self._client.get("/filters/create", FILTER)
        name = page.items[0].get("filter") if page.items else None
        if not isinstance(name, str):
            raise SourceError(
                f"{self._request['api_url']}/filters/create: no filter in the answer; check api_url"
            )
        self._state.values["filter"] = name
        self._state.save()

    def _follow(self, tag: str, window: dict[str, Any] | None) -> Steps:
        """Follow one tag's questions to the end: by score the first time if asked, by activity."""
        since, until = _overlap(self._request, window)
        if since is not None and until is not None and since >= until:
            return
        passes = self._state.values["windows" if window else "passes"]
        key = f"{tag}|{since}|{until}" if window else tag
        start = {"cursor": None, "page": 1, "complete": False, "started": self._now()}
        here = passes.setdefault(key, start)
        order = BY_ACTIVITY
        if self._request["min_score"] is not None and not here["complete"]:
            order = BY_SCORE
        elif here["complete"] and here["cursor"] is not None:
            here["cursor"] -= OVERLAP_SECONDS
            here["page"] = 1
        query = {
            "tagged": tag,
            "fromdate": since,
            "todate": None if until is None else until - 1,
            **order.query,
            "pagesize": self._size,
            "filter": self._state.values["filter"],
        }
        if order is BY_SCORE:
            query["min"] = self._request["min_score"]
        more = True
        while more:
            query |= {order.bound: here["cursor"], "page": here["page"]}
            page = yield from self._client.get("/questions", query)
            more = _advance(here, page, order, self._size)
            if not more:
                here["complete"] = True
                if order is BY_SCORE:  # what is active from now on comes by activity
                    here |= {"cursor": int(here["started"]), "page": 1}
                if window:
                    del passes[key]
            self._keep(page, {"method": "/questions"})
            self._report()

    def _recheck(self) -> Steps:
        """Ask known questions again, in turn; what is gone twice is deleted."""
        values = self._state.values
        size = min(self._size, 100)
        found = batches(
            self._known, values["recheck_after"], size, self._request["recheck_requests"]
        )
        for ids in found:
            missing = yield from self._ask_again(ids, ())
            if missing:
                yield from self._ask_again(missing, missing)
            self._counts["rechecked"] += len(ids)
            values["recheck_after"] = ids[-1]
            self._state.save()
            self._report()

    def _ask_again(
        self, ids: list[int], suspects: list[int] | tuple[()]
    ) -> Generator[Ask | Pause, Answer | Failed | None, list[int]]:
        """Ask for questions by id; return those not there. Suspects not there are deleted."""
        query = {"pagesize": 100, "filter": self._state.values["filter"]}
        page = yield from self._client.get("/questions/{ids}", query, ids)
        there = {question_id(item) for item in page.items}
        missing = [each for each in ids if each not in there]
        if page.has_more:  # cannot be with so few ids: then nothing is proved
            missing = []
        gone = [each for each in missing if each in suspects]
        self._keep(page, {"method": "/questions/{ids}", "asked": ids, "gone": gone})
        return missing

    def _keep(self, page: Page, header: dict[str, Any]) -> None:
        """Store a page that brings something new, then the state that follows from it."""
        changed, place = bool(header.get("gone")), self._state.values["next_page"]
        for item in page.items:
            number = question_id(item)
            before = None if number is None else self._known.find(number)
            if number is not None and before != digest_item(item):
                self._counts["new" if before is None else "edited"] += 1
                self._known.learn(item, place)
                changed = True
        if changed:
            write_page(self._folder, place, header, page.body)
            self._state.values["next_page"] = place + 1
            self._counts["pages"] += 1
            self._counts["deleted"] += len(header.get("gone", ()))
            self._known.forget(header.get("gone", ()))
        self._state.save()

    def _report(self) -> None:
        if self._client.requests % PROGRESS_REQUESTS == 0:
            left = self._state.values["quota_remaining"]
            logger.info(
                "%s: %d questions after %d requests, quota %s left",
                self._request["site"], len(self._known), self._client.requests, left,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Order:
    """An order of questions that a cursor can follow: `bound` is the parameter that holds it."""

    query: dict[str, str]
    field: str
    bound: str
    sign: int


BY_ACTIVITY = _Order({"sort": "activity", "order": "asc"}, "last_activity_date", "min", 1)
BY_SCORE = _Order({"sort": "votes", "order": "desc"}, "score", "max", -1)


def _advance(here: dict[str, Any], page: Page, order: _Order, size: int) -> bool:
    """Move a pass behind a page; say whether there is more.

    Where a page is full the API is asked on even if it says there is no more; where it is empty it
    is not, even if it says there is.
    """
    values = [
        item[order.field]
        for item in page.items
        if isinstance(item, dict) and isinstance(item.get(order.field), int)
    ]
    if not values:
        return False
    last = order.sign * max(order.sign * value for value in values)
    ahead = here["cursor"] is None or order.sign * (last - here["cursor"]) > 0
    if ahead:
        here["cursor"], here["page"] = last, 1
    elif page.has_more:
        here["page"] += 1  # more questions with one date or score than a page holds
    return page.has_more or (ahead and len(page.items) >= size)


def _overlap(
    request: dict[str, Any], window: dict[str, Any] | None
) -> tuple[int | None, int | None]:
    """Return the dates (from, before) that both the source and the window allow."""
    since = [each["since"] for each in (request, window or {}) if each.get("since") is not None]
    until = [each["until"] for each in (request, window or {}) if each.get("until") is not None]
    return max(since, default=None), min(until, default=None)
