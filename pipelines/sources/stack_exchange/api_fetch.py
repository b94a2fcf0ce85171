"""Fetches a site's questions and answers by the API, or what changed since the last time."""

from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

from pipelines.errors import SourceError
from pipelines.settings.sources import StackExchangeSource
from pipelines.sources.raw import Fetched, Window
from pipelines.spiders.launch import PROGRAM, run_spider
from pipelines.spiders.stack_exchange_pages import page_names

SECRETS = ("STARLOOM_STACK_EXCHANGE_KEY",)
MAX_BYTES = 64 * 2**20  # a hundred questions with dozens of the longest answers each
COUNTED = ("new", "edited", "deleted", "rechecked", "requests", "questions")

__all__ = ["fetch", "page_names"]


def fetch(
    source: StackExchangeSource, folder: Path, window: Window, *, program: str = PROGRAM
) -> Fetched:
    """Bring the pages below `folder` up to date, or only those of a window (creation dates).

    The first call fetches everything, a later one what changed. Pages that arrived are kept
    whatever happens. Raises SourceError where the API cannot be asked, and where quota or
    throttling stops a first crawl (unless `allow_partial`) or a window; a stopped refresh goes on
    at the next one.
    """
    if not source.site:
        raise SourceError(f"source {source.id!r}: no `site:`, e.g. stats.stackexchange.com")
    done = run_spider(
        "stack-exchange", api_request(source, window), folder, secrets=SECRETS, program=program
    )
    is_window = window.since is not None or window.until is not None
    unfinished = done["stopped"] if is_window else not done["complete"]
    if unfinished and (is_window or not source.allow_partial):
        raise SourceError(_stop_text(source, done, is_window=is_window))
    counts = {name: done[name] for name in COUNTED}
    return Fetched(done["changed"], _summary(source, done), counts)


def api_request(source: StackExchangeSource, window: Window) -> dict[str, Any]:
    """Return what the spider is asked for; dates become seconds since 1970."""
    asked = None
    if window.since is not None or window.until is not None:
        asked = {"since": _instant(window.since), "until": _instant(window.until)}
    return {
        "site": source.site,
        "api_url": source.api_url,
        "trusted": [source.api_url],
        "tags": list(source.tags),
        "since": _instant(source.since),
        "until": _instant(source.until),
        "min_score": source.min_fetched_score,
        "window": asked,
        "page_size": source.page_size,
        "quota_reserve": source.quota_reserve,
        "recheck_requests": source.recheck_requests,
        "delay": source.request_delay,
        "contact": source.contact,
        "max_bytes": MAX_BYTES,
    }


def _instant(value: date | datetime | None) -> int | None:
    """Return seconds since 1970; a day starts at midnight UTC, and so is a time without a zone."""
    if value is None:
        return None
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    return int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())


def _summary(source: StackExchangeSource, done: dict[str, Any]) -> str:
    if done["changed"]:
        parts = [f"{done[name]:,} {name}" for name in ("new", "edited", "deleted") if done[name]]
        what = f"{', '.join(parts)} questions"
    else:
        what = "nothing changed"
    quota = "" if done["quota_remaining"] is None else f", quota {done['quota_remaining']:,} left"
    stop = f"; {_cause(source, done)}, the next refresh goes on" if done["stopped"] else ""
    return (
        f"{what}: {done['questions']:,} questions of {source.site} "
        f"({done['requests']:,} requests{quota}){stop}"
    )


def _stop_text(source: StackExchangeSource, done: dict[str, Any], *, is_window: bool) -> str:
    hint = "" if is_window else ", or set allow_partial: true to go on with what is there"
    return (
        f"source {source.id!r}: {_cause(source, done)}; {done['questions']:,} questions are kept, "
        f"run the same command again then{hint}"
    )


def _cause(source: StackExchangeSource, done: dict[str, Any]) -> str:
    if done["stopped"] == "throttled":
        end = datetime.fromtimestamp(done["quiet_until"], UTC)
        return f"the API wants no requests before {end:%Y-%m-%d %H:%M} UTC"
    return (
        f"the API's quota of the day is used up to quota_reserve ({source.quota_reserve}), "
        "a new one starts at midnight UTC (a key in STARLOOM_STACK_EXCHANGE_KEY has a larger one)"
    )
